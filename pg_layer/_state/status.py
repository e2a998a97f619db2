"""How a layer fares, as its tables tell: what `manage.py pg_layer_status` shows. No I/O.

Times are in seconds, by the database's clock; sizes in bytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

FULL_QUEUE = 0.5  # of NOTIFY's queue; when all of it is used, PostgreSQL refuses NOTIFY
DROPS = ("dropped_full", "dropped_expired", "dropped_undecodable", "refused_full")


class Problem(NamedTuple):
    """What is wrong, and what to do."""

    text: str
    advice: str

    def __str__(self) -> str:
        return f"{self.text} {self.advice}"


@dataclass(frozen=True)
class ClientStatus:
    """A client that has neither closed nor been swept.

    ``lease_age``: since its lease was renewed. ``lease_left``: until its lease expires; negative if it is
    overdue. Both None if it never expires, which is not the layer's doing. ``connections``: None if they
    cannot be told apart, because their `application_name` is the user's.
    """

    id: str
    host: str
    pid: int
    lease_age: float | None
    lease_left: float | None
    connections: int | None


@dataclass(frozen=True)
class GroupStatus:
    """A group: how many members, and at how many addresses (clients and normal channels)."""

    name: str
    members: int
    addresses: int


@dataclass(frozen=True)
class ChannelStatus:
    """A normal channel in which messages wait: how many, and since when the oldest does."""

    name: str
    waiting: int
    oldest_age: float


@dataclass(frozen=True)
class TableStatus:
    """A table of the layer's, which it shares with those of other prefixes; rows as PostgreSQL estimates."""

    name: str
    size: int
    index_size: int
    rows: int
    dead_rows: int


@dataclass(frozen=True, kw_only=True)
class Status:
    """How the layer of a prefix fares. Of clients, groups and channels it holds the first ones, and counts.

    ``drops``: messages that live clients have dropped or refused since their start, by the reason.
    ``failing_tasks``: of live clients, as of their last heartbeat: what an unexpected error keeps from work.
    ``notify_queue_usage``: how much of the server's NOTIFY queue is used, from 0 to 1. ``last_sweep_age``: since the
    last one ended; None: there was none. ``role_problems``: what keeps the role from the rows.
    """

    clients: list[ClientStatus]
    live_clients: int
    overdue_clients: int
    ended_clients: int
    groups: list[GroupStatus]
    all_groups: int
    all_members: int
    channels: list[ChannelStatus]
    all_channels: int
    all_waiting: int
    drops: dict[str, int]
    failing_tasks: int
    tables: list[TableStatus]
    notify_queue_usage: float
    last_sweep_age: float | None
    role_problems: list[Problem]

    def problems(self, sweep_age: float) -> list[str]:
        """What is not well, in words. ``sweep_age``: how old the last sweep may be."""
        problems = [str(problem) for problem in self.role_problems]
        if self.last_sweep_age is None:
            problems.append("There was no sweep yet: run manage.py pg_layer_sweep.")
        elif self.last_sweep_age > sweep_age:
            problems.append(
                f"The last sweep was {in_words(self.last_sweep_age)} ago: run manage.py pg_layer_sweep."
            )
        if self.overdue_clients:
            overdue = [
                client
                for client in self.clients
                if client.lease_left is not None and client.lease_left <= 0
            ]
            names = [f"process {client.pid} on {client.host}" for client in overdue]
            if len(names) < self.overdue_clients:
                names.append("...")
            problems.append(
                f"Leases that are overdue: {self.overdue_clients} ({', '.join(names)})."
            )
        if self.failing_tasks:
            problems.append(
                f"Tasks of live clients that fail: {self.failing_tasks}. The processes' logs say why."
            )
        if self.notify_queue_usage > FULL_QUEUE:
            problems.append(
                f"{self.notify_queue_usage:.0%} of NOTIFY's queue is used: "
                "a session that listens has been in a transaction for long."
            )
        return problems

    def as_dict(self, sweep_age: float) -> dict[str, Any]:
        """All of it in plain types, with the problems."""
        problems = self.problems(sweep_age)
        return {
            "ok": not problems,
            "problems": problems,
            "clients": {
                "live": self.live_clients,
                "overdue": self.overdue_clients,
                "ended": self.ended_clients,
                "list": [asdict(client) for client in self.clients],
            },
            "groups": {
                "count": self.all_groups,
                "members": self.all_members,
                "list": [asdict(group) for group in self.groups],
            },
            "channels": {
                "count": self.all_channels,
                "waiting": self.all_waiting,
                "list": [asdict(channel) for channel in self.channels],
            },
            "drops": self.drops,
            "failing_tasks": self.failing_tasks,
            "tables": [asdict(table) for table in self.tables],
            "notify_queue_usage": self.notify_queue_usage,
            "last_sweep_age": self.last_sweep_age,
        }


def in_words(seconds: float) -> str:
    """A time in the one or two units that matter: "7 s", "2 min 5 s", "3 d 4 h"."""
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    left = max(round(seconds), 0)
    parts = []
    for name, size in units:
        count, left = divmod(left, size)
        parts.append((count, name))
    first = next((index for index, (count, _) in enumerate(parts) if count), len(parts) - 1)
    return " ".join(
        f"{count} {name}" for count, name in parts[first : first + 2] if count or name == "s"
    )
