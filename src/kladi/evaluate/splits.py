"""Who is tested when: folds by patient, stratified by leaf, repeated, written once and read by every method.

The unit is the patient. Fold k tests, fold k + 1 validates, the rest trains, so one integer a row and repeat says it
all, and each row is tested once a repeat. A manifest's own split is kept as it is.
Leaks are errors, all listed at once.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt64
from sklearn.model_selection import StratifiedGroupKFold

from kladi.data.private_files import write_private
from kladi.errors import UserError
from kladi.structure.taxonomy import Taxonomy

TRAIN, VAL, TEST, UNUSED = 0, 1, 2, -1
FEWEST_PATIENTS = 3
"""A class with fewer cannot stand in train, val and test: it is scored at its parent, or dropped by name."""
HALVES, QUARTERS = 2, 4
MOST_ATTEMPTS = 100
SHOWN = 20


@dataclass(frozen=True)
class Classes:
    """What each row is scored as.

    target: int64[n], node id, -1 where the row is not scored.
    merged: node -> the ancestor its rows are scored at.
    dropped: nodes without enough patients anywhere on their way up, whose rows are not scored.
    """

    target: Int[np.ndarray, " n"]
    merged: Mapping[int, int]
    dropped: tuple[int, ...]


@dataclass(frozen=True)
class Splits:
    """The folds of all repeats. Two methods are comparable only under the same `digest`.

    kind: "folds" (made here) or "manifest" (the data's own train, val, test; a single fold).
    seed: of the folds.
    folds: K; 1 for a manifest split.
    row_id: uint64[n], ascending, the rows that the splits speak of.
    fold: int64[n, R]. For folds `2 k + h`: the row tests in fold k, and is in half h of it (0 unless K = 3). For a
        manifest split TRAIN, VAL or TEST.
    missing: sentences on leaves that a fold lacks.
    """

    kind: str
    seed: int
    folds: int
    row_id: UInt64[np.ndarray, " n"]
    fold: Int[np.ndarray, "n R"]
    missing: tuple[str, ...] = ()

    @property
    def repeats(self) -> int:
        return self.fold.shape[1]

    @property
    def digest(self) -> str:
        """SHA-256 of everything that decides who is tested when."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    def part(self, row_id: UInt64[np.ndarray, " m"], fold: int, repeat: int) -> Int[np.ndarray, " m"]:
        """TRAIN, VAL, TEST or UNUSED of each of the given rows, in any order; a row that was not split is UNUSED."""
        place = np.minimum(np.searchsorted(self.row_id, row_id), max(len(self.row_id) - 1, 0))
        known = self.row_id[place] == row_id if len(self.row_id) else np.zeros(len(row_id), dtype=bool)
        code = self.fold[place, repeat] if len(self.row_id) else np.zeros(len(row_id), dtype=np.int64)
        if self.kind == "manifest":
            return np.where(known, code, UNUSED).astype(np.int64)
        k, half = np.divmod(code, HALVES)
        # With three folds a whole one would be half of what is left to train on: half of it validates, which is a
        # quarter of the training patients, and the other training fold stays whole, so that no class can go missing.
        validates = (k == (fold + 1) % self.folds) & ((half == 0) | (self.folds > 3))
        part = np.where(k == fold, TEST, np.where(validates, VAL, TRAIN))
        return np.where(known, part, UNUSED).astype(np.int64)

    def write(self, path: Path) -> None:
        """`splits.json`: digest, kind, seed and {row id in hex: [fold in each repeat]}; mode 0600."""
        content = {**self._content(), "digest": self.digest, "missing": list(self.missing)}
        write_private(path, json.dumps(content, sort_keys=True).encode())

    @classmethod
    def read(cls, path: Path) -> Splits:
        """The inverse of `write`.

        Raises:
            UserError: no such file, no splits in it, or a digest that does not match its content.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = sorted((int(key, 16), list(value)) for key, value in content["fold"].items())
            splits = cls(
                kind=str(content["kind"]),
                seed=int(content["seed"]),
                folds=int(content["folds"]),
                row_id=np.array([row for row, _ in rows], dtype=np.uint64),
                fold=np.array([fold for _, fold in rows], dtype=np.int64).reshape(len(rows), -1),
                missing=tuple(map(str, content["missing"])),
            )
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a splits.json that kladi wrote") from error
        if splits.digest != content.get("digest"):
            raise UserError(
                f"{path}: its content does not match its digest; somebody changed it. Delete it to split anew"
            )
        return splits

    def _content(self) -> dict[str, Any]:
        return {
            "format": "kladi-splits",
            "version": 1,
            "kind": self.kind,
            "seed": self.seed,
            "folds": self.folds,
            "fold": {
                f"{int(row):016x}": [int(f) for f in folds] for row, folds in zip(self.row_id, self.fold, strict=True)
            },
        }


def scored_classes(
    target: Int[np.ndarray, " n"], group: Int[np.ndarray, " n"], taxonomy: Taxonomy, *, fewest: int = FEWEST_PATIENTS
) -> Classes:
    """Merge classes of fewer than `fewest` patients into their parents, deepest first; drop what stays too rare.

    On a DAG there is no one parent, so rare classes are dropped. Rows with target -1 stay out.
    """
    scored = target.copy()
    merged: dict[int, int] = {}
    dropped: list[int] = []
    own = {int(node) for node in np.unique(target) if node >= 0}
    # Node ids are topological, so a parent is looked at after all that may be merged into it.
    for node in range(len(taxonomy.names) - 1, -1, -1):
        rows = scored == node
        if not rows.any() or len(np.unique(group[rows])) >= fewest:
            continue
        parents = taxonomy.parents[node]
        up = parents[0] if parents and taxonomy.is_tree else -1
        scored[rows] = up
        if up < 0:
            dropped.append(node)
        else:
            merged[node] = up
    final = {node: _follow(merged, node) for node in merged}
    gone = {node for node, end in final.items() if end in dropped}
    dropped += sorted(gone)
    # Nodes without an image of their own were only passed on the way up: nobody misses them.
    merged = {node: end for node, end in final.items() if node not in gone and node in own}
    return Classes(scored, merged, tuple(sorted(own.intersection(dropped))))


def make_splits(
    row_id: UInt64[np.ndarray, " n"],
    target: Int[np.ndarray, " n"],
    group: Int[np.ndarray, " n"],
    *,
    folds: int = 5,
    repeats: int = 2,
    seed: int = 0,
    names: Mapping[int, str] | None = None,
) -> Splits:
    """Repeated, stratified, grouped folds of the rows with target >= 0.

    Args:
        row_id: content ids; the folds depend on them, not on the order of the rows.
        target: class of each row; -1 stays out.
        group: patient of each row.
        folds: K at most; lowered to the patients of the rarest class.
        repeats: how many times, each seeded by (seed, "split", repeat).
        names: of the classes, for sentences on what a fold lacks.

    scikit-learn's `StratifiedGroupKFold(shuffle=True)` on rows sorted by row id. Up to 100 seeds (fewer above 1,000
    patients) are tried for folds in which every class occurs; if none is found the best is kept and `missing` says
    which class lacks where.

    Raises:
        UserError: no labelled row, fewer than two classes, or fewer than three patients in the rarest: no folds.
    """
    order = np.argsort(row_id, kind="stable")
    order = order[target[order] >= 0]
    classes, code = np.unique(target[order], return_inverse=True)
    if len(classes) < 2:
        raise UserError(f"evaluate needs two classes of three patients or more; there is {len(classes)} to test on")
    # Numbered by first appearance in the order of row ids, so that the manifest's own order cannot matter.
    _, first, inverse = np.unique(group[order], return_index=True, return_inverse=True)
    patient = np.argsort(np.argsort(first))[inverse]
    patients = [len(np.unique(patient[code == c])) for c in range(len(classes))]
    k = min(folds, *patients)
    if k < 3:
        raise UserError(f"evaluate needs three folds at least, and the rarest class has {min(patients)} patients")
    fold = np.zeros((len(order), repeats), dtype=np.int64)
    missing = []
    for repeat in range(repeats):
        tests, lacking = _folds(code, patient, k, len(classes), f"{seed}/split/{repeat}")
        for test in range(k):
            inside = np.flatnonzero(tests == test)
            fold[inside, repeat] = HALVES * test
            if k == 3:
                fold[inside, repeat] += _kfold(code[inside], patient[inside], HALVES, f"{seed}/half/{repeat}/{test}")
        for test, c in lacking:
            name = (names or {}).get(int(classes[c]), str(classes[c]))
            missing.append(f"repeat {repeat}, fold {test}: no {name}")
    return Splits("folds", seed, k, row_id[order], fold, tuple(missing))


def manifest_splits(
    row_id: UInt64[np.ndarray, " n"],
    target: Int[np.ndarray, " n"],
    group: Int[np.ndarray, " n"],
    split: Int[np.ndarray, " n"],
    *,
    seed: int = 0,
) -> Splits:
    """The data's own split of the rows with target >= 0, kept as it is: a single fold, a single repeat.

    Without validation rows a quarter of the training patients validates, stratified, so that test chooses nothing.

    Raises:
        UserError: no training or no test row with a label, or fewer than two classes to train on.
    """
    order = np.argsort(row_id, kind="stable")
    order = order[(target[order] >= 0) & np.isin(split[order], (TRAIN, VAL, TEST))]
    part = split[order].astype(np.int64)
    for code, name in ((TRAIN, "train"), (TEST, "test")):
        if not (part == code).any():
            raise UserError(
                f'the column split has no labelled row "{name}"; --evaluate.use_split false makes folds instead'
            )
    training = np.flatnonzero(part == TRAIN)
    if len(np.unique(target[order][training])) < 2:
        raise UserError("evaluate needs two classes among the labelled rows of the split train")
    if not (part == VAL).any():
        part[training[quarter(target[order][training], group[order][training], seed)]] = VAL
    return Splits("manifest", seed, 1, row_id[order], part[:, None])


def find_leaks(
    splits: Splits,
    row_id: UInt64[np.ndarray, " n"],
    group: Int[np.ndarray, " n"],
    pixel_digest: UInt64[np.ndarray, " n"],
    manifest_row: Int[np.ndarray, " n"],
    pretrained: Bool[np.ndarray, " n"] | None = None,
) -> list[str]:
    """Every leak in words: patient or pixels in two parts of a fold, rows tested on that were pretrained on.

    Args:
        pretrained: rows that the encoder has seen with their labels, in this data set or as the same patient or
            pixels in another; None: it has seen none.

    Rows are named by their number in the manifest, and each leak once, at the first fold that has it.
    """
    found: dict[str, None] = {}
    for repeat in range(splits.repeats):
        for fold in range(splits.folds):
            part = splits.part(row_id, fold, repeat)
            for what, ids in (("patient", group), ("image (same pixels)", pixel_digest)):
                for rows in _in_two_parts(part, ids):
                    numbers = ", ".join(f"{int(r):,}" for r in np.sort(manifest_row[rows])[:4])
                    found.setdefault(f"one {what} is in two parts of a fold: rows {numbers}")
            if pretrained is not None:
                seen = np.flatnonzero(pretrained & ((part == VAL) | (part == TEST)))
                for row in np.sort(manifest_row[seen]):
                    found.setdefault(
                        f"row {int(row):,} is tested on, but the encoder was pretrained on it or its patient"
                    )
    return list(found)


def refuse_leaks(leaks: list[str], *, allow: bool) -> None:
    """Raise a UserError that lists the leaks, up to 20 and the count of the rest, unless they are allowed."""
    if not leaks or allow:
        return
    lines = leaks[:SHOWN]
    if len(leaks) > SHOWN:
        lines.append(f"and {len(leaks) - SHOWN:,} more")
    raise UserError(
        "\n".join(
            [*lines, "a number measured on these rows would be a memory; move the rows, or --data.allow_leak true"]
        )
    )


def _in_two_parts(part: np.ndarray, ids: np.ndarray) -> list[np.ndarray]:
    """Row numbers of each id that occurs in more than one part."""
    used = np.flatnonzero(part != UNUSED)
    unique, inverse = np.unique(ids[used], return_inverse=True)
    present = np.zeros((len(unique), 3), dtype=bool)
    present[inverse, part[used]] = True
    return [used[inverse == i] for i in np.flatnonzero(present.sum(axis=1) > 1)]


def _folds(
    code: np.ndarray, patient: np.ndarray, k: int, classes: int, stream: str
) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Test fold of each row, and the (fold, class) pairs that do not occur, of the best of up to 100 seeds."""
    best: tuple[np.ndarray, list[tuple[int, int]]] | None = None
    # A partition of 1,000 patients takes about half a second; larger sets, where one rarely fails, get fewer attempts.
    attempts = min(MOST_ATTEMPTS, max(3, 100_000 // len(np.unique(patient))))
    for attempt in range(attempts):
        tests = _kfold(code, patient, k, f"{stream}/{attempt}")
        present = np.zeros((k, classes), dtype=bool)
        present[tests, code] = True
        lacking = [(int(f), int(c)) for f, c in np.argwhere(~present)]
        if best is None or len(lacking) < len(best[1]):
            best = tests, lacking
        if not lacking:
            break
    return best if best is not None else (np.zeros(len(code), dtype=np.int64), [])


def _kfold(code: np.ndarray, patient: np.ndarray, k: int, stream: str) -> np.ndarray:
    """One stratified, grouped partition into k parts; fewer patients than parts leave parts empty."""
    tests = np.zeros(len(code), dtype=np.int64)
    if len(np.unique(patient)) < k:
        return np.unique(patient, return_inverse=True)[1].astype(np.int64)
    if np.bincount(code).max() < k:  # no class reaches every part, which scikit-learn refuses: grouped only
        code = np.zeros_like(code)
    state = int.from_bytes(hashlib.sha256(f"kladi/{stream}".encode()).digest()[:4], "little")
    splitter = StratifiedGroupKFold(n_splits=k, shuffle=True, random_state=state)
    with warnings.catch_warnings():
        # Said better by `missing`, with the name of the class.
        warnings.filterwarnings("ignore", message="The least populated class", category=UserWarning)
        for number, (_, test) in enumerate(splitter.split(np.zeros((len(code), 1)), code, patient)):
            tests[test] = number
    return tests


def quarter(target: np.ndarray, patient: np.ndarray, seed: int | str) -> np.ndarray:
    """Which rows validate: a quarter of the patients, but none without whom a class would have no training rows."""
    code = np.unique(target, return_inverse=True)[1]
    chosen = _kfold(code, patient, QUARTERS, f"{seed}/validation") == 0
    for c in range(int(code.max()) + 1):
        if chosen[code == c].all():
            chosen[np.isin(patient, patient[code == c])] = False
    return chosen


def _follow(merged: Mapping[int, int], node: int) -> int:
    while node in merged:
        node = merged[node]
    return node
