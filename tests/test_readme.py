"""The README's Python runs as it stands, and its commands are commands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_the_loss_in_your_own_loop_runs():
    block = next(b for b in BLOCKS if "losses." in b)
    scope: dict = {}
    exec(compile(block, "README.md", "exec"), scope)
    assert scope["z"].grad.isfinite().all()
    assert scope["z"].grad.abs().sum() > 0


@pytest.mark.parametrize("line", re.findall(r"^kladi (\w+)", README, flags=re.MULTILINE))
def test_each_command_of_the_readme_exists(line):
    from kladi.cli import app

    assert line in set(app)


def test_the_two_commands_are_targets_of_the_makefile():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", README, flags=re.MULTILINE)) <= targets


def test_links_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"
