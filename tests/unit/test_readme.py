"""The README agrees with the code. tests/unit/test_reference.py does this for other pages."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_readme_python_snippets_compile() -> None:
    for snippet in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        ast.parse("\n".join(line.removeprefix("   ") for line in snippet.splitlines()))


def test_readme_links_exist() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("target", re.findall(r"^make ([\w ]+?) *(?:#.*)?$", README, re.MULTILINE))
def test_readme_make_targets_exist(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for name in target.split():
        assert re.search(rf"^{name}:", makefile, re.MULTILINE), name


def test_readme_picture_is_small() -> None:
    (picture,) = re.findall(r"!\[Two browsers.*?\]\((.*?)\)", README)
    assert 10_000 < (ROOT / picture).stat().st_size < 1_000_000
