"""Metadata columns as label sets, and how much two sets share. Unknown is not negative."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float64, Int64

UNKNOWN = frozenset({"", "unknown", "unk", "undefined", "n/a", "na", "nan", "null", "?"})


@dataclass(frozen=True, eq=False)
class LabelSets:
    """attributes: G names; labels: K (attribute, value); values bool[n, K]; known bool[n, G]; weight float64[G]."""

    attributes: tuple[str, ...]
    labels: tuple[tuple[str, str], ...]
    values: Bool[np.ndarray, "n K"]
    known: Bool[np.ndarray, "n G"]
    weight: Float64[np.ndarray, " G"]

    @classmethod
    def from_columns(
        cls, columns: Mapping[str, Iterable[str | None]], *, weights: Mapping[str, float] | None = None
    ) -> LabelSets:
        attributes = tuple(sorted(columns))
        cells = {name: [_parts(cell) for cell in columns[name]] for name in attributes}
        labels = tuple(sorted({(name, value) for name in attributes for parts in cells[name] for value in parts}))
        n = len(next(iter(cells.values())))
        values, known = np.zeros((n, len(labels)), np.bool_), np.zeros((n, len(attributes)), np.bool_)
        place = {label: k for k, label in enumerate(labels)}
        for g, name in enumerate(attributes):
            for row, parts in enumerate(cells[name]):
                known[row, g] = bool(parts)
                for value in parts:
                    values[row, place[name, value]] = True
        weight = np.array([float((weights or {}).get(name, 1.0)) for name in attributes])
        return cls(attributes, labels, values, known, weight)

    def similarity(
        self, *, coverage_discount: bool = True, unknown_pairs: Literal["keep", "drop"] = "keep"
    ) -> tuple[Int64[np.ndarray, " n"], Float64[np.ndarray, "U U"], Bool[np.ndarray, "U U"]]:
        rows = np.concatenate([self.known, self.values], axis=1)
        distinct, class_id = np.unique(rows, axis=0, return_inverse=True)
        G = len(self.attributes)
        known, X = distinct[:, :G].astype(np.float64), distinct[:, G:].astype(np.float64)
        of = np.array([self.attributes.index(name) for name, _ in self.labels], dtype=np.int64)
        member = np.zeros((len(self.labels), G))
        member[np.arange(len(of)), of] = 1.0
        intersection = (X * self.weight[of]) @ X.T
        size = (X @ member * self.weight) @ known.T
        union = size + size.T - intersection
        shared = (known * self.weight) @ known.T
        kappa = shared / self.weight.sum() if coverage_discount else np.ones_like(shared)
        table = np.where(union > 0, kappa * intersection / np.where(union > 0, union, 1.0), 0.0)
        comparable = shared > 0 if unknown_pairs == "drop" else np.ones(shared.shape, np.bool_)
        return class_id.reshape(-1).astype(np.int64), table, comparable

    @property
    def smallest_useful_threshold(self) -> float:
        least = float(self.weight.min() / self.weight.sum())
        return least / (2 - least)


def _parts(cell: Any) -> list[str]:
    text = unicodedata.normalize("NFKC", str(cell if cell is not None else "")).casefold().strip()
    parts = json.loads(text) if text.startswith("[") else text.split("|")
    return [p for p in (str(part).strip() for part in parts) if p not in UNKNOWN]
