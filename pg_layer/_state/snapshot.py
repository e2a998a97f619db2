"""PostgreSQL's snapshots: which transactions had been committed at a moment."""

from __future__ import annotations

from typing import NamedTuple


class Snapshot:
    """A snapshot as ``pg_current_snapshot()`` returns it: ``xmin:xmax:running,...``."""

    __slots__ = ("_running", "text", "xmax", "xmin")

    def __init__(self, text: str) -> None:
        xmin, xmax, running = text.split(":")
        self.text = text
        self.xmin = int(xmin)
        self.xmax = int(xmax)
        self._running = frozenset(map(int, running.split(","))) if running else frozenset()

    def __repr__(self) -> str:
        return f"Snapshot({self.text!r})"

    def sees(self, xid: int) -> bool:
        """Return whether a transaction had ended.

        If a row of it exists, the transaction had been committed.
        """
        return xid < self.xmin or (xid < self.xmax and xid not in self._running)


class Position(NamedTuple):
    """The largest id drawn so far. Transactions from ``next_xid`` on draw larger ids."""

    last_id: int
    next_xid: int


class Moment(NamedTuple):
    """A snapshot of a boot: what had been committed then."""

    boot: int
    snapshot: Snapshot

    def sees(self, boot: int, xid: int) -> bool:
        """Return whether a row had been committed.

        Not for a row of boot 0: `Cursor.boot_of` returns the boot to compare it with.
        """
        return self.snapshot.sees(xid) if boot == self.boot else boot < self.boot

    def is_later(self, before: Moment) -> bool:
        """Return whether this moment is later than another, or has the same snapshot."""
        if self.boot != before.boot:
            return self.boot > before.boot
        return (
            self.snapshot.xmin >= before.snapshot.xmin
            and self.snapshot.xmax >= before.snapshot.xmax
        )

    def covers(self, other: Moment) -> bool:
        """Return whether this moment certainly sees every row that another sees."""
        if self.boot != other.boot:
            return self.boot > other.boot
        return other.snapshot.xmax <= self.snapshot.xmin
