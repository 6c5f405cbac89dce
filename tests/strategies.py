"""Random structures for property tests: trees, DAGs, slash paths, metadata columns.

A drawn graph is the mapping that `reference.py` works on, `{node: [parent, ...]}`; `edges_of` and `Taxonomy.from_edges`
turn it into what is tested.
"""

from __future__ import annotations

from hypothesis import strategies as st

from kladi.structure.taxonomy import Taxonomy
from reference import Parents

NAME = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Zl", "Zp")), min_size=1, max_size=6
).filter(lambda name: bool(name.strip()))
"""A node name as users write them: any script, quotes, brackets, commas, blanks."""


def edges_of(parents: Parents) -> list[tuple[str, str | None]]:
    return [(str(node), p) for node, above in parents.items() for p in (above or [None])]


def taxonomy_of(parents: Parents) -> Taxonomy:
    return Taxonomy.from_edges(edges_of(parents))


@st.composite
def trees(draw: st.DrawFn, most: int = 12, least: int = 1) -> dict[str, list[str]]:
    """A ragged forest of `least` to `most` nodes n0, n1, ...; names say nothing about depth."""
    count = draw(st.integers(least, most))
    names = draw(st.permutations([f"n{i}" for i in range(count)]))
    parents: dict[str, list[str]] = {}
    for i, name in enumerate(names):
        above = draw(st.integers(-1, i - 1))
        parents[name] = [] if above < 0 else [names[above]]
    return parents


@st.composite
def dags(draw: st.DrawFn, most: int = 9, least: int = 1) -> dict[str, list[str]]:
    """A DAG of `least` to `most` nodes, each with up to three parents."""
    count = draw(st.integers(least, most))
    names = draw(st.permutations([f"n{i}" for i in range(count)]))
    return {
        name: draw(st.lists(st.sampled_from(names[:i]), max_size=3, unique=True)) if i else []
        for i, name in enumerate(names)
    }


@st.composite
def uniform_trees(draw: st.DrawFn, most_depth: int = 3, most_children: int = 3) -> dict[str, list[str]]:
    """A tree of which all leaves have the same depth."""
    depth = draw(st.integers(1, most_depth))
    parents: dict[str, list[str]] = {}
    level: list[str] = [""]
    for _ in range(depth):
        below = []
        for node in level:
            for child in range(draw(st.integers(1, most_children))):
                name = f"{node}/{child}" if node else f"t{child}"
                parents[name] = [node] if node else []
                below.append(name)
        level = below
    return parents


def slash_paths(most: int = 8) -> st.SearchStrategy[list[str]]:
    """Paths over two or three words, so that one name stands under several parents."""
    parts = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=4)
    return st.lists(parts.map("/".join), min_size=1, max_size=most)


@st.composite
def columns(draw: st.DrawFn, rows: int | None = None, most_rows: int = 8) -> dict[str, list[str | None]]:
    """One to three metadata columns: values v0-v3, several in one cell, unknown. Names that no synonym serves."""
    count = draw(st.integers(1, most_rows)) if rows is None else rows
    one = st.sampled_from(["v0", "v1", "v2", "v3"])
    cell = st.one_of(
        one, st.lists(one, min_size=2, max_size=3, unique=True).map("|".join), st.sampled_from([None, "?"])
    )
    names = draw(st.lists(st.sampled_from(["first", "second", "third"]), min_size=1, max_size=3, unique=True))
    return {name: draw(st.lists(cell, min_size=count, max_size=count)) for name in names}
