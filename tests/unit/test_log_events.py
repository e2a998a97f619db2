"""Every record that the package logs names an event, and a page lists each of them."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

from pg_layer._state import log_events

ROOT = Path(__file__).parents[2]
EVENTS = {
    name: value
    for name, value in vars(log_events).items()
    if name.isupper() and isinstance(value, str)
}
LEVELS = {"exception": "ERROR"}  # of methods of a logger that are not named after their level
# The one call whose event depends on a condition: the function that chooses it returns these.
CHOSEN = {"event": {"DATABASE_LOST", "DATABASE_UNREACHABLE", "RECEIVING_REFUSED"}}


def calls() -> Iterator[tuple[str, str, ast.expr | None]]:
    """Return of each call that logs its place, its level, and the expression of its event."""
    for path in sorted((ROOT / "pg_layer").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "logger"
            ):
                level = LEVELS.get(node.func.attr, node.func.attr.upper())
                yield f"{path.relative_to(ROOT)}:{node.lineno}", level, event(node)


def event(call: ast.Call) -> ast.expr | None:
    for keyword in call.keywords:
        if keyword.arg == "extra" and isinstance(keyword.value, ast.Dict):
            for key, value in zip(keyword.value.keys, keyword.value.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "event":
                    return value
    return None


def levels() -> dict[str, set[str]]:
    """Return the levels at which the package logs each event."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for place, level, expression in calls():
        match expression:
            case ast.Attribute(value=ast.Name(id="log_events"), attr=name):
                found[EVENTS[name]].add(level)
            case ast.Name(id=variable):
                for name in CHOSEN[variable]:
                    found[EVENTS[name]].add(level)
            case _:
                raise AssertionError(f"{place} logs without an event of log_events")
    return dict(found)


def documented() -> dict[str, set[str]]:
    """Return the levels that the table of the documentation gives, by event."""
    page = (ROOT / "docs" / "reference" / "monitoring.md").read_text(encoding="utf-8")
    section = page.split("## Log events")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| [^|]+ \| [^|]+ \|$", section, re.MULTILINE)
    return {name: {level.upper()} for name, level in rows}


def test_log_events_names_are_the_constants_in_lower_case() -> None:
    assert {name: name.lower() for name in EVENTS} == EVENTS


def test_log_events_each_is_logged_at_the_documented_level() -> None:
    assert levels() == documented()


def test_log_events_documentation_and_constants_name_the_same_events() -> None:
    assert set(documented()) == set(EVENTS.values())
