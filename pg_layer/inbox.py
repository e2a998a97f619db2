"""The receiving state machine: what was announced, read, dispatched and not yet surely deleted. No I/O.

Rows reach a client on three ways that overtake each other: alone inside a doorbell (the shortcut), by reading
a range of ids that doorbells announced, and by taking them from a normal channel. This class says of each row
whether it is to be dispatched now, so that every row is dispatched once and, for one writer, in order.

A row is identified by ``(id, nonce)``: after a failover to a standby that lagged the same ids are handed
out again, with other nonces. Order is by id.

The rules:

* A message inside a doorbell is dispatched at once only if no read is running or due. Otherwise it is one
  more announcement, and the read finds its row.
* A dispatched row is held until its deletion is sure, and no read that began before that is still running:
  such a read may have seen the row.
* A row that was read before its doorbell was heard is remembered by its nonce, and a message that then
  comes with that nonce is ignored. A ping rung after the read and heard shows that all earlier doorbells
  have been heard.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

Key = tuple[int, int]  # (id, nonce)

LAST_ID = 2**63 - 1


class Row(NamedTuple):
    """A row of ``pg_layer_message``; ``expires_at`` in seconds since 1970 by the database's clock."""

    id: int
    nonce: int
    kind: str
    channel: str | None
    group: str | None
    payload: bytes
    expires_at: float

    @property
    def key(self) -> Key:
        return (self.id, self.nonce)


class Span(NamedTuple):
    """Ids from ``first`` to ``last``, both included."""

    first: int
    last: int

    def cover(self, other: Span | None) -> Span:
        if other is None:
            return self
        return Span(min(self.first, other.first), max(self.last, other.last))


EVERYTHING = Span(0, LAST_ID)


class Inbox:
    """The state of one client's inbox. Not thread-safe: it lives on the home loop."""

    def __init__(self) -> None:
        self._due: Span | None = None
        self._reading: Span | None = None
        self._heard: set[int] = set()  # nonces of announcements whose rows are not all read
        self._heard_in_read: set[int] = set()
        self._held: set[Key] = set()
        self._early: dict[int, int] = {}  # nonce -> the number of pings rung when it was read
        self._pings = 0
        self._views = 0  # every read and take is a view of the table, numbered
        self._open_views: set[int] = set()
        self._settling: list[
            tuple[int, Key]
        ] = []  # deleted, but views up to this number may have seen the row

    # ------------------------------------------------------------------ doorbells

    def hear_message(self, id: int, nonce: int) -> bool:
        """A doorbell brought a message itself. True: dispatch it now. False: it was, or a read will."""
        if self._early.pop(nonce, None) is not None or (id, nonce) in self._held:
            return False
        if self._reading is not None or self._due is not None:
            self.hear_span(nonce, Span(id, id))
            return False
        self._held.add((id, nonce))
        return True

    def hear_span(self, nonce: int, span: Span) -> None:
        """A doorbell announced rows: a read of them is due."""
        self._early.pop(nonce, None)
        self._heard.add(nonce)
        self._due = span.cover(self._due)

    def suspect(self) -> None:
        """Doorbells may have been missed: a read of everything is due."""
        self._due = EVERYTHING

    def reconnected(self) -> None:
        """A new LISTEN connection begins: no doorbell of the old one will be heard any more."""
        self._early.clear()
        self._heard.clear()
        self.suspect()

    def ping(self) -> int:
        """Number a ping that is about to be rung."""
        self._pings += 1
        return self._pings

    def pong(self, ping: int) -> None:
        """That ping was heard, and so was every doorbell rung before it."""
        if self._early:
            self._early = {nonce: rung for nonce, rung in self._early.items() if rung >= ping}

    # ------------------------------------------------------------------ reading

    @property
    def is_due(self) -> bool:
        """Whether a read should begin now."""
        return self._due is not None and self._reading is None

    def begin_read(self) -> Span:
        """The span to read, in the order of ids. Ends with `end_read` or `fail_read`."""
        if self._due is None or self._reading is not None:
            raise RuntimeError("No read is due.")
        self._reading, self._due = self._due, None
        self._heard_in_read, self._heard = self._heard, set()
        self._open_read = self.begin_view()
        return self._reading

    def end_read(self, rows: Iterable[Row], *, read_up_to: int | None = None) -> list[Row]:
        """The read brought these rows; returns those to dispatch, in order.

        ``read_up_to``: the read stopped at this id because of a limit; None: it read its whole span.
        """
        reading, self._reading = self._reading, None
        assert reading is not None
        fresh = []
        for row in rows:
            if row.key in self._held:
                continue
            self._held.add(row.key)
            fresh.append(row)
            if row.nonce not in self._heard_in_read and row.nonce not in self._heard:
                self._early[row.nonce] = self._pings
        if read_up_to is not None and read_up_to < reading.last:
            self._heard |= self._heard_in_read
            self._due = Span(read_up_to + 1, reading.last).cover(self._due)
        self._heard_in_read = set()
        self.end_view(self._open_read)
        return fresh

    def fail_read(self) -> None:
        """The read failed: it is due again."""
        if self._reading is None:
            return
        self._due = self._reading.cover(self._due)
        self._reading = None
        self._heard |= self._heard_in_read
        self._heard_in_read = set()
        self.end_view(self._open_read)

    # ------------------------------------------------------------------ taking

    def begin_view(self) -> int:
        """A statement that returns rows of this inbox is about to run. Ends with `end_view`."""
        self._views += 1
        self._open_views.add(self._views)
        return self._views

    def taken(self, rows: Iterable[Row]) -> list[Row]:
        """Rows taken from a normal channel into this inbox; returns those to dispatch, sorted by id."""
        fresh = [row for row in sorted(rows) if row.key not in self._held]
        self._held.update(row.key for row in fresh)
        return fresh

    def end_view(self, view: int) -> None:
        """That statement has ended, and its rows were given to `taken` or `end_read`."""
        self._open_views.discard(view)
        if self._settling:
            oldest = min(self._open_views, default=self._views + 1)
            self._held.difference_update(key for seen, key in self._settling if seen < oldest)
            self._settling = [(seen, key) for seen, key in self._settling if seen >= oldest]

    # ------------------------------------------------------------------ deletion

    def deleted(self, keys: Collection[Key]) -> None:
        """These dispatched rows have surely left the inbox."""
        if self._open_views:
            newest = max(self._open_views)
            self._settling.extend((newest, key) for key in keys)
        else:
            self._held.difference_update(keys)

    @property
    def held(self) -> int:
        """How many rows are dispatched and not surely deleted."""
        return len(self._held)
