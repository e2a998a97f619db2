"""The records that the processes of a soak write. No I/O.

All times are from ``time.monotonic()``, which all processes of one machine share.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

Kind = Literal["specific", "group", "normal", "single"]
# "unannounced": committed, and the process died before it could announce the message.
Outcome = Literal["returned", "refused", "unknown", "unannounced"]

KINDS: tuple[Kind, ...] = ("specific", "group", "normal", "single")
EVERY_PROCESS = ""


class Begun(NamedTuple):
    """A writer is about to send its message ``n``. A writer awaits each send before the next."""

    at: float
    writer: str
    n: int
    kind: Kind
    stream: str
    in_transaction: bool = False  # the commit, between ``at`` and ``Ended``, sends the message

    @property
    def process(self) -> str:
        """The process of the writer."""
        return self.writer.rpartition(".")[0]


class Ended(NamedTuple):
    """The send of message ``n``, or its transaction, has ended."""

    at: float
    writer: str
    n: int
    outcome: Outcome


class Opened(NamedTuple):
    """The process begins to read a specific channel."""

    at: float
    channel: str


class Closed(NamedTuple):
    """The process stops reading a specific channel."""

    at: float
    channel: str


class Got(NamedTuple):
    """The process received a message."""

    at: float
    channel: str
    writer: str
    n: int


class Joining(NamedTuple):
    """The process is about to call ``group_add`` until it succeeds."""

    at: float
    group: str
    channel: str
    in_transaction: bool = False


class Joined(NamedTuple):
    """``group_add``, or the commit of its transaction, has returned."""

    at: float
    group: str
    channel: str


class Leaving(NamedTuple):
    """The process is about to call ``group_discard`` until it succeeds."""

    at: float
    group: str
    channel: str
    in_transaction: bool = False


class Left(NamedTuple):
    """``group_discard``, or the commit of its transaction, has returned."""

    at: float
    group: str
    channel: str


class Undone(NamedTuple):
    """The transaction or savepoint of the last membership change was rolled back."""

    at: float
    group: str
    channel: str


class Cancelled(NamedTuple):
    """A ``receive()`` was cancelled."""

    at: float


class Complaint(NamedTuple):
    """An error in the log of a process."""

    at: float
    text: str


class Fault(NamedTuple):
    """A fault was injected from ``at`` to ``ended``."""

    at: float
    kind: str
    ended: float
    is_aside: bool = False  # it overlapped with other faults


class Away(NamedTuple):
    """A process may have lost its connections, or was stopped, between these times.

    At ``ended`` the process has noticed a lost connection. ``is_alone``: other processes could
    reach the database.
    """

    at: float
    ended: float
    process: str  # or EVERY_PROCESS
    is_alone: bool


class Crash(NamedTuple):
    """The server crashed between these times."""

    at: float
    ended: float


class Promotion(NamedTuple):
    """A lagging standby replaced the server.

    The standby has all that was committed before ``at`` and nothing that was committed after
    ``cut``. The old server ended before ``crashed``; the standby was promoted before ``ended``.
    """

    at: float
    cut: float
    crashed: float
    ended: float


class Gone(NamedTuple):
    """A process was killed or asked to end."""

    at: float
    process: str
    was_killed: bool


Record = (
    Begun
    | Ended
    | Opened
    | Closed
    | Got
    | Joining
    | Joined
    | Leaving
    | Left
    | Undone
    | Cancelled
    | Complaint
    | Fault
    | Away
    | Crash
    | Promotion
    | Gone
)

_RECORDS: dict[str, Any] = {
    record.__name__: record
    for record in (
        *(Begun, Ended, Opened, Closed, Got, Joining, Joined, Leaving, Left, Undone),
        *(Cancelled, Complaint, Fault, Away, Crash, Promotion, Gone),
    )
}


def encode(record: Record) -> bytes:
    """Return the line of a book for a record."""
    return json.dumps([type(record).__name__, *record], separators=(",", ":")).encode() + b"\n"


def decode(book: bytes) -> Iterator[Record]:
    """Yield the records of a book, without an unfinished last line of a killed process."""
    for line in book[: book.rfind(b"\n") + 1].splitlines():
        name, *values = json.loads(line)
        yield _RECORDS[name](*values)
