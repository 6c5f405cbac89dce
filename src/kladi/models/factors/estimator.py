"""`HierarchicalFactorModel`: globally shared, partially shared and private factors as a scikit-learn estimator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Float64
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.utils.validation import check_array, check_is_fitted

from kladi.models.factors import ranks as rank_rule
from kladi.models.factors.covariance import DENSE, Covariance, Dense, Rows, mean, nearest_semidefinite, places, squares
from kladi.models.factors.fitting import Noise, fit
from kladi.models.factors.peeling import unstacked
from kladi.structure.lattice import Lattice, Structure

Tables = Any
"""A list with one table a modality, [n, d_m] each, or None; `_checked` says what is wrong with anything else."""
FLOATS = (np.float64, np.float32)
Ranks = int | Mapping[str, int] | Mapping[Structure, int] | str


class HierarchicalFactorModel(TransformerMixin, BaseEstimator):
    """Several modalities of the same patients, explained by factors that all, some or one of them share.

        x^(m) = mean^(m) + sum_{S: m in S} W_S^(m) z_S + e^(m),   Cov(z) = I,   Cov(e) = D, diagonal

    Identifiable are the products W_S^(m) W_S^(k)^T (`gram`), not the loadings, which could be turned; they are given in
    one rotation that is always the same. The model takes factors to be uncorrelated, and noise to be the same for all
    features or those of a modality unless it is told otherwise: put features on one scale first (`scale=True`).

    Args:
        ranks: factors of every structure; or of each that there is, {"0+1+2": 3, "0+1": 2}; or "auto".
        refine: climb the likelihood to its top after the first estimate.
        noise: "global", one variance for all, "per_modality", or "per_feature".
        scale: divide each feature by its standard deviation.
        seed: of "auto".

    After `fit`: `lattice`, `ranks_`, `loadings_` ({structure: {modality: [d_m, r]}}), `noise_variance_` (a number, or
    the mean of each modality), `noise_` (of each feature, an array a modality), `means_`, `scales_`, `pairs_` (patients
    that have both of two modalities), `explained_` (share of each modality's variance by structure), `converged_`,
    `n_iter_`.

    Patients without a modality have a row of NaN in it. Then a block of the covariance is that of the patients with
    both of its modalities, and the whole is made positive semi-definite; of more than 2,000 features their leading
    directions are.

    Source: Li, Yu, Zhou, Hierarchical contrastive learning for multimodal data, 2026 (model, peeling, objective);
    alignment, missing modalities and "auto" are ours.
    """

    def __init__(
        self,
        ranks: Ranks = "auto",
        refine: bool = True,
        noise: str = "global",
        scale: bool = False,
        seed: int = 0,
    ) -> None:
        self.ranks = ranks
        self.refine = refine
        self.noise = noise
        self.scale = scale
        self.seed = seed

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()  # pyrefly: ignore[missing-attribute]
        tags.input_tags.allow_nan = True  # a row of them is a missing modality
        return tags

    def fit(self, X: Tables, y: Any = None) -> HierarchicalFactorModel:  # noqa: ARG002
        """Learn from one table a modality, a row a patient, the same in all of them.

        Raises:
            ValueError: tables that do not fit together, a number that is missing or infinite (names modality and row),
                or more factors than features.
        """
        tables, present = _checked(X)
        if isinstance(self.ranks, str) and self.ranks != "auto":
            raise ValueError(f'ranks = "{self.ranks}"; it takes a number, {{"0+1": number, ...}}, or "auto"')
        _noise(self.noise)
        self.pairs_ = present.T.astype(np.int64) @ present
        if self.pairs_.min() < 2:
            m, k = np.argwhere(self.pairs_ < 2)[0]
            raise ValueError(f"{self.pairs_[m, k]} patients have both modality {m} and modality {k}; two are needed")
        self.scales_ = [
            _deviation(x[present[:, m]]) if self.scale else np.ones(x.shape[1]) for m, x in enumerate(tables)
        ]
        if self.scale:
            tables = [x / s.astype(x.dtype) for x, s in zip(tables, self.scales_, strict=True)]
        auto = isinstance(self.ranks, str)
        lattice = rank_rule.lattice_of(tables, present, self.seed) if auto else self._given(len(tables))
        rows = Rows.of(tables, present)
        return self._learn(_small(rows, complete=bool(present.all())), lattice, [*rows.means])

    def fit_covariance(self, covariance: Float64[np.ndarray, "d d"], sizes: Sequence[int]) -> HierarchicalFactorModel:
        """The same from the covariance of all features, modalities one after another; ranks must be given."""
        lattice = self._given(len(sizes))
        self.scales_ = [np.ones(size) for size in sizes]
        self.pairs_ = np.zeros((len(sizes), len(sizes)), dtype=np.int64)
        return self._learn(Dense(covariance, tuple(sizes)), lattice, [np.zeros(size) for size in sizes])

    def _given(self, modalities: int) -> Lattice:
        if isinstance(self.ranks, str):
            said = f'ranks = "{self.ranks}": numbers are needed for a covariance, which does not say how sure it is'
            raise ValueError(said)  # noqa: TRY004
        return Lattice.of(modalities, self.ranks)

    def _learn(self, covariance: Covariance, lattice: Lattice, means: list[np.ndarray]) -> HierarchicalFactorModel:
        found = fit(covariance, lattice, noise=_noise(self.noise), refine=self.refine)
        self.lattice_, self.means_ = lattice, means
        self.weights_ = found.weights
        self.noise_ = [found.noise[place] for place in places(covariance.sizes)]
        self.noise_variance_ = (
            float(found.noise[0]) if self.noise == "global" else np.array([own.mean() for own in self.noise_])
        )
        self.converged_, self.n_iter_ = found.converged, found.steps
        parts = unstacked(found.weights, covariance.sizes, lattice)
        self.loadings_ = {s: {m: parts[s, m] for m in s} for s in lattice.structures}
        self.ranks_ = dict(zip(lattice.structures, lattice.ranks, strict=True))
        diagonal = covariance.diagonal()
        variance = [float(diagonal[place].sum()) for place in places(covariance.sizes)]
        self.explained_ = {
            s: {m: float(np.square(w).sum() / variance[m]) if variance[m] > 0 else 0.0 for m, w in of.items()}
            for s, of in self.loadings_.items()
        }
        self.n_features_in_ = sum(covariance.sizes)
        return self

    @property
    def lattice(self) -> Lattice:
        """Structures and ranks of the fitted model."""
        check_is_fitted(self, "lattice_")
        return self.lattice_

    def transform(self, X: Tables, method: str = "posterior") -> Float64[np.ndarray, "n R"]:
        """Factors of each patient, blocks in the order of `lattice.structures`.

        A modality may be None, or have rows of NaN: what is there speaks for the rest. A patient of whom nothing is
        there has zeros, the mean of all.

        Args:
            method: "posterior", the expected factors given what is there (least error); "pinv", least squares, which
                does not shrink them, of all modalities.

        Raises:
            ValueError: tables that are not those of the fit.
        """
        check_is_fitted(self, "lattice_")
        sizes = tuple(len(mean) for mean in self.means_)
        tables, present = _checked(X, sizes)
        out = np.zeros((len(present), self.lattice_.width))
        where = places(sizes)
        for pattern in np.unique(present, axis=0):
            those = np.flatnonzero((present == pattern).all(axis=1))
            here = np.flatnonzero(pattern)
            if not len(here):
                continue
            w = np.concatenate([self.weights_[where[m]] for m in here])
            noise = np.concatenate([self.noise_[m] for m in here])
            readers = np.split(_reader(w, noise, method), np.cumsum([sizes[m] for m in here])[:-1])
            for m, reader in zip(here, readers, strict=True):
                x = tables[m] if len(those) == len(present) else tables[m][those]
                out[those] += x @ (reader / self.scales_[m][:, None]).astype(x.dtype) - self.means_[m] @ reader
        return out

    def gram(self, structure: Structure | str, m: int, k: int) -> Float64[np.ndarray, "d_m d_k"]:
        """W_S^(m) W_S^(k)^T, the part of the covariance of two modalities that a structure explains.

        Raises:
            ValueError: the structure is not in the lattice, or does not hold both modalities.
        """
        check_is_fitted(self, "lattice_")
        key = tuple(map(int, structure.split("+"))) if isinstance(structure, str) else tuple(structure)
        if key not in self.loadings_:
            raise ValueError(f"no structure {key}; there are {', '.join(self.lattice_.names)}")
        for modality in (m, k):
            if modality not in key:
                raise ValueError(f"modality {modality} takes no part in structure {'+'.join(map(str, key))}")
        return self.loadings_[key][m] @ self.loadings_[key][k].T

    def get_feature_names_out(self, input_features: Any = None) -> np.ndarray:  # noqa: ARG002
        """`0+1+2 factor 0`, ..."""
        check_is_fitted(self, "lattice_")
        pairs = zip(self.lattice_.names, self.lattice_.ranks, strict=True)
        return np.array([f"{name} factor {i}" for name, rank in pairs for i in range(rank)], dtype=object)


def _reader(w: np.ndarray, noise: np.ndarray, method: str) -> Float64[np.ndarray, "d R"]:
    """What centred rows are multiplied by; "posterior": (I + W^T D^-1 W)^-1 W^T D^-1, whose system is R x R."""
    if method == "pinv":
        return np.linalg.pinv(w).T
    if method != "posterior":
        raise ValueError(f'method = "{method}"; it takes "posterior" or "pinv"')
    weighted = w / np.maximum(noise, 1e-12 * max(float(np.square(w).sum()), 1e-300))[:, None]
    return weighted @ np.linalg.inv(np.eye(w.shape[1]) + w.T @ weighted)


def _noise(word: str) -> Noise:
    if word == "global" or word == "per_modality" or word == "per_feature":
        return word
    raise ValueError(f'noise = "{word}"; it takes "global", "per_modality" or "per_feature"')


def _small(rows: Rows, *, complete: bool) -> Covariance:
    """Written out where it is small; made to fit together where patients are missing."""
    if sum(rows.sizes) > DENSE:
        return rows
    dense = rows.written_out()
    return dense if complete else Dense(nearest_semidefinite(dense.matrix), dense.sizes)


def _deviation(x: np.ndarray) -> Float64[np.ndarray, " d"]:
    """1 for a column that is constant."""
    middle = mean(x)
    found = np.sqrt(squares(x, middle) / max(len(x) - 1, 1))
    rounding = max(1e-12, 64 * float(np.finfo(x.dtype).eps)) * np.abs(middle)
    return np.where(found > rounding, found, 1.0)


def _checked(
    X: Tables, sizes: tuple[int, ...] | None = None
) -> tuple[list[Float[np.ndarray, "n _"]], Bool[np.ndarray, "n M"]]:
    """Tables of floats of one length, and who is there; `sizes` of the fit, where there was one."""
    if isinstance(X, np.ndarray) or not isinstance(X, Sequence):
        raise ValueError("the modalities come as a list of tables, one a modality: fit([X0, X1, X2])")  # noqa: TRY004
    for m, x in enumerate(X):
        shape = getattr(x, "shape", None) or np.asarray(x).shape
        if x is not None and len(shape) != 2:  # scikit-learn's own message would repeat the values
            raise ValueError(f"modality {m} has shape {shape}; a table of patients is needed. Reshape your data")
    # In its words where nothing has to be said about modalities: sparse, complex, empty.
    asked: dict[str, Any] = {"ensure_all_finite": False, "ensure_min_samples": 2 if sizes is None else 1}
    given = [None if x is None else check_array(x, dtype=FLOATS, **asked) for x in X]
    rows = {len(x) for x in given if x is not None}
    if len(rows) != 1:
        raise ValueError(f"the tables have {sorted(rows)} rows; each needs a row a patient, the same in all of them")
    if sizes is not None and len(X) != len(sizes):
        raise ValueError(f"{len(X)} modalities; the model knows {len(sizes)}")
    (n,) = rows
    tables: list[np.ndarray] = []
    present = np.ones((n, len(X)), dtype=bool)
    for m, table in enumerate(given):
        if table is None:
            if sizes is None:
                raise ValueError(f"modality {m} is None; to learn, somebody must have it")
            table = np.full((n, sizes[m]), np.nan)
        if sizes is not None and table.shape[1] != sizes[m]:
            raise ValueError(f"modality {m} has {table.shape[1]} columns; the model is one of {sizes[m]}")
        missing = np.isnan(table)
        present[:, m] = ~missing.all(axis=1)
        for bad, what in ((missing.any(axis=1) & present[:, m], "missing"), (np.isinf(table).any(axis=1), "infinite")):
            if bad.any():
                row = int(np.flatnonzero(bad)[0])
                advice = "; fill them in, or make the whole row NaN" if what == "missing" else ""
                raise ValueError(f"modality {m}, row {row}: values are {what}{advice} ({int(bad.sum()):,} such rows)")
        tables.append(table)
    return tables, present
