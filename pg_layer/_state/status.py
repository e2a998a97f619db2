"""The status of a layer by its tables, for `manage.py pg_layer_status`. No I/O.

Times are in seconds by the database's clock, sizes in bytes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

FIRST_SWEEP = 3600.0  # seconds after the first use, within which there need be no sweep
MAX_QUEUE_USAGE = 0.5  # of NOTIFY's queue; PostgreSQL refuses NOTIFY when all of it is used
LOST_FOR = 3600.0  # seconds for which a client that was swept with its lease counts as lost
DROPS = ("dropped_full", "dropped_expired", "dropped_undecodable", "refused_full")


MAX_NAMED = 10  # clients or channels that a problem names
LOST_TEXT = "The lease has expired: the process was killed, or is blocked, stopped or cut off."
POLLING_ADVICE = (
    "Notifications do not arrive. The log of the process gives the reason. Behind a connection"
    " pooler, CONFIG['listen_dsn'] must lead past it."
)


class Problem(NamedTuple):
    """A problem and the advice for it."""

    text: str
    advice: str

    def __str__(self) -> str:
        return f"{self.text} {self.advice}"


@dataclass(frozen=True)
class ClientStatus:
    """A client that has neither closed nor been swept.

    ``lease_age``: since its lease was renewed. ``lease_left``: until its lease expires; negative if
    it is overdue. Both are None if the lease never expires; the layer writes no such lease.
    ``connections``: None if they are unknown, because the user has set `application_name`.
    ``has_notifications``: False if it polls, because notifications do not arrive.
    """

    id: str
    host: str
    pid: int
    lease_age: float | None
    lease_left: float | None
    connections: int | None
    has_notifications: bool = True

    @property
    def process(self) -> str:
        return f"process {self.pid} on {self.host}"


@dataclass(frozen=True)
class GroupStatus:
    """A group: the number of its members and of their addresses (clients and normal channels)."""

    name: str
    members: int
    addresses: int


@dataclass(frozen=True)
class ChannelStatus:
    """A normal channel in which messages wait: their number and the age of the oldest.

    ``capacity``: how many may wait, by the options of this project.
    """

    name: str
    waiting: int
    oldest_age: float
    capacity: int

    @property
    def fill(self) -> str:
        return f"{self.waiting} of {self.capacity}"


@dataclass(frozen=True)
class TableStatus:
    """A table, shared by all prefixes. The numbers of rows are estimates of PostgreSQL."""

    name: str
    size: int
    index_size: int
    rows: int
    dead_rows: int


@dataclass(frozen=True, kw_only=True)
class Status:
    """The status of the layer of a prefix.

    The lists of clients, groups and channels are limited; the counts are complete.

    ``lost``: names of clients whose lease has expired and that were swept within `LOST_FOR`;
    ``lost_clients`` counts all of them. ``polling_clients``: live clients to
    which notifications do not arrive. ``full_channels``: normal channels at their capacity.
    ``drops``: messages that live clients have dropped or refused since their start, by reason.
    ``failing_tasks``: tasks of live clients that fail with an unexpected error, as of the last
    heartbeats. ``notify_queue_usage``: the used part of the server's NOTIFY queue, from 0 to 1.
    ``last_sweep_age``: since the last sweep ended; None if there was none. ``first_use_age``: since
    the first use of a layer that was never swept; None if it was swept or never used.
    ``role_problems``: privileges that the role lacks, and row-level security that applies to it.
    """

    clients: list[ClientStatus]
    live_clients: int
    overdue_clients: int
    ended_clients: int
    lost: list[str]
    lost_clients: int
    polling_clients: int
    groups: list[GroupStatus]
    all_groups: int
    all_members: int
    channels: list[ChannelStatus]
    all_channels: int
    all_waiting: int
    full_channels: list[ChannelStatus]
    drops: dict[str, int]
    failing_tasks: int
    tables: list[TableStatus]
    notify_queue_usage: float
    last_sweep_age: float | None
    first_use_age: float | None
    role_problems: list[Problem]

    def problems(self, sweep_age: float) -> list[str]:
        """Return a sentence for each problem. ``sweep_age``: the largest allowed age of a sweep."""
        problems = [str(problem) for problem in self.role_problems]
        if self.last_sweep_age is None:
            if (self.first_use_age or 0.0) > max(sweep_age, FIRST_SWEEP):
                problems.append("The tables have never been swept: run manage.py pg_layer_sweep.")
        elif self.last_sweep_age > sweep_age:
            problems.append(
                f"The last sweep was {in_words(self.last_sweep_age)} ago: "
                "run manage.py pg_layer_sweep."
            )
        if self.overdue_clients:
            overdue = [
                client.process
                for client in self.clients
                if client.lease_left is not None and client.lease_left <= 0
            ]
            problems.append(f"Overdue leases: {_named(overdue, self.overdue_clients)}.")
        if self.lost_clients:
            problems.append(
                f"Clients lost within {in_words(LOST_FOR)}: {_named(self.lost, self.lost_clients)}."
                f" {LOST_TEXT}"
            )
        if self.polling_clients:
            polling = [client.process for client in self.clients if not client.has_notifications]
            problems.append(
                f"Without notifications, and polling: {_named(polling, self.polling_clients)}."
                f" {POLLING_ADVICE}"
            )
        if self.full_channels:
            full = [f"{each.name} ({each.fill})" for each in self.full_channels[:MAX_NAMED]]
            problems.append(
                f"Full normal channels: {_named(full, len(self.full_channels))}. Start more"
                " workers, or raise capacity or channel_capacity."
            )
        if self.failing_tasks:
            problems.append(
                f"Failing tasks of live clients: {self.failing_tasks}. See the processes' logs."
            )
        if self.notify_queue_usage > MAX_QUEUE_USAGE:
            problems.append(
                f"{self.notify_queue_usage:.0%} of NOTIFY's queue is used: "
                "a session that listens has been in a transaction for a long time."
            )
        return problems

    def as_dict(self, sweep_age: float) -> dict[str, Any]:
        """Return the status and its problems in types that JSON supports."""
        problems = self.problems(sweep_age)
        return {
            "ok": not problems,
            "problems": problems,
            "clients": {
                "live": self.live_clients,
                "overdue": self.overdue_clients,
                "ended": self.ended_clients,
                "lost": self.lost_clients,
                "polling": self.polling_clients,
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


def _named(names: list[str], count: int) -> str:
    """Return a number of things with the names of some."""
    more = ["..."] if len(names) < count else []
    return f"{count} ({', '.join([*names, *more])})"


def in_words(seconds: float) -> str:
    """Return a duration in its one or two largest units: "7 s", "2 min 5 s", "3 d 4 h"."""
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
