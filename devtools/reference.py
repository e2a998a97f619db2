"""``python -m devtools.reference``: write the generated parts of the reference pages.

A part stands between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` and is made from the code:
the options, the arguments of the commands, and the tables. A test fails if a part is out of date.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from devtools.option_texts import OPTION_TEXTS
from pg_layer._config.options import OPTIONS, Config
from pg_layer.management.commands import pg_layer_status, pg_layer_sweep

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "reference"
TABLES = ROOT / "migrations" / "0001_1_tables.sql"
MAX_COLUMNS = 78  # of a command, without the backslash
COMMANDS = {"pg_layer_status": pg_layer_status, "pg_layer_sweep": pg_layer_sweep}


# ---------------------------------------------------------------------- options


def default_of(option: str) -> str:
    """Return the default of an option, as Markdown."""
    default = getattr(Config(), option)
    return "none" if default is None else f"`{default!r}`".replace("'", '"')


def options() -> str:
    """Return a table of all options, and a section for each."""
    lines = ["| option | default | unit |", "|---|---|---|"]
    lines += [
        f"| [`{name}`](#{name}) | {default_of(name)} | {OPTION_TEXTS[name].unit} |"
        for name in OPTIONS
    ]
    for name in OPTIONS:
        text = OPTION_TEXTS[name]
        lines += [
            f"\n## `{name}`\n",
            f"- Default: {default_of(name)}",
            f"- Unit: {text.unit}",
            f"- Range: {text.range}\n",
            f"{text.effect}\n",
            f"**When to change it.** {text.change}",
        ]
    return "\n".join(lines)


# ---------------------------------------------------------------------- commands


def command(name: str) -> str:
    """Return the usage of a management command, and a table of its arguments."""
    parser = COMMANDS[name].Command().create_parser("manage.py", name)
    django = {"help", "version", "verbosity", "settings", "pythonpath", "traceback"}
    django |= {"no_color", "force_color", "skip_checks"}
    found = [action for action in parser._actions if action.dest not in django]
    usage = f"python manage.py {name}"
    for action in found:
        argument = f"[{_with_value(action)}]"
        is_full = len(f"{usage} {argument}".splitlines()[-1]) > MAX_COLUMNS
        usage += f" \\\n  {argument}" if is_full else f" {argument}"
    lines = [f"```sh\n{usage}\n```\n", "| argument | effect |", "|---|---|"]
    lines += [f"| `{_with_value(action)}` | {action.help} |" for action in found]
    return f"{parser.description}\n\n" + "\n".join(lines)


def _with_value(action: argparse.Action) -> str:
    (option,) = action.option_strings
    if action.nargs == 0:
        return option
    metavar = str(action.metavar or action.dest.upper())
    return f"{option} [{metavar}]" if action.nargs == "?" else f"{option} {metavar}"


# ---------------------------------------------------------------------- tables


class Column(NamedTuple):
    """A column in a CREATE TABLE, with the comment above it."""

    name: str
    type: str
    comment: str


class Table(NamedTuple):
    """A CREATE TABLE, with the comment above it."""

    name: str
    comment: str
    columns: list[Column]


def read_tables() -> Iterator[Table]:
    """Yield the tables that the first migration creates."""
    sql = TABLES.read_text(encoding="utf-8")
    create = r"((?:^--.*\n)+)^CREATE (?:UNLOGGED )?TABLE (\w+) \(\n((?: .*\n)+)"
    column = r"((?: +--.*\n)*) +([a-z_]+) +(.*?),?\n"  # a constraint is in capitals
    for comment, name, body in re.findall(create, sql, re.MULTILINE):
        columns = [
            Column(column_name, type_, _uncommented(column_comment))
            for column_comment, column_name, type_ in re.findall(column, body)
        ]
        yield Table(name, _uncommented(comment), columns)


def _uncommented(comment: str) -> str:
    return " ".join(line.strip().removeprefix("--").strip() for line in comment.splitlines())


def _short(type_: str) -> str:
    """Return the type of a column without its default and constraints."""
    return re.split(r" (?:COLLATE|NOT|PRIMARY|GENERATED|DEFAULT|CHECK)\b", type_)[0]


def tables() -> str:
    """Return a section for each table."""
    lines: list[str] = []
    for table in read_tables():
        lines += [f"## `{table.name}`\n", f"{table.comment}\n"]
        lines += ["| column | type | meaning |", "|---|---|---|"]
        lines += [f"| `{c.name}` | `{_short(c.type)}` | {c.comment} |" for c in table.columns]
        lines.append("")
    return "\n".join(lines)


# ---------------------------------------------------------------------- pages

PARTS: dict[str, tuple[Path, Callable[[], str]]] = {
    "options": (PAGES / "options.md", options),
    "tables": (PAGES / "tables.md", tables),
    **{name: (PAGES / "commands.md", partial(command, name)) for name in COMMANDS},
}


def updated(name: str) -> tuple[Path, str]:
    """Return a page and its text with the part made anew."""
    page, make = PARTS[name]
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
    before, _, rest = text.partition(begin)
    _, found, after = rest.partition(end)
    assert found, f"{page} has no part {name}"
    return page, f"{before}{begin}\n{make().strip()}\n\n{end}{after}"


def main() -> None:
    """Write all parts."""
    for name in PARTS:
        page, text = updated(name)
        page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
