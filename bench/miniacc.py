"""miniACC, five assays of adrenocortical carcinoma (TCGA), from Bioconductor's MultiAssayExperiment, without R.

The file is R's own serialisation of objects that hold unevaluated calls, so it is parsed and searched, not rebuilt.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rdata
from rdata.parser import RObjectType as Kind

ASSAYS = {"RNASeq2GeneNorm": "RNA", "gistict": "copies", "RPPAArray": "protein", "Mutations": "mutations"}
ASSAYS |= {"miRNASeqGene": "miRNA"}
COUNTS = {"RNA", "miRNA"}
"""Assays of counts, whose logarithm is used."""
OUTCOMES = {
    "vital_status": "death",
    "C1A.C1B": "expression class C1A or C1B",
    "MethyLevel": "methylation, three levels",
}


@dataclass(frozen=True)
class MiniACC:
    """tables: float64[92, d], rows of NaN where a patient has no such assay. outcomes: None where unknown."""

    names: tuple[str, ...]
    tables: list[np.ndarray]
    outcomes: dict[str, list[str | None]]


def read(file: Path) -> MiniACC:
    whole = rdata.parser.parse_file(file).object
    while whole.info.type == Kind.LIST:
        whole = whole.value[0]
    parts = attributes(whole)
    clinic = attributes(parts["colData"])
    patients = strings(clinic["rownames"])
    columns = dict(zip(strings(attributes(clinic["listData"])["names"]), clinic["listData"].value, strict=True))
    experiments = attributes(parts["ExperimentList"])["listData"]
    names, tables = [], []
    for name, experiment in zip(strings(attributes(experiments)["names"]), experiments.value, strict=True):
        names.append(ASSAYS[name])
        tables.append(assay(experiment, patients, names[-1]))
    outcomes = {said: values(columns[column]) for column, said in OUTCOMES.items()}
    return MiniACC(tuple(names), tables, outcomes)


def assay(experiment: Any, patients: list[str | None], name: str) -> np.ndarray:
    """A row a patient; a sample's name begins with its patient's, the first of several is taken."""
    matrix = next(matrices(experiment, set()))
    about = attributes(matrix)
    features, samples = about["dim"].value
    content = np.ma.filled(np.ma.asarray(matrix.value, dtype=float), np.nan).reshape(samples, features)  # by column
    place: dict[str, int] = {}
    for i, sample in enumerate(strings(about["dimnames"].value[1])):
        place.setdefault(str(sample)[:12], i)
    at = np.array([place.get(str(patient), -1) for patient in patients])
    table = np.where((at >= 0)[:, None], content[at], np.nan)
    seen = ~np.isnan(table).all(axis=1)
    if name in COUNTS:
        table = np.log2(1 + table)
    if name == "mutations":  # in this file no gene is mutated in two patients: what can be shared is how many are
        table = np.log2(1 + table.sum(axis=1, keepdims=True))
    table = table[:, ~np.isnan(table[seen]).any(axis=0)]
    return table[:, table[seen].std(axis=0) > 0]


def matrices(thing: Any, met: set[int]) -> Iterator[Any]:
    """Numeric matrices anywhere below, environments included."""
    if not hasattr(thing, "info") or id(thing) in met:
        return
    met.add(id(thing))
    about = attributes(thing)
    if thing.info.type in (Kind.REAL, Kind.INT) and "dim" in about:
        yield thing
    below = list(about.values())
    if thing.info.type in (Kind.VEC, Kind.LIST):
        below += list(thing.value)
    elif thing.info.type == Kind.ENV:
        below += [thing.value.frame, thing.value.hash_table]
    elif thing.info.type == Kind.REF:
        below.append(thing.referenced_object)
    for other in below:
        yield from matrices(other, met)


def attributes(thing: Any) -> dict[str, Any]:
    """Of an R object, by name."""
    out: dict[str, Any] = {}
    rest = thing.attributes
    while rest is not None and rest.info.type == Kind.LIST:
        tag = rest.tag
        while tag.info.type == Kind.REF:
            tag = tag.referenced_object
        out[tag.value.value.decode()] = rest.value[0]
        rest = rest.value[1]
    return out


def strings(vector: Any) -> list[str | None]:
    return [None if cell.value is None else cell.value.decode() for cell in vector.value]


def values(vector: Any) -> list[str | None]:
    """Cells as text, None where missing."""
    if vector.info.type == Kind.STR:
        return strings(vector)
    masked = np.ma.asarray(vector.value)
    return [None if gone else str(value) for value, gone in zip(masked.data, np.ma.getmaskarray(masked), strict=True)]
