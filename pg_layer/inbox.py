"""The receiving state machine: what was announced, read, dispatched and not yet surely deleted. No I/O.

Rows reach a client on three ways that overtake each other: alone inside a doorbell (the shortcut), by
reading a range of ids that doorbells announced, and by taking them from a normal channel. This class says
of each row whether it is to be dispatched now, so that every row is dispatched once and, for one writer,
in order.

A row is identified by ``(id, nonce)``: after a failover to a standby that lagged the same ids are handed out
again, with other nonces. Order is by id.

The rules:

* A message inside a doorbell is dispatched at once only if no read is running or due. Otherwise it is one
  more announcement, and the read finds its row.
* A dispatched row is held until its deletion is sure, and no view of the table that was opened before is
  still open: it may have seen the row. Deleted rows are remembered a while longer, because deletions are
  committed lazily, and a server that crashes may bring the row back.
* A row that was read before its doorbell was heard is remembered by its nonce, and a message that then comes
  with that nonce is ignored. A ping rung after the read and heard shows that all earlier doorbells were
  heard.
* Ids are drawn before they commit, so that a span may hold rows of statements whose doorbells are still to
  come, and whose other rows lie outside it. A read of a span therefore dispatches only rows that were
  announced before it began. A read of everything dispatches all it sees, as it sees all of every statement:
  one snapshot, however many parts it comes in.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from enum import Enum, auto
from typing import NamedTuple

Key = tuple[int, int]  # (id, nonce)

LAST_ID = 2**63 - 1
RECENT_MOST = 100_000  # deleted rows after which they are forgotten sooner than by `age`


class Row(NamedTuple):
    """A row of ``pg_layer_message``; ``expires_at`` in seconds since 1970 by the database's clock.

    ``excluded``: the member of the group that is not to get it.
    """

    id: int
    nonce: int
    kind: str
    channel: str | None
    group: str | None
    payload: bytes
    expires_at: float
    excluded: str | None = None

    @property
    def key(self) -> Key:
        """What identifies the row."""
        return (self.id, self.nonce)

    @property
    def was_taken(self) -> bool:
        """Whether it was moved here from a normal channel, so that no doorbell of this inbox announced it."""
        return self.channel is not None and "!" not in self.channel


class Span(NamedTuple):
    """Ids from ``first`` to ``last``, both included."""

    first: int
    last: int

    def cover(self, other: Span | None) -> Span:
        """The smallest span that holds both."""
        if other is None:
            return self
        return Span(min(self.first, other.first), max(self.last, other.last))


EVERYTHING = Span(0, LAST_ID)


class _Way(Enum):
    """How a row left the inbox."""

    DELETED = auto()
    BACK = auto()
    PERHAPS_BACK = auto()


class Inbox:
    """The state of one client's inbox. Not thread-safe: it lives on the home loop."""

    def __init__(self) -> None:
        self._due: Span | None = None
        self._reading: Span | None = None
        self._heard: set[int] = set()  # nonces of announcements whose rows are not all read
        self._heard_in_read: set[int] = set()
        self._held: set[Key] = set()
        self._recent: set[Key] = set()  # deleted lately
        self._less_recent: set[Key] = set()
        self._early: dict[int, int] = {}  # nonce -> the number of pings rung when it was read
        self._pings = 0
        self._views = 0  # reads and takes are views of the table, numbered
        self._open_views: set[int] = set()
        self._read_view = 0
        # Rows that left the inbox, and how: views up to this number may have seen them.
        self._settling: list[tuple[int, Key, _Way]] = []
        self._seen_again: set[Key] = set()  # met while still held
        self._strays: list[Key] = []

    # ------------------------------------------------------------------ doorbells

    def hear_message(self, id: int, nonce: int) -> bool:
        """A doorbell brought a message itself. True: dispatch it now. False: it was, or a read will."""
        if self._early.pop(nonce, None) is not None or self._is_known((id, nonce)):
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
        """A new LISTEN connection is about to listen: no doorbell of the old one will be heard any more."""
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

    @property
    def is_suspect(self) -> bool:
        """Whether rows may lie here that nothing announced, until everything has been read."""
        return EVERYTHING in (self._due, self._reading)

    def begin_read(self) -> tuple[int, Span]:
        """The view and the span to read, in the order of ids. Ends with `end_read` or `fail_read`."""
        if self._due is None or self._reading is not None:
            raise RuntimeError("No read is due.")
        self._reading, self._due = self._due, None
        self._heard_in_read, self._heard = self._heard, set()
        self._read_view = self.begin_view()
        return self._read_view, self._reading

    def read(self, view: int, rows: Iterable[Row]) -> list[Row]:
        """The read brought these rows, in the order of ids; returns those to dispatch."""
        if not self._is_current(view):
            return []
        is_everything = self._reading == EVERYTHING
        fresh = []
        for row in rows:
            if self._is_known(row.key):
                self._meet_again(row.key)
                continue
            # One that was taken from a normal channel comes with the answer to that, after those before it.
            if row.was_taken or row.nonce not in self._heard_in_read:
                if not is_everything:
                    continue
                if not row.was_taken and row.nonce not in self._heard:
                    self._early[row.nonce] = self._pings
            self._held.add(row.key)
            fresh.append(row)
        return fresh

    def end_read(self, view: int, up_to: int = LAST_ID) -> None:
        """The read has ended; its rows were given to `read`. ``up_to``: the id at which a limit cut it."""
        if not self._is_current(view):
            return
        reading, self._reading = self._reading, None
        if reading is not None and up_to < reading.last:
            self._heard |= self._heard_in_read
            self._due = Span(up_to + 1, reading.last).cover(self._due)
        self._heard_in_read = set()
        self.end_view(view)

    def _is_current(self, view: int) -> bool:
        # If not, the read was abandoned, and another has done it.
        return self._reading is not None and view == self._read_view

    def fail_read(self, view: int) -> None:
        """The read failed: it is due again."""
        if not self._is_current(view) or self._reading is None:
            return
        self._due = self._reading.cover(self._due)
        self._reading = None
        self._heard |= self._heard_in_read
        self._heard_in_read = set()
        self.end_view(view)

    def abandon_views(self) -> None:
        """The loop that read and took is gone: nothing it began will end, and what it had not read is due."""
        self.fail_read(self._read_view)
        self.suspect()
        for view in list(self._open_views):
            self.end_view(view)

    # ------------------------------------------------------------------ taking

    def begin_view(self) -> int:
        """A statement that returns rows of this inbox is about to run. Ends with `end_view`."""
        self._views += 1
        self._open_views.add(self._views)
        return self._views

    def taken(self, rows: Iterable[Row]) -> list[Row]:
        """Rows taken from a normal channel into this inbox; returns those to dispatch, sorted by id."""
        fresh = []
        going_back = {key for _, key, way in self._settling if way is _Way.BACK}
        for row in sorted(rows):
            if row.key in going_back:  # it was back, and is here anew
                self._settling = [entry for entry in self._settling if entry[1] != row.key]
                self._seen_again.discard(row.key)
                fresh.append(row)
            elif self._is_known(row.key):
                self._meet_again(row.key)
            else:
                self._held.add(row.key)
                fresh.append(row)
        return fresh

    def end_view(self, view: int) -> None:
        """That statement has ended, and its rows were given to `taken` or `end_read`."""
        self._open_views.discard(view)
        if self._settling:
            oldest = min(self._open_views, default=self._views + 1)
            settling, self._settling = self._settling, []
            for last_view, key, way in settling:
                if last_view < oldest:
                    self._let_go(key, way)
                else:
                    self._settling.append((last_view, key, way))

    # ------------------------------------------------------------------ what leaves the inbox

    def deleted(self, keys: Collection[Key]) -> None:
        """These dispatched rows have surely been deleted."""
        self._leave(keys, _Way.DELETED)

    def put_back(self, keys: Collection[Key], *, is_sure: bool = True) -> None:
        """These taken rows have gone back; if that is not sure, a read is to find what has not."""
        self._leave(keys, _Way.BACK if is_sure else _Way.PERHAPS_BACK)

    def pop_strays(self) -> list[Key]:
        """Deleted rows that a crash of the server brought back, or may have: to be deleted once more."""
        strays, self._strays = self._strays, []
        return strays

    def age(self) -> None:
        """The server has not crashed for a while: forget what was deleted two whiles ago."""
        self._recent, self._less_recent = set(), self._recent

    @property
    def is_crowded(self) -> bool:
        """Whether so many deleted rows are remembered that a shorter while has to do."""
        return len(self._recent) >= RECENT_MOST

    @property
    def held(self) -> int:
        """How many rows are dispatched and not surely gone."""
        return len(self._held)

    def _meet_again(self, key: Key) -> None:
        if key in self._held:
            self._seen_again.add(key)
        else:
            self._held.add(key)
            self._strays.append(key)

    def _is_known(self, key: Key) -> bool:
        return key in self._held or key in self._recent or key in self._less_recent

    def _leave(self, keys: Collection[Key], way: _Way) -> None:
        if way is _Way.DELETED:
            self._seen_again.difference_update(keys)  # before it was deleted: that is no wonder
        if self._open_views:
            newest = max(self._open_views)
            self._settling.extend((newest, key, way) for key in keys)
            return
        for key in keys:
            self._let_go(key, way)

    def _let_go(self, key: Key, way: _Way) -> None:
        is_seen_again = key in self._seen_again
        self._seen_again.discard(key)
        if way is _Way.DELETED and is_seen_again:
            # By a view that was opened before, or because a crash of the server has undone the deletion.
            self._strays.append(key)
            return
        self._held.discard(key)
        if way is _Way.DELETED:
            self._recent.add(key)
        elif is_seen_again:
            # Put back, and met before that was known: it may be here again, and nobody has dispatched it.
            # Suspect, so that nothing is taken before that is known: it would overtake.
            self.suspect()
