"""Imports point one way: structure < losses < data, models < learn < evaluate < plan < cli; the report stands apart."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "kladi"
RANK = {
    "errors": 0,
    "sections": 0,
    "config": 0,
    "structure": 1,
    "losses": 2,
    "data": 3,
    "models": 3,
    "toy": 4,
    "learn": 4,
    "evaluate": 5,
    "export": 5,
    "report": 5,
    "plan": 6,
    "study": 6,
    "printed": 6,
    "commands": 7,
    "cli": 8,
    "demo": 9,
    "__main__": 9,
}
FILES = sorted(SOURCE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(SOURCE).parts[0].removesuffix(".py")


def imported_rooms(tree: ast.AST) -> set[str]:
    rooms = set()
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        rooms |= {name.split(".")[1] for name in names if name.startswith("kladi.")}
    return rooms & RANK.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_one_way(path):
    if path == SOURCE / "__init__.py":
        pytest.skip("the package's front door names every room")
    here = room(path)
    assert here in RANK, f"{here} has no place in the order: add it to RANK and to the architecture's drawing"
    wrong = {other for other in imported_rooms(ast.parse(path.read_text())) if RANK[other] > RANK[here]}
    assert not wrong, f"{path.name} ({here}) must not import {wrong}"


def test_a_wrong_import_is_seen():
    assert imported_rooms(ast.parse("from kladi.learn.fit import fit\nimport kladi.cli")) == {"learn", "cli"}


@pytest.mark.parametrize(
    "module", ["kladi", "kladi.report.page", "kladi.cli", "kladi.config", "kladi.structure.taxonomy"]
)
def test_light_modules_import_no_torch(module):
    """The command line answers `--help`, and a report is drawn, without waiting for torch."""
    code = f"import {module}, sys; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_no_vague_rooms(path):
    vague = {"utils", "util", "helpers", "common", "base", "core", "misc", "trainers"}
    assert not vague & set(path.relative_to(SOURCE).with_suffix("").parts)
