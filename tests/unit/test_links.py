"""Links and names in the documentation: each of their targets exists."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "pg_layer"
PAGES = sorted(
    [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        ROOT / "CHANGELOG.md",
        ROOT / "benchmarks" / "README.md",
        *(ROOT / "docs").rglob("*.md"),
    ]
)
ARCHITECTURE = [page for page in PAGES if "architecture" in page.relative_to(ROOT).as_posix()]
FOR_MAINTAINERS = [
    *ARCHITECTURE,
    ROOT / "CONTRIBUTING.md",
    ROOT / "docs" / "protocols.md",
    ROOT / "docs" / "glossary.md",
]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def prose(page: Path) -> str:
    """Return the text of a page without fenced blocks, which may look like links or headings."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def links(page: Path) -> Iterator[str]:
    """Return the targets of the relative links of a page, images included."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"[a-z]+:", target):
            yield target


def anchors(page: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ +(.*?) *$", prose(page), re.MULTILINE):
        title = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        anchor = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        number, unique = 0, anchor
        while unique in found:
            number += 1
            unique = f"{anchor}-{number}"
        found.add(unique)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_point_to_existing_files_and_anchors(page: Path) -> None:
    broken = []
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        is_found = target.exists() and target.is_relative_to(ROOT)
        if not is_found or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_anchors_follow_githubs_rules(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# `_db`: what, and why?\n## Twice\n## Twice\n```\n# no heading\n```\n")
    assert anchors(page) == {"_db-what-and-why", "twice", "twice-1"}


def test_broken_links_are_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("[a](b.md#c) ![d](e.svg) [f](https://example.com) `[g](h)` [i](#j)\n")
    assert list(links(page)) == ["b.md#c", "e.svg", "h", "#j"]


# ---------------------------------------------------------------------- names for maintainers


FROM_POSTGRESQL = {"clock_timestamp", "now", "pg_backend_pid", "pg_current_snapshot"}


@functools.cache
def modules() -> dict[str, ast.Module]:
    """Return the modules of the package, parsed, by their path in it."""
    return {
        module.relative_to(PACKAGE).as_posix(): ast.parse(module.read_text(encoding="utf-8"))
        for module in PACKAGE.rglob("*.py")
    }


def functions_in(body: list[ast.stmt]) -> set[str]:
    return {node.name for node in body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))}


@functools.cache
def methods() -> set[tuple[str, str]]:
    """Return the methods and properties of the package, each with the name of its class."""
    return {
        (node.name, method)
        for tree in modules().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for method in functions_in(node.body)
    }


@functools.cache
def functions() -> set[str]:
    """Return the names of the package's functions, its SQL functions, and the layer's methods."""
    found = {method for name, method in methods() if name == "PostgresChannelLayer"}
    for tree in modules().values():
        found |= functions_in(tree.body)
    for file in (ROOT / "migrations").glob("*.sql"):
        found.update(re.findall(r"CREATE FUNCTION (\w+)\(", file.read_text(encoding="utf-8")))
    return found | FROM_POSTGRESQL


@pytest.mark.parametrize("page", FOR_MAINTAINERS, ids=name_of)
def test_pages_for_maintainers_name_only_modules_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"(?<![\w/.])((?:\w+/)+\w+\.(?:py|sql))\b", text)
    assert [name for name in named if not any((at / name).exists() for at in (PACKAGE, ROOT))] == []


@pytest.mark.parametrize("page", FOR_MAINTAINERS, ids=name_of)
def test_pages_for_maintainers_name_only_functions_that_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    named_methods = re.findall(r"\b([A-Z]\w+)\.(\w+)\(\)", text)
    named_functions = re.findall(r"(?<![\w.])([a-z]\w+)\(\)", text)
    assert [name for name in named_methods if name not in methods()] == []
    assert [name for name in named_functions if name not in functions()] == []


def test_glossary_gives_only_names_that_exist() -> None:
    text = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8")
    code = "\n".join(map(ast.unparse, modules().values()))
    names = re.findall(r"\*\* \((?:parameter )?`(\w+)`\)", text)
    assert len(names) > 3
    assert [name for name in names if not re.search(rf"\b{name}\b", code)] == []


def test_architecture_names_every_module() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in ARCHITECTURE)
    missing = [name for name in modules() if not name.endswith("__init__.py") and name not in text]
    assert [name for name in missing if not name.startswith("_db/queries/")] == []
