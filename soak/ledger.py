"""What became of every message: pure computation over what the processes wrote down. No I/O.

Times are those of ``time.monotonic()``, which all processes of one machine share.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

Kind = Literal["specific", "group", "normal", "single"]
Outcome = Literal["returned", "refused", "unknown"]

KINDS: tuple[Kind, ...] = ("specific", "group", "normal", "single")
ORDERED = ("specific", "group", "single")  # several workers on one channel promise no order

LAZY = 1.0  # seconds before a crash of the server of which commits may be lost
LONG = 0.3  # seconds: a fault that takes longer keeps messages from coming
RESTORE_MOST = 30.0  # seconds after a crash until a client has put its memberships back
TAKEN_MOST = 35  # jobs that a killed worker may hold: 31 ahead, two waited for, two not yet written down


# ---------------------------------------------------------------------- what processes write down


class Begun(NamedTuple):
    """A writer is about to send its message number ``n``. Writers await each send before the next."""

    at: float
    writer: str
    n: int
    kind: Kind
    stream: str


class Ended(NamedTuple):
    """That send has ended."""

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


class Joined(NamedTuple):
    """It has returned."""

    at: float
    group: str
    channel: str


class Leaving(NamedTuple):
    """group_discard is about to be called, until it succeeds."""

    at: float
    group: str
    channel: str


class Failed(NamedTuple):
    """It has raised, and is tried again: the member hears no more from here on, whatever becomes of it."""

    at: float
    group: str
    channel: str


class Left(NamedTuple):
    """It has returned."""

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


class Crash(NamedTuple):
    """The server crashed, between these times."""

    at: float
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
    | Failed
    | Left
    | Cancelled
    | Complaint
    | Fault
    | Crash
    | Gone
)

_RECORDS: dict[str, Any] = {
    record.__name__: record
    for record in (
        *(Begun, Ended, Opened, Closed, Got, Joining, Joined, Leaving, Failed, Left),
        *(Cancelled, Complaint, Fault, Crash, Gone),
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


# ---------------------------------------------------------------------- what is made of it


class Message(NamedTuple):
    """A message that somebody sent, or tried to."""

    begun: Begun
    ended: float  # infinity: the sender ended before the call did
    outcome: Outcome

    @property
    def key(self) -> tuple[str, int]:
        """What identifies it."""
        return (self.begun.writer, self.begun.n)


@dataclass
class Stay:
    """A channel in a group: surely from ``joined`` to ``leaving``, perhaps from ``joining`` to ``left``."""

    channel: str
    by: str  # the process that has it join
    joining: float
    joined: float = math.inf
    leaving: float = math.inf
    left: float = math.inf
    has_failed: bool = False  # its leaving, at first


@dataclass
class Reading:
    """A specific channel and who reads it."""

    process: str
    until: float = math.inf
    was_killed: bool = False
    got: list[Got] = field(default_factory=list)
    last_of: dict[str, int] = field(default_factory=dict)  # writer -> its last message that was received here


@dataclass
class Tally:
    """What became of one kind of stream. What is lost is counted by its cause, per reader."""

    returned: int = 0
    unknown: int = 0
    refused: int = 0
    delivered: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    twice: int = 0
    disordered: int = 0
    early: int = 0  # sent to a group before joining it: a client that connects anew promises no better
    uninvited: int = 0  # refused, sent to somebody else, or to a group after leaving it

    @property
    def is_clean(self) -> bool:
        """Whether nothing happened that must not."""
        is_lost = any(self.lost[cause] for cause in NOT_ALLOWED)
        return not (is_lost or self.twice or self.disordered or self.uninvited)


CRASH = "crash"
UNDONE_JOIN = "undone join"
KILLED = "kill -9"
LEFT = "reader left"
IN_DOUBT = "left in doubt"  # group_discard failed, or the server crashed, before what was sent had been read
FORGOTTEN = "LEFT GROUP"  # sent before group_discard was called, and not read by then
UNEXPLAINED = "UNEXPLAINED"
CAUSES = (CRASH, UNDONE_JOIN, KILLED, LEFT, IN_DOUBT, FORGOTTEN, UNEXPLAINED)
NOT_ALLOWED = (FORGOTTEN, UNEXPLAINED)


@dataclass
class Ledger:
    """The result."""

    tallies: dict[Kind, Tally]
    faults: list[Fault]
    complaints: list[str]
    cancelled: int
    joins: int
    offences: list[str]  # what must not have happened, one line each
    first: dict[str, list[float]]  # by kind of fault: seconds until anything came through
    all_back: dict[str, list[float]]  # and until every reader had something

    @property
    def is_clean(self) -> bool:
        """Whether the layer kept its promises."""
        return not self.complaints and all(tally.is_clean for tally in self.tallies.values())


def settle(books: Mapping[str, Iterable[Record]]) -> Ledger:
    """The ledger of these books, by process; who did what to whom is in any of them."""
    return _Settling(books).settle()


class _Settling:
    def __init__(self, books: Mapping[str, Iterable[Record]]) -> None:
        self.messages: dict[tuple[str, int], Message] = {}
        self.readings: dict[str, Reading] = {}
        self.stays: dict[str, list[Stay]] = defaultdict(list)  # by group
        self.jobs: dict[str, list[tuple[str, Got]]] = defaultdict(list)  # normal channel -> (process, got)
        self.faults: list[Fault] = []
        self.crashes: list[Crash] = []
        self.gone: dict[str, Gone] = {}
        self.tallies: dict[Kind, Tally] = {kind: Tally() for kind in KINDS}
        self.complaints: list[str] = []
        self.offences: list[str] = []
        self.cancelled = self.joins = 0
        self.streams: dict[Kind, set[str]] = defaultdict(set)
        for process, records in books.items():
            self._read(process, records)
        for reading in self.readings.values():
            gone = self.gone.get(reading.process)
            if gone is not None and gone.at < reading.until:
                reading.until, reading.was_killed = gone.at, gone.was_killed
        self.faults.sort()
        self.start = min((message.begun.at for message in self.messages.values()), default=0.0)

    def _read(self, process: str, records: Iterable[Record]) -> None:
        open_stays: dict[tuple[str, str], Stay] = {}
        for record in records:
            match record:
                case Begun():
                    self.messages[record.writer, record.n] = Message(record, math.inf, "unknown")
                    self.streams[record.kind].add(record.stream)
                case Ended():
                    key = (record.writer, record.n)
                    self.messages[key] = Message(self.messages[key].begun, record.at, record.outcome)
                case Opened():
                    self.readings[record.channel] = Reading(process)
                case Closed():
                    self.readings[record.channel].until = record.at
                case Got():
                    if record.channel in self.readings:
                        reading = self.readings[record.channel]
                        reading.got.append(record)
                        reading.last_of[record.writer] = max(record.n, reading.last_of.get(record.writer, 0))
                    else:
                        self.jobs[record.channel].append((process, record))
                case Joining():
                    stay = open_stays[record.group, record.channel] = Stay(record.channel, process, record.at)
                    self.stays[record.group].append(stay)
                    self.joins += 1
                case Joined():
                    open_stays[record.group, record.channel].joined = record.at
                case Leaving():
                    open_stays[record.group, record.channel].leaving = record.at
                case Failed():
                    open_stays[record.group, record.channel].has_failed = True
                case Left():
                    open_stays[record.group, record.channel].left = record.at
                case Cancelled():
                    self.cancelled += 1
                case Complaint():
                    self.complaints.append(f"{process}: {record.text}")
                case Fault():
                    self.faults.append(record)
                case Crash():
                    self.crashes.append(record)
                case Gone():
                    self.gone[record.process] = record

    def settle(self) -> Ledger:
        for message in self.messages.values():
            tally = self.tallies[message.begun.kind]
            setattr(tally, message.outcome, getattr(tally, message.outcome) + 1)
        received = self._look_at_channels()
        done = self._look_at_jobs()
        self._find_lost(received, done)
        first, all_back = self._recoveries()
        return Ledger(
            self.tallies,
            self.faults,
            self.complaints,
            self.cancelled,
            self.joins,
            self.offences,
            first,
            all_back,
        )

    # ------------------------------------------------------------------ what was delivered

    def _look_at_channels(self) -> dict[str, set[tuple[str, int]]]:
        """What specific channels received, whether for themselves or for their groups."""
        received: dict[str, set[tuple[str, int]]] = defaultdict(set)
        for channel, reading in self.readings.items():
            seen = received[channel]
            last: dict[str, int] = {}
            for got in reading.got:
                message = self._delivered(got, seen, reading.process)
                if message is None:
                    continue
                if not self._was_meant_for(message, channel):
                    if self._has_joined_since(message, got):
                        self.tallies[message.begun.kind].early += 1
                    else:
                        self._offend(message, f"came uninvited to {channel} of {reading.process}", got.at)
                        self.tallies[message.begun.kind].uninvited += 1
                self._keep_order(message, last, got, reading.process)
        return received

    def _look_at_jobs(self) -> dict[str, set[tuple[str, int]]]:
        """What the readers of normal channels received."""
        done: dict[str, set[tuple[str, int]]] = defaultdict(set)
        for channel, gots in self.jobs.items():
            last: dict[str, dict[str, int]] = defaultdict(dict)
            for process, got in sorted(gots, key=lambda entry: entry[1].at):
                message = self._delivered(got, done[channel], process)
                if message is None:
                    continue
                if message.begun.stream != channel:
                    self._offend(message, f"came uninvited to {channel}", got.at)
                    self.tallies[message.begun.kind].uninvited += 1
                if message.begun.kind in ORDERED:
                    self._keep_order(message, last[process], got, process)
        return done

    def _delivered(self, got: Got, seen: set[tuple[str, int]], process: str) -> Message | None:
        message = self.messages.get((got.writer, got.n))
        if message is None:
            raise ValueError(f"{got} was never sent.")
        tally = self.tallies[message.begun.kind]
        tally.delivered += 1
        if message.key in seen:
            tally.twice += 1
            self._offend(message, f"came twice, now to {process}", got.at)
            return None
        seen.add(message.key)
        if message.outcome == "refused":
            tally.uninvited += 1
            self._offend(message, f"was refused, and came to {process}", got.at)
        return message

    def _was_meant_for(self, message: Message, channel: str) -> bool:
        if message.begun.kind == "group":
            return any(
                stay.channel == channel and stay.joining <= message.ended and message.begun.at <= stay.left
                for stay in self.stays[message.begun.stream]
            )
        return message.begun.stream == channel

    def _has_joined_since(self, message: Message, got: Got) -> bool:
        return message.begun.kind == "group" and any(
            stay.channel == got.channel and message.ended < stay.joining < got.at
            for stay in self.stays[message.begun.stream]
        )

    def _keep_order(self, message: Message, last: dict[str, int], got: Got, process: str) -> None:
        # What was lost on the way to the server may get there at any later time.
        if message.outcome != "returned":
            return
        if got.n < last.get(got.writer, 0):
            self.tallies[message.begun.kind].disordered += 1
            self._offend(message, f"came to {process} after number {last[got.writer]}", got.at)
        else:
            last[got.writer] = got.n

    # ------------------------------------------------------------------ what was not

    def _find_lost(
        self, received: Mapping[str, set[tuple[str, int]]], done: Mapping[str, set[tuple[str, int]]]
    ) -> None:
        lost_jobs: dict[str, list[Message]] = defaultdict(list)
        for message in self.messages.values():
            if message.outcome != "returned":
                continue
            kind, stream = message.begun.kind, message.begun.stream
            if kind == "specific":
                reading = self.readings[stream]
                if message.begun.at < reading.until and message.key not in received[stream]:
                    self._lose(message, self._cause(message, reading), f"for {reading.process}")
            elif kind == "group":
                for stay in self.stays[stream]:
                    reading = self.readings[stay.channel]
                    if (
                        stay.joined <= message.begun.at
                        and message.ended <= min(stay.leaving, reading.until)
                        and message.key not in received[stay.channel]
                    ):
                        cause = self._cause(message, reading, stay)
                        self._lose(message, cause, f"for {stay.channel} of {reading.process}")
            elif message.key not in done.get(stream, ()):
                lost_jobs[stream].append(message)
        for messages in lost_jobs.values():
            self._find_lost_jobs(messages)

    def _cause(self, message: Message, reading: Reading, stay: Stay | None = None) -> str:
        has_later = reading.last_of.get(message.begun.writer, 0) > message.begun.n
        if reading.until < math.inf and not has_later:
            return KILLED if reading.was_killed else LEFT
        if stay is not None and self._left_in_doubt(message, reading, stay):
            return IN_DOUBT
        if self._fell_to_crash(message):
            return CRASH
        if stay is not None and self._join_was_undone(message, reading, stay):
            return UNDONE_JOIN
        if (
            stay is not None
            and stay.leaving < math.inf
            and not self._had_read_on(message, reading, stay.leaving)
        ):
            return FORGOTTEN
        return UNEXPLAINED

    def _left_in_doubt(self, message: Message, reading: Reading, stay: Stay) -> bool:
        """Whether what was not read by then was given up: group_discard failed, or ids may begin anew."""
        if stay.leaving == math.inf or self._had_read_on(message, reading, stay.leaving):
            return False
        return stay.has_failed or any(
            message.begun.at < crash.ended < stay.left + RESTORE_MOST
            and not self._had_read_on(message, reading, crash.at)
            for crash in self.crashes
        )

    def _had_read_on(self, message: Message, reading: Reading, until: float) -> bool:
        """Whether something that was sent later had been received before a moment."""
        return any(
            got.at < until and self.messages[got.writer, got.n].begun.at > message.ended
            for got in reading.got
        )

    def _fell_to_crash(self, message: Message) -> bool:
        return any(
            message.ended >= crash.at - LAZY and message.begun.at <= crash.ended for crash in self.crashes
        )

    def _join_was_undone(self, message: Message, reading: Reading, stay: Stay) -> bool:
        """Whether the joining was lost in a crash, and the client had not yet put it back.

        One that another process made is not put back: the client may not have heard of it.
        """
        for crash in self.crashes:
            if stay.joined >= crash.at - LAZY and stay.joining <= crash.ended:
                if stay.by != reading.process:
                    return True
                restored = min(
                    (
                        got.at
                        for got in reading.got
                        if self.messages[got.writer, got.n].begun.at > crash.ended
                        and self.messages[got.writer, got.n].begun.kind == "group"
                    ),
                    default=math.inf,
                )
                if message.begun.at <= min(restored, crash.ended + RESTORE_MOST):
                    return True
        return False

    def _find_lost_jobs(self, messages: list[Message]) -> None:
        """Each worker that was killed took some along, that were sent before."""
        readers = {process for process, _ in self.jobs[messages[0].begun.stream]}
        kills = sorted(gone.at for gone in self.gone.values() if gone.was_killed and gone.process in readers)
        room = [TAKEN_MOST] * len(kills)
        for message in sorted(messages, key=lambda message: message.begun.at):
            cause = UNEXPLAINED
            if self._fell_to_crash(message):
                cause = CRASH
            else:
                first = bisect_right(kills, message.begun.at)
                kill = next((index for index in range(first, len(kills)) if room[index]), None)
                if kill is not None:
                    room[kill] -= 1
                    cause = KILLED
            self._lose(message, cause, f"on {message.begun.stream}")

    def _lose(self, message: Message, cause: str, where: str) -> None:
        self.tallies[message.begun.kind].lost[cause] += 1
        if cause in NOT_ALLOWED:
            self._offend(message, f"was lost {where} ({cause})", message.ended)

    def _offend(self, message: Message, what: str, at: float) -> None:
        begun = message.begun
        near = [
            f"{fault.kind} {fault.at - self.start:.2f}-{fault.ended - self.start:.2f}"
            for fault in self.faults
            if begun.at - 15 < fault.ended and fault.at < at + 5
        ]
        self.offences.append(
            f"{begun.kind} {begun.writer}#{begun.n} to {begun.stream}, sent {begun.at - self.start:.3f}"
            f"-{message.ended - self.start:.3f} ({message.outcome}), {what} [{at - self.start:.3f}];"
            f" faults: {', '.join(near) or 'none'}"
        )

    # ------------------------------------------------------------------ how long it took

    def _recoveries(self) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        first: dict[str, list[float]] = defaultdict(list)
        all_back: dict[str, list[float]] = defaultdict(list)
        by_reader: dict[str, list[tuple[float, float]]] = defaultdict(list)  # (begun, got)
        for reading in self.readings.values():
            by_reader[reading.process] += [self._times(got) for got in reading.got]
        for gots in self.jobs.values():
            for process, got in gots:
                # Of those that compete, some get nothing for a while though they could.
                if self.messages[got.writer, got.n].begun.kind in ORDERED:
                    by_reader[process].append(self._times(got))
        for fault in self.faults:
            # What comes only after the next long fault has waited for that.
            until = min(
                (f.at for f in self.faults if f.at > fault.at and f.ended - f.at > LONG), default=math.inf
            )
            waits = [
                wait
                for times in by_reader.values()
                if times and min(times)[1] < fault.ended  # who began later has nothing to recover from
                if (wait := _wait(times, fault.ended)) is not None and fault.ended + wait < until
            ]
            if waits:
                first[fault.kind].append(min(waits))
                all_back[fault.kind].append(max(waits))
        return dict(first), dict(all_back)

    def _times(self, got: Got) -> tuple[float, float]:
        return self.messages[got.writer, got.n].begun.at, got.at


def _wait(times: Sequence[tuple[float, float]], since: float) -> float | None:
    """Seconds until the first message came that was sent after a moment."""
    return min((got - since for begun, got in times if begun >= since), default=None)
