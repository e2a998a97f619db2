"""Marked rows that this process must announce: see ``docs/protocols.md``, section 3."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Sequence

from pg_layer._db.queries.send import Unannounced

MOST_ROWS = 10_000  # receivers find the marked rows beyond it within two heartbeats
MOST_BYTES = 64 * 1024 * 1024
PART = 500  # rows that one statement announces


class Announcer:
    """A memory of marked rows that are not announced yet. Thread-safe.

    A layer has one announcer in a process: each of its writes announces these rows first.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rows: deque[Unannounced] = deque()
        self._bytes = 0

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, rows: Iterable[Unannounced]) -> None:
        """Remember rows. Beyond `MOST_ROWS` or `MOST_BYTES`, forget the oldest rows."""
        with self._lock:
            for row in rows:
                self._rows.append(row)
                self._bytes += len(row.payload)
            while len(self._rows) > MOST_ROWS or (self._bytes > MOST_BYTES and len(self._rows) > 1):
                self._forget_first()

    def _forget_first(self) -> None:
        self._bytes -= len(self._rows.popleft().payload)

    def first(self) -> list[Unannounced]:
        """Return the oldest rows, at most `PART`."""
        with self._lock:
            return [row for row, _ in zip(self._rows, range(PART), strict=False)]

    def announced(self, rows: Sequence[Unannounced]) -> None:
        """Forget rows that were announced."""
        ids = {(row.boot, row.xid, row.id) for row in rows}
        with self._lock:
            while self._rows and self._rows[0][:3] in ids:
                self._forget_first()
