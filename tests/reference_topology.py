"""Diagrams and their distance once more, by the definitions: union-find over pixels, and every matching tried."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

Point = tuple[float, float]
Image = Sequence[Sequence[float]]
FOUR = ((0, 1), (1, 0), (0, -1), (-1, 0))
EIGHT = (*FOUR, (1, 1), (1, -1), (-1, 1), (-1, -1))


def merges(entry: dict, neighbours) -> list[Point]:
    """(entry of the younger, time of meeting) for each pair of components that meet, pixels entering in order of
    `entry`; what meets at the moment it enters is left out."""
    root: dict = {}

    def find(node):
        while root[node] != node:
            node = root[node]
        return node

    found = []
    for node in sorted(entry, key=lambda node: entry[node]):
        root[node] = node
        for other in neighbours(node):
            if other not in root:
                continue
            a, b = find(node), find(other)
            if a == b:
                continue
            young, old = (a, b) if entry[a] > entry[b] else (b, a)
            if entry[young] < entry[node]:
                found.append((entry[young], entry[node]))
            root[young] = old
    return found


def h0(image: Image) -> list[Point]:
    """Bright components: 8 neighbours, t = 1 - v rising."""
    entry = {(r, c): 1 - v for r, row in enumerate(image) for c, v in enumerate(row)}
    return sorted(merges(entry, lambda at: [(at[0] + dr, at[1] + dc) for dr, dc in EIGHT]))


def h1(image: Image) -> list[Point]:
    """By duality the dark components: 4 neighbours, t falling, everything on the border joined to an outside that was
    always there; a hole is born where its component is cut off and dies with its darkest pixel."""
    height, width = len(image), len(image[0])
    entry: dict = {(r, c): -(1 - v) for r, row in enumerate(image) for c, v in enumerate(row)}
    outside = "outside"
    entry[outside] = -math.inf
    border = [(r, c) for r in range(height) for c in range(width) if r in (0, height - 1) or c in (0, width - 1)]

    def neighbours(at):
        if at == outside:
            return border
        beside = [(at[0] + dr, at[1] + dc) for dr, dc in FOUR]
        return [*beside, outside] if at in border else beside

    return sorted((-meeting, -darkest) for darkest, meeting in merges(entry, neighbours))


def bottleneck(a: Sequence[Point], b: Sequence[Point]) -> float:
    """The least over all matchings, points or diagonal for each, of the largest move."""

    def half(point: Point) -> float:
        return (point[1] - point[0]) / 2

    best = math.inf
    for some in range(min(len(a), len(b)) + 1):
        for chosen in itertools.combinations(range(len(a)), some):
            for partners in itertools.permutations(range(len(b)), some):
                moves = [
                    max(abs(a[i][0] - b[j][0]), abs(a[i][1] - b[j][1])) for i, j in zip(chosen, partners, strict=True)
                ]
                moves += [half(a[i]) for i in range(len(a)) if i not in chosen]
                moves += [half(b[j]) for j in range(len(b)) if j not in partners]
                best = min(best, max(moves, default=0.0))
    return best
