"""The records of all processes, put together by message, channel and membership. No I/O."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from soak.group_order import Key
from soak.records import (
    Away,
    Begun,
    Cancelled,
    Closed,
    Complaint,
    Crash,
    Ended,
    Fault,
    Gone,
    Got,
    Joined,
    Joining,
    Leaving,
    Left,
    Opened,
    Outcome,
    Promotion,
    Record,
    Undone,
)


class Message(NamedTuple):
    """A message whose send began."""

    begun: Begun
    ended: float  # infinity if the sender ended before the call did
    outcome: Outcome

    @property
    def key(self) -> Key:
        """Return what identifies the message: its writer and number."""
        return (self.begun.writer, self.begun.n)


@dataclass
class Stay:
    """A membership of a channel in a group, from a join to the leave that follows it.

    The channel is certainly a member from ``joined`` to ``leaving`` and possibly a member from
    ``joining`` to ``left``.
    """

    group: str
    channel: str
    by: str  # the process that adds the channel to the group
    joining: float
    joined: float = math.inf
    leaving: float = math.inf
    left: float = math.inf
    joins_in_transaction: bool = False
    leaves_in_transaction: bool = False


@dataclass
class Reading:
    """A specific channel and the process that reads it."""

    channel: str
    process: str
    until: float = math.inf
    was_killed: bool = False
    got: list[Got] = field(default_factory=list)
    # writer -> the largest number of its messages that were received here
    last_of: dict[str, int] = field(default_factory=dict)


class History:
    """What the books of a run contain, by process. Faults may be in any book."""

    def __init__(self, books: Mapping[str, Iterable[Record]]) -> None:
        self.messages: dict[Key, Message] = {}
        self.readings: dict[str, Reading] = {}  # by specific channel
        self.stays: dict[str, list[Stay]] = defaultdict(list)  # by group
        self.jobs: dict[str, list[tuple[str, Got]]] = defaultdict(list)  # by normal channel
        self.faults: list[Fault] = []
        self.aways: list[Away] = []
        self.crashes: list[Crash] = []
        self.promotions: list[Promotion] = []
        self.gone: dict[str, Gone] = {}
        self.complaints: list[str] = []
        self.cancelled = 0
        self.joins = 0
        for process, records in books.items():
            self._read(process, records)
        for reading in self.readings.values():
            gone = self.gone.get(reading.process)
            if gone is not None and gone.at < reading.until:
                reading.until, reading.was_killed = gone.at, gone.was_killed
        self.faults.sort()

    def _read(self, process: str, records: Iterable[Record]) -> None:
        open_stays: dict[tuple[str, str], Stay] = {}
        for record in records:
            match record:
                case Begun() | Ended():
                    self._read_send(record)
                case Opened() | Closed() | Got() | Cancelled():
                    self._read_receive(process, record)
                case Joining() | Joined() | Leaving() | Left() | Undone():
                    self._read_membership(process, record, open_stays)
                case Complaint():
                    self.complaints.append(f"{process}: {record.text}")
                case _:
                    self._read_fault(record)

    def _read_send(self, record: Begun | Ended) -> None:
        key = (record.writer, record.n)
        if isinstance(record, Begun):
            self.messages[key] = Message(record, math.inf, "unknown")
        else:
            self.messages[key] = Message(self.messages[key].begun, record.at, record.outcome)

    def _read_receive(self, process: str, record: Opened | Closed | Got | Cancelled) -> None:
        match record:
            case Opened():
                self.readings[record.channel] = Reading(record.channel, process)
            case Closed():
                self.readings[record.channel].until = record.at
            case Got():
                reading = self.readings.get(record.channel)
                if reading is None:
                    self.jobs[record.channel].append((process, record))
                else:
                    reading.got.append(record)
                    last = reading.last_of.get(record.writer, 0)
                    reading.last_of[record.writer] = max(record.n, last)
            case Cancelled():
                self.cancelled += 1

    def _read_membership(
        self,
        process: str,
        record: Joining | Joined | Leaving | Left | Undone,
        open_stays: dict[tuple[str, str], Stay],
    ) -> None:
        member = (record.group, record.channel)
        match record:
            case Joining():
                stay = Stay(
                    record.group,
                    record.channel,
                    process,
                    record.at,
                    joins_in_transaction=record.in_transaction,
                )
                open_stays[member] = stay
                self.stays[record.group].append(stay)
                self.joins += 1
            case Joined():
                open_stays[member].joined = record.at
            case Leaving():
                stay = open_stays[member]
                stay.leaving, stay.leaves_in_transaction = record.at, record.in_transaction
            case Left():
                open_stays[member].left = record.at
            case Undone():
                stay = open_stays[member]
                if stay.leaving < math.inf:
                    stay.leaving = math.inf
                else:
                    self.stays[record.group].remove(stay)
                    del open_stays[member]

    def _read_fault(self, record: Fault | Away | Crash | Promotion | Gone) -> None:
        match record:
            case Fault():
                self.faults.append(record)
            case Away():
                self.aways.append(record)
            case Crash():
                self.crashes.append(record)
            case Promotion():
                self.promotions.append(record)
            case Gone():
                self.gone[record.process] = record
