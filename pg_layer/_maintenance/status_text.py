"""A status as text: in plain columns, or in tables of the library `rich`. The content is equal."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from typing import NamedTuple

from pg_layer._state.status import Status, in_words

_LEFT, _RIGHT = "left", "right"


class Section(NamedTuple):
    """A table: a title with totals, columns (a name and "left" or "right"), and rows."""

    title: str
    columns: Sequence[tuple[str, str]]
    rows: Sequence[Sequence[str]]


class Page(NamedTuple):
    """The content of the status: the problems, single facts, and tables."""

    problems: Sequence[str]
    facts: Sequence[str]
    sections: Sequence[Section]

    @property
    def headline(self) -> list[str]:
        """The first lines: "ok", or a line for each problem."""
        return [f"problem: {_shown(problem)}" for problem in self.problems] or ["ok"]


def page(problems: Sequence[str], status: Status | None) -> Page:
    """Return the content. ``status``: None if the database could not be queried."""
    return (
        Page(problems, [], [])
        if status is None
        else Page(problems, _facts(status), _sections(status))
    )


def _facts(status: Status) -> list[str]:
    age = status.last_sweep_age
    last_sweep = "never" if age is None else f"{in_words(age)} ago"
    drops = ", ".join(f"{name} {count}" for name, count in status.drops.items())
    return [
        f"Last sweep: {last_sweep}",
        f"NOTIFY's queue: {status.notify_queue_usage:.2%} used",
        f"Dropped by live clients: {drops}",
    ]


def _sections(status: Status) -> list[Section]:
    return [
        Section(
            f"Clients: {status.live_clients} live, {status.overdue_clients} overdue, "
            f"{status.ended_clients} ended within a day, {status.lost_clients} lost within an hour",
            [
                ("host", _LEFT),
                ("process", _RIGHT),
                ("lease renewed", _RIGHT),
                ("lease left", _RIGHT),
                ("notifications", _LEFT),
                ("connections", _RIGHT),
                ("client", _LEFT),
            ],
            [
                (
                    _shown(client.host),
                    str(client.pid),
                    "unknown" if client.lease_age is None else f"{in_words(client.lease_age)} ago",
                    _left(client.lease_left),
                    "yes" if client.has_notifications else "no: polls",
                    "?" if client.connections is None else str(client.connections),
                    _shown(client.id),
                )
                for client in status.clients
            ],
        ),
        Section(
            f"Groups: {status.all_groups}, with {status.all_members} members",
            [("group", _LEFT), ("members", _RIGHT), ("addresses", _RIGHT)],
            [
                (_shown(group.name), str(group.members), str(group.addresses))
                for group in status.groups
            ],
        ),
        Section(
            f"Normal channels with a backlog: {status.all_channels}, "
            f"with {status.all_waiting} messages",
            [("channel", _LEFT), ("waiting", _RIGHT), ("oldest", _RIGHT)],
            [
                (_shown(channel.name), channel.fill, in_words(channel.oldest_age))
                for channel in status.channels
            ],
        ),
        Section(
            "Tables",
            [
                ("table", _LEFT),
                ("size", _RIGHT),
                ("indexes", _RIGHT),
                ("rows", _RIGHT),
                ("dead", _RIGHT),
            ],
            [
                (
                    table.name,
                    _in_bytes(table.size),
                    _in_bytes(table.index_size),
                    str(table.rows),
                    str(table.dead_rows),
                )
                for table in status.tables
            ],
        ),
    ]


def _left(lease_left: float | None) -> str:
    if lease_left is None:
        return "for ever"
    return in_words(lease_left) if lease_left > 0 else f"overdue for {in_words(-lease_left)}"


def plain(page: Page) -> str:
    """Return the content as plain text."""
    lines = [*page.headline, *page.facts]
    for section in page.sections:
        lines += ["", section.title]
        if not section.rows:
            continue
        table = [[name for name, _ in section.columns], *section.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            cells = [
                cell.rjust(width) if side == _RIGHT else cell.ljust(width)
                for cell, width, (_, side) in zip(row, widths, section.columns, strict=True)
            ]
            lines.append(f"  {'  '.join(cells)}".rstrip())
    return "\n".join(lines) + "\n"


def rich(page: Page, width: int, *, has_colours: bool) -> str:
    """Return the content as tables of this width. Raises `ImportError` without `rich`."""
    from rich.console import Console, Group, RenderableType
    from rich.table import Table
    from rich.text import Text

    style = "bold red" if page.problems else "bold green"
    parts: list[RenderableType] = [Text(line, style) for line in page.headline]
    parts += map(Text, page.facts)
    for section in page.sections:
        parts.append(Text(f"\n{section.title}", "bold"))
        if not section.rows:
            continue
        table = Table(header_style="dim")
        for name, side in section.columns:
            table.add_column(name, justify="right" if side == _RIGHT else "left", overflow="fold")
        for row in section.rows:
            table.add_row(*map(Text, row))
        parts.append(table)
    text = StringIO()
    # Without a height, rich ignores the width if TERM is "dumb", and takes 80 columns.
    console = Console(
        file=text, width=width, height=25, force_terminal=True, no_color=not has_colours
    )
    console.print(Group(*parts))
    return text.getvalue()


def _shown(text: str) -> str:
    """Return text from outside on one line and without control codes of terminals."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _in_bytes(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
