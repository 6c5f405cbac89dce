"""Which latent block is shared by which modalities of a patient.

A structure is a non-empty set of modalities that share one block z_S: all of them (globally shared), some (partially
shared), or one alone (private). M modalities have 2^M - 1 structures.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from kladi.errors import suggestion

Structure = tuple[int, ...]
MOST_MODALITIES = 8
"""With more, the structures themselves are too many to be told apart."""


@dataclass(frozen=True)
class Lattice:
    """Structures with the width of the block that each shares.

    modalities: their number M.
    structures: ascending modality numbers each; the largest first, then in lexicographic order.
    ranks: r_S of each, 1 or more: a structure of rank 0 is not there.
    """

    modalities: int
    structures: tuple[Structure, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.modalities <= MOST_MODALITIES:
            raise ValueError(f"{self.modalities} modalities: 1 to {MOST_MODALITIES} can be told apart")
        if len(self.structures) != len(self.ranks):
            raise ValueError(f"{len(self.structures)} structures have {len(self.ranks)} ranks")
        if list(self.structures) != sorted(set(self.structures), key=_order):
            raise ValueError("structures are listed once, the largest first; Lattice.of sorts them")
        for structure, rank in zip(self.structures, self.ranks, strict=True):
            inside = structure and list(structure) == sorted(set(structure)) and structure[0] >= 0
            if not inside or structure[-1] >= self.modalities:
                raise ValueError(f"structure {structure} is no set of modalities 0 to {self.modalities - 1}")
            if rank < 1:
                raise ValueError(f"structure {spelt(structure)} has rank {rank}; leave it out instead")

    @classmethod
    def of(cls, modalities: int, ranks: int | Mapping[Structure, int] | Mapping[str, int]) -> Lattice:
        """Every structure with the same rank, or those that are named with theirs; a rank of 0 leaves one out.

        >>> Lattice.of(2, 3).structures
        ((0, 1), (0,), (1,))
        >>> Lattice.of(3, {"0+1+2": 2, "1": 1}).ranks
        (2, 1)

        Raises:
            ValueError: names what is no structure of these modalities, or a rank below 0.
        """
        if isinstance(ranks, Mapping):
            given = {_read(key, modalities): rank for key, rank in ranks.items()}
            if len(given) < len(ranks):
                raise ValueError("a structure is named twice")
        else:
            given = dict.fromkeys(all_structures(modalities), ranks)
        for structure, rank in given.items():
            if isinstance(rank, bool) or not isinstance(rank, int | np.integer) or rank < 0:
                raise ValueError(f"rank of {spelt(structure)} is {rank!r}; it takes 0 or more")
        kept = sorted((s for s, rank in given.items() if rank), key=_order)
        if not kept:
            raise ValueError("no structure has a rank above 0")
        return cls(modalities, tuple(kept), tuple(int(given[s]) for s in kept))

    @property
    def width(self) -> int:
        """R, of all blocks together."""
        return sum(self.ranks)

    @property
    def names(self) -> tuple[str, ...]:
        """`0+1+2`, as `of` reads them."""
        return tuple(spelt(structure) for structure in self.structures)

    def rank(self, structure: Structure) -> int:
        """r_S; 0 where the structure is not there."""
        return dict(zip(self.structures, self.ranks, strict=True)).get(structure, 0)

    def columns(self) -> Iterator[tuple[Structure, slice]]:
        """Each structure with its place in a score vector of length R."""
        start = 0
        for structure, rank in zip(self.structures, self.ranks, strict=True):
            yield structure, slice(start, start + rank)
            start += rank

    def of_modality(self, modality: int) -> Bool[np.ndarray, " R"]:
        """Which of the R factors a modality takes part in."""
        return self.meeting((modality,))

    def meeting(self, *sets: Iterable[int]) -> Bool[np.ndarray, " R"]:
        """Which of the R factors belong to a structure that meets every one of these sets of modalities."""
        met = [all(set(s) & set(one) for one in sets) for s in self.structures]
        return np.repeat(np.array(met, dtype=bool), self.ranks)

    @property
    def digest(self) -> str:
        """SHA-256 of the content."""
        said = json.dumps([self.modalities, self.structures, self.ranks])
        return hashlib.sha256(said.encode()).hexdigest()

    def __str__(self) -> str:
        """`0+1+2 (3), 0+1 (2), 2 (1)`."""
        return ", ".join(f"{name} ({rank})" for name, rank in zip(self.names, self.ranks, strict=True))


def all_structures(modalities: int) -> tuple[Structure, ...]:
    """Every non-empty set of modalities, the largest first."""
    sizes = range(modalities, 0, -1)
    return tuple(s for size in sizes for s in itertools.combinations(range(modalities), size))


def spelt(structure: Structure) -> str:
    """`0+1+2`."""
    return "+".join(map(str, structure))


def _read(key: Structure | str, modalities: int) -> Structure:
    """A structure as a tuple, or as the text that `spelt` gives."""
    known = {spelt(s): s for s in all_structures(modalities)}
    text = key if isinstance(key, str) else spelt(tuple(sorted(key)))
    parts = text.replace(" ", "").split("+")
    sorted_text = "+".join(sorted(parts, key=lambda part: (len(part), part)))
    if sorted_text not in known:
        raise ValueError(f'"{text}" is no structure of {modalities} modalities{suggestion(text, list(known))}')
    return known[sorted_text]


def _order(structure: Structure) -> tuple[int, Structure]:
    return -len(structure), structure
