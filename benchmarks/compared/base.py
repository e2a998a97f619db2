"""Shared parts of the measurements: input, output, start and end."""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import psycopg

from benchmarks.board import Board
from benchmarks.compared.children import Child, Children, receive, send, sweep
from benchmarks.layers import LayerSpec
from benchmarks.resources import Processes, server_of
from benchmarks.statistics import percentile

Observer = psycopg.Connection[tuple[Any, ...]]

_TIMEOUT = 60.0
_TICK = 0.05


@dataclass(frozen=True)
class Setting:
    """The input of a measurement.

    ``dsn``: a new database with the tree's tables. ``seconds``: how long each part of a measurement
    sends. ``endurance``: the same for the endurance runs.
    """

    dsn: str
    seconds: float
    endurance: float


@dataclass(frozen=True)
class Reading:
    """One figure. ``what`` and ``unit`` together identify it within its measurement."""

    what: str
    unit: str
    value: float


@dataclass(frozen=True)
class Result:
    """The figures, and a series over time for the JSON file."""

    readings: Sequence[Reading]
    series: Sequence[dict[str, float]] = field(default_factory=list)


Measure = Callable[[Setting], Result]


class Room:
    """Receiving processes with members of one group, and a sending process.

    All of them are connected, and each member has received a message. ``observer`` is a connection
    of the measuring process.
    """

    def __init__(
        self,
        children: Children,
        observer: Observer,
        dsn: str,
        processes: int,
        members: int = 1,
        expiry: float = 60,
    ) -> None:
        self.board = Board(processes)
        self.observer = observer
        self.receivers: list[Child] = []
        for index in range(processes):
            self.receivers.append(children.start(receive, dsn, self.board, index, members))
        self.channels: list[str] = [
            name for receiver in self.receivers for name in receiver.receive()
        ]
        self.sender: Child = children.start(send, dsn, self.board, members, expiry)
        self.sender.receive()
        self._children = children
        self._server: Processes = server_of(LayerSpec("pg", dsn))
        self._expected = 0
        observer.execute("CHECKPOINT")

    def kill_receivers(self) -> None:
        """Kill the receiving processes and wait until their sessions have ended."""
        before = self._sessions()
        for receiver in self.receivers:
            receiver.kill()
        while self._sessions() > before - len(self.receivers):
            time.sleep(_TICK)

    def sent(self, deliveries: int) -> None:
        """Note that ``deliveries`` more deliveries must arrive."""
        self._expected += deliveries

    def sent_to_group(self, messages: int) -> None:
        self.sent(messages * len(self.channels))

    def missing(self, timeout: float = _TIMEOUT) -> list[Reading]:
        """Wait for all deliveries. Return a figure if too few or too many arrived."""
        end = time.monotonic() + timeout
        while self.board.deliveries < self._expected and time.monotonic() < end:
            time.sleep(_TICK)
        missing = self._expected - self.board.deliveries
        self._expected = self.board.deliveries
        if not missing:
            return []
        return [Reading("FAULT", "deliveries missing (negative: too many)", missing)]

    def ages(self) -> list[float]:
        """Return the ages, in milliseconds, of messages received since the last call."""
        found: list[float] = []
        for receiver in self.receivers:
            ages: array[int] = receiver.request("report")
            found += [age / 1e6 for age in ages]
        return found

    def wal(self) -> float:
        """Return the bytes of WAL that the server has written."""
        return self._number("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")

    def cpu(self) -> float:
        """Return the CPU seconds of all processes of the server."""
        return self._server.cpu()

    def table_megabytes(self) -> float:
        return self._number("SELECT pg_total_relation_size('pg_layer_message') / 1e6")

    def cost(self, meter: Callable[[], float], before: float, start: float, expiry: float) -> float:
        """Return what the meter counts from ``before`` until the last message is deleted.

        A layer deletes messages when they have been received or when they have expired. In the
        second case the time in which messages only wait does not count. ``start`` is the time of
        the first send on the monotonic clock.
        """
        end = time.monotonic() + expiry
        rows = -1.0
        while (now := self._rows()) and now != rows:  # received messages are deleted in batches
            rows = now
            time.sleep(1)
        cost = meter() - before
        if self._rows():
            _sleep_until(start + expiry)
            before = meter()
            _sleep_until(end + 1)
            give_up = end + _TIMEOUT
            while self._rows():
                if time.monotonic() > give_up:
                    raise TimeoutError("expired messages are not deleted")
                self._children.start(sweep).join()
            cost += meter() - before
        return cost

    def _sessions(self) -> float:
        query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        return self._number(query)

    def _rows(self) -> float:
        return self._number("SELECT count(*) FROM pg_layer_message")

    def _number(self, query: str) -> float:
        row = self.observer.execute(query.encode()).fetchone()
        return float(row[0]) if row else 0.0


@contextmanager
def open_room(dsn: str, processes: int, members: int = 1, expiry: float = 60) -> Iterator[Room]:
    """A `Room` whose processes are killed at the end."""
    with Children() as children, psycopg.connect(dsn, autocommit=True) as observer:
        yield Room(children, observer, dsn, processes, members, expiry)


def percentiles(what: str, ages: Iterable[float], *percents: int) -> list[Reading]:
    known = list(ages)
    return [Reading(what, f"p{percent}, ms", percentile(known, percent)) for percent in percents]


def _sleep_until(moment: float) -> None:
    time.sleep(max(0.0, moment - time.monotonic()))
