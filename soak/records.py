"""What the processes of a soak write down. No I/O.

Times are those of ``time.monotonic()``, which all processes of one machine share.
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
    """A writer is about to send its message ``n``. Writers await each send before the next."""

    at: float
    writer: str
    n: int
    kind: Kind
    stream: str
    in_transaction: bool = False  # the message is sent by the commit, between ``at`` and ``Ended``

    @property
    def process(self) -> str:
        """The process of the writer."""
        return self.writer.rpartition(".")[0]


class Ended(NamedTuple):
    """That send has ended; in a transaction: the transaction has."""

    at: float
    writer: str
    n: int
    outcome: Outcome


class Opened(NamedTuple):
    """A specific channel is read from now on."""

    at: float
    channel: str


class Closed(NamedTuple):
    """It is not read any more."""

    at: float
    channel: str


class Got(NamedTuple):
    """A message was received."""

    at: float
    channel: str
    writer: str
    n: int


class Joining(NamedTuple):
    """group_add is about to be called, until it succeeds."""

    at: float
    group: str
    channel: str
    in_transaction: bool = False


class Joined(NamedTuple):
    """It has returned; in a transaction: the commit has."""

    at: float
    group: str
    channel: str


class Leaving(NamedTuple):
    """group_discard is about to be called, until it succeeds."""

    at: float
    group: str
    channel: str
    in_transaction: bool = False


class Left(NamedTuple):
    """It has returned; in a transaction: the commit has."""

    at: float
    group: str
    channel: str


class Undone(NamedTuple):
    """The transaction (or savepoint) of the last group_add or group_discard was rolled back."""

    at: float
    group: str
    channel: str


class Cancelled(NamedTuple):
    """A receive() was cancelled."""

    at: float


class Complaint(NamedTuple):
    """An error in the log of a process."""

    at: float
    text: str


class Fault(NamedTuple):
    """Something was done to the system, from ``at`` on, and was over at ``ended``."""

    at: float
    kind: str
    ended: float
    is_aside: bool = False  # other faults went on meanwhile


class Away(NamedTuple):
    """A process may have lost its connections, or was stopped, between these times.

    ``ended`` is the time by which a lost connection has been noticed. ``is_alone``: the database
    was there for the other processes.
    """

    at: float
    ended: float
    process: str  # or EVERY_PROCESS
    is_alone: bool


class Crash(NamedTuple):
    """The server crashed, between these times."""

    at: float
    ended: float


class Promotion(NamedTuple):
    """A lagging standby took the place of the server.

    It has all that was committed before ``at`` and nothing that was committed after ``cut``. The
    old server ended by ``crashed``, and the standby was promoted by ``ended``.
    """

    at: float
    cut: float
    crashed: float
    ended: float


class Gone(NamedTuple):
    """A process was killed, or was asked to end."""

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
    """A line of a book."""
    return json.dumps([type(record).__name__, *record], separators=(",", ":")).encode() + b"\n"


def decode(book: bytes) -> Iterator[Record]:
    """The lines of a book. A last one that a killed process did not finish is left out."""
    for line in book[: book.rfind(b"\n") + 1].splitlines():
        name, *values = json.loads(line)
        yield _RECORDS[name](*values)
