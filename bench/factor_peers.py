"""Other factor models of several modalities, each given what it needs; all answer with loadings in a lattice's columns.

AJIVE is mvlearn's, MOFA2 is mofapy2's, solrCMF is its authors'. MCCA and SLIDE are a few lines of our own.
"""

from __future__ import annotations

import contextlib
import io
import sys
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np

from kladi import Lattice
from kladi.models.factors.fitting import mask

SLIDE_ROUNDS = 1_000
ACTIVE = 0.01
"""Share of a modality's variance from which on MOFA2 is taken to say that a factor is active there."""
SOLRCMF_STARTS, SOLRCMF_FOLDS = 5, 5
SOLRCMF_PENALTIES = tuple(float(x) for x in np.exp(np.linspace(np.log(0.02), np.log(0.5), 6)))


@dataclass(frozen=True)
class Found:
    """weights: W in the columns of a lattice; lattice None where the method knows none."""

    weights: np.ndarray
    lattice: Lattice | None


def principal(tables: list[np.ndarray], lattice: Lattice) -> Found:
    """Leading principal axes of all features, of the length of their standard deviation; no structure."""
    values, vectors = np.linalg.eigh(np.cov(np.concatenate(tables, axis=1).T))
    return Found(vectors[:, -lattice.width :] * np.sqrt(values[-lattice.width :]), None)


def mcca(tables: list[np.ndarray], rank: int) -> Found:
    """Canonical variates of all modalities together: leading left singular vectors of their whitened tables side by
    side. It has globally shared factors alone."""
    centred = [x - x.mean(axis=0) for x in tables]
    white = np.concatenate([np.linalg.svd(x, full_matrices=False)[0] for x in centred], axis=1)
    scores = np.linalg.svd(white, full_matrices=False)[0][:, :rank]
    weights = np.concatenate([x.T @ scores for x in centred]) / np.sqrt(len(scores))
    return Found(weights, Lattice.of(len(tables), {tuple(range(len(tables))): rank}))


def ajive(tables: list[np.ndarray], lattice: Lattice) -> Found:
    """Joint and individual variation; what is shared by some has to be called individual."""
    from mvlearn.decomposition import AJIVE

    whole = tuple(range(lattice.modalities))
    # It takes at least one joint factor, and no more than rows and columns of a table allow.
    own = [max(1, min(int(lattice.of_modality(m).sum()), len(x) - 1, x.shape[1])) for m, x in enumerate(tables)]
    joint = min(max(lattice.rank(whole), 1), *own)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AJIVE(
            init_signal_ranks=own, joint_rank=joint, individual_ranks=[r - joint for r in own], random_state=0
        ).fit(tables)
    n, ends = len(tables[0]), np.cumsum([0, *[x.shape[1] for x in tables]])
    own = [0 if one is None else one.shape[1] for one in model.individual_scores_]  # it may find fewer
    ranks: dict[tuple[int, ...], int] = {(m,): r for m, r in enumerate(own) if r}
    if model.joint_scores_.shape[1]:
        ranks[whole] = model.joint_scores_.shape[1]
    out = Lattice.of(lattice.modalities, ranks)
    weights = np.zeros((ends[-1], out.width))
    for structure, columns in out.columns():
        for m in structure:
            x = tables[m] - tables[m].mean(axis=0)
            scores = model.joint_scores_ if structure == whole else model.individual_scores_[m]
            weights[ends[m] : ends[m + 1], columns] = x.T @ scores / np.sqrt(n)
    return Found(weights, out)


def mofa(tables: list[np.ndarray], lattice: Lattice) -> Found:
    """Factors with a relevance for each modality, without sparsity inside a modality, of which these data have none. A
    row of NaN is a missing modality."""
    from mofapy2.run.entry_point import entry_point

    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        entry = entry_point()
        entry.set_data_options(scale_views=False)
        entry.set_data_matrix([[x] for x in tables])
        entry.set_model_options(
            factors=min(lattice.width, len(tables[0]) - 1), spikeslab_weights=False, ard_weights=True
        )
        entry.set_train_options(iter=3_000, convergence_mode="fast", seed=1, verbose=False, quiet=True)
        entry.build()
        entry.run()
    nodes: Any = entry.model.nodes
    scores = nodes["Z"].getExpectation()
    loadings = [w["E"] if isinstance(w, dict) else w for w in nodes["W"].getExpectations()]
    loadings = [w * scores.std(axis=0) for w in loadings]
    share = np.stack(
        [np.square(w).sum(axis=0) / np.nanvar(x, axis=0).sum() for w, x in zip(loadings, tables, strict=True)]
    )
    return _of_activity(loadings, share > ACTIVE)


def solrcmf(tables: list[np.ndarray], lattice: Lattice) -> Found:
    """Collective matrix factorisation whose penalty says which factor is in which modality, chosen by its own
    cross-validation with the rule of one standard error."""
    import solrcmf as package
    from sklearn.utils import check_array

    # Written for a scikit-learn before 1.8, where an argument had another name.
    modules: list[Any] = [m for name, m in sys.modules.items() if name.startswith("solrcmf")]
    for module in modules:
        if hasattr(module, "check_array"):
            module.check_array = lambda x, force_all_finite: check_array(x, ensure_all_finite=force_all_finite)
    centred = [package.bicenter(x)[0] for x in tables]
    lengths = [float(np.linalg.norm(x)) for x in centred]
    data = {(0, m + 1): x / length for m, (x, length) in enumerate(zip(centred, lengths, strict=True))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = package.best_random_init(
            data, max_rank=lattice.width, n_inits=SOLRCMF_STARTS, n_jobs=1, rng=np.random.default_rng(0)
        )
        found = package.SolrCMFCV(
            structure_penalty=SOLRCMF_PENALTIES,
            max_rank=lattice.width,
            factor_pruning=False,
            cv=SOLRCMF_FOLDS,
            init="custom",
            n_jobs=1,
        ).fit(data, vs=[start.vs_], ds=[start.ds_], us=[start.vs_])
    best = found.best_estimator_
    n = len(tables[0])
    loadings = [best.vs_[m + 1] * best.ds_[0, m + 1] * length / np.sqrt(n) for m, length in enumerate(lengths)]
    return _of_activity(loadings, np.stack([np.abs(best.ds_[0, m + 1]) > 0 for m in range(len(tables))]))


def slide(tables: list[np.ndarray], lattice: Lattice, *, shrunk: bool) -> Found:
    """min || X - U V^T || with U^T U = I and V zero where a modality takes no part, in turns: V = X^T U where it is
    free, U the polar factor of X V; loadings V / sqrt(n), of which "shrunk" subtracts the noise.

    Source: Gaynanova, Li, Structural learning and integrative decomposition of multi-view data, Biometrics 2019.
    """
    x = np.concatenate([table - table.mean(axis=0) for table in tables], axis=1)
    free = mask(tuple(table.shape[1] for table in tables), lattice)
    u = np.linalg.svd(x, full_matrices=False)[0][:, : lattice.width]
    v = (x.T @ u) * free
    before = np.inf
    for _ in range(SLIDE_ROUNDS):
        v = (x.T @ u) * free
        left, lengths, right = np.linalg.svd(x @ v, full_matrices=False)
        u = left @ right
        loss = -float(lengths.sum())
        if abs(before - loss) <= 1e-10 * abs(loss):
            break
        before = loss
    w = v / np.sqrt(len(x))
    if shrunk:
        rest = x - u @ v.T
        noise = float(np.square(rest).sum() / (x.shape[0] * (x.shape[1] - lattice.width)))
        for _, columns in lattice.columns():
            rows = np.flatnonzero(free[:, columns.start])
            left, lengths, right = np.linalg.svd(w[rows, columns], full_matrices=False)
            w[rows, columns] = left * np.sqrt(np.maximum(lengths**2 - noise, 0)) @ right
    return Found(w, lattice)


def scores(w: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Expected factors of centred rows, with the noise that these loadings leave in them."""
    rest = x - x @ np.linalg.pinv(w).T @ w.T
    noise = max(float(np.square(rest).sum()) / (len(x) * max(len(w) - w.shape[1], 1)), 1e-9)
    return x @ np.linalg.solve(w @ w.T + noise * np.eye(len(w)), w)


def _of_activity(loadings: list[np.ndarray], active: np.ndarray) -> Found:
    """Factors one by one, bool[M, R] which of them is in which modality -> a lattice; those of no modality are
    dropped."""
    sets = [tuple(np.flatnonzero(one).tolist()) for one in active.T]
    lattice = Lattice.of(len(loadings), dict(Counter(s for s in sets if s)))
    order = [i for structure in lattice.structures for i, s in enumerate(sets) if s == structure]
    kept = [np.where(on, w, 0.0)[:, order] for w, on in zip(loadings, active, strict=True)]
    return Found(np.concatenate(kept), lattice)
