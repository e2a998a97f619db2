"""The announcement queue: announcements that are not dispatched yet, in one order.

See ``docs/protocols.md``, section 2. No I/O. Only the owner loop uses this module.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Container, Iterable, Iterator, Sequence
from itertools import chain, groupby
from operator import attrgetter, itemgetter

from pg_layer._messages.announcements import Messages, ToRead
from pg_layer._messages.rows import Key, KeyAt, Row, Span
from pg_layer._state.cursor import Cursor
from pg_layer._state.snapshot import Moment

MAX_ROWS = 100_000  # in the queue; a catch-up reads the rows beyond that
MAX_BYTES = 256 * 1024 * 1024
MAX_ASIDE = 20_000  # announcements during a catch-up, of at most 8,000 bytes each

_payload = attrgetter("payload")
_together = attrgetter("kind", "group", "excluded", "boot", "xid")


class Entry:
    """Rows that were announced together, and that are dispatched one after the other.

    ``span``: what must still be read. The rows that are here may be dispatched before that.
    ``is_late``: the rows are marked, and their announcement arrived after ``S`` had passed them, or
    never. Rows that were sent later may already be in the queue, or dispatched.
    """

    __slots__ = ("is_complete", "is_late", "rows", "span")

    def __init__(
        self, rows: Iterable[Row] = (), span: Span | None = None, *, is_late: bool = False
    ) -> None:
        self.rows = deque(rows)
        self.span = span
        self.is_complete = span is None
        self.is_late = is_late


class AnnouncementQueue:
    """The queue of entries, in the order in which they were heard.

    The queue asks the `Cursor` about each row once. It asks when the row is heard (`hear`), when a
    catch-up or a claim brings it (`append`), or when a waiting entry is read (`fill`). Rows that
    the cursor does not admit are dropped here, so a row that arrives twice is dispatched once.
    Nothing overtakes an entry whose rows must still be read.

    The queue knows three states:

    - Announcements are appended when they are heard.
    - During a catch-up (`begin_catch_up` to `end_catch_up`) they are kept aside. The
      catch-up appends its rows first, and the announcements are admitted after it.
    - The queue is incomplete: an announcement may have been missed, or there were too many.
      Nothing that is heard is appended until a catch-up has begun, which reads it all.
    """

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self._entries: deque[Entry] = deque()
        self._rows = 0
        self._bytes = 0
        self._unread = 0  # entries of which something must be read
        self._jobs: Counter[str] = Counter()  # by channel
        self._kept_aside: list[Messages | ToRead] | None = None  # heard during a catch-up
        self.is_incomplete = True
        self.is_over_limit = False  # incomplete because too much was heard: a catch-up is due

    def __len__(self) -> int:
        return len(self._entries)

    def restart(self) -> None:
        """Discard the catch-up of the last owner loop. Another one must follow."""
        self._kept_aside = None
        self.mark_incomplete()

    def mark_incomplete(self) -> None:
        """Append nothing that is heard before the next catch-up has begun.

        Announcements may have been missed, and nothing may overtake them. The catch-up reads all
        rows that are announced before it begins.
        """
        self.is_incomplete = True
        self._cursor.interrupt()

    # ------------------------------------------------------------------ hearing

    def hear(self, announcement: Messages | ToRead) -> None:
        """Append the new rows of an announcement.

        Ignore announcements of a boot before that of ``S``. The catch-up after the change of boot
        has read their rows, or they were lost with their server.
        """
        boot = (
            announcement.rows[0].boot
            if isinstance(announcement, Messages)
            else announcement.span.boot
        )
        if self.is_incomplete or self._cursor.has_passed_boot(boot):
            return
        if self._kept_aside is not None:
            if len(self._kept_aside) < MAX_ASIDE:
                self._kept_aside.append(announcement)
            else:
                self.is_incomplete = self.is_over_limit = True
        elif self._rows >= MAX_ROWS or self._bytes >= MAX_BYTES:
            self.is_over_limit = True
            self.mark_incomplete()
        elif isinstance(announcement, Messages):
            if fresh := self._cursor.admit_together(announcement.rows):
                is_late = fresh[0].marked and self._cursor.has_passed(
                    self._cursor.boot_of(fresh[0]), fresh[0].xid
                )
                self._push(Entry(fresh, is_late=is_late))
        else:
            self._append_span(announcement.span)

    def append(
        self,
        rows: Iterable[Row],
        joining: str | None = None,
        newly_joined: Container[str | None] = (),
    ) -> int:
        """Append rows that were read or claimed, except those that are not new.

        Return the number of new rows.
        ``joining``: the group whose first member the control message at the head adds.
        ``newly_joined``: groups whose first member was added a moment ago. Rows of these
        groups may be older than rows in the queue, so `merge` puts them in their places.
        """
        fresh = self._admit(rows)
        older = [
            row
            for row in fresh
            if row.group and (row.group == joining or row.group in newly_joined)
        ]
        self._append_except(fresh, older, is_late=False, behind_head=joining is not None)
        return len(fresh)

    def append_unannounced(
        self, rows: Iterable[Row], joining: str | None, newly_joined: Container[str | None]
    ) -> None:
        """Append new marked rows whose announcement did not arrive.

        Rows that were sent later may already be in the queue. If a transaction has sent a row to
        one of the groups (see `append` for them), `merge` puts all rows of the transaction in their
        places.
        """
        fresh = self._admit(rows)
        sent = {
            (row.boot, row.xid)
            for row in fresh
            if row.group and (row.group == joining or row.group in newly_joined)
        }
        older = [row for row in fresh if (row.boot, row.xid) in sent]
        self._append_except(fresh, older, is_late=True, behind_head=joining is not None)

    def _admit(self, rows: Iterable[Row]) -> list[Row]:
        admit = self._cursor.admit
        return [row for row in rows if admit(row.key, row.marked, row.expires_at)]

    def _append_except(
        self, rows: Sequence[Row], older: Sequence[Row], *, is_late: bool, behind_head: bool
    ) -> None:
        """Append rows, but `merge` those of them that are in ``older``."""
        keys = {row.key for row in older}
        entry = Entry((row for row in rows if row.key not in keys), is_late=is_late)
        if entry.rows:
            self._push(entry)
        if older:
            self.merge(older, behind_head=behind_head)

    def _append_span(self, span: Span) -> None:
        has_passed = self._cursor.has_passed(self._cursor.boot_of(span), span.xid)
        if not (
            self._cursor.has_searched_marked(span.boot, span.xid) if span.marked else has_passed
        ):
            self._entries.append(Entry(span=span, is_late=has_passed))
            self._unread += 1
            self._rows += 1

    def _push(self, entry: Entry) -> None:
        self._entries.append(entry)
        if jobs := [row.channel for row in entry.rows if row.is_job and row.channel]:
            self._jobs.update(jobs)
        self._rows += len(entry.rows)
        self._bytes += _size(entry.rows)

    # ------------------------------------------------------------------ reading

    def to_read(self, most: int) -> list[Entry]:
        """Return the first entries whose rows must be read, at most ``most``."""
        found: list[Entry] = []
        if not self._unread:
            return found
        for entry in self._entries:
            if not entry.is_complete:
                found.append(entry)
                if len(found) == most:
                    break
        return found

    def fill(self, entry: Entry, rows: Sequence[Row], *, is_all: bool) -> None:
        """Put rows that were read into the entry that waits for them.

        The rows are in the order of their ids. ``is_all``: the span has no more rows.
        Rows that an earlier answer has brought are ignored. A read may be repeated after its answer
        was lost, and an owner loop that has stopped may have received it.
        """
        span = entry.span
        if span is None or entry.is_complete:
            return  # complete already
        fresh = [
            row
            for row in rows
            if row.id >= span.first
            and self._cursor.admit_announced(row.key, row.marked, row.expires_at)
        ]
        entry.rows.extend(fresh)
        self._rows += len(fresh)
        self._bytes += _size(fresh)
        if is_all:
            entry.is_complete, entry.span = True, None
            self._unread -= 1
            self._rows -= 1
        elif rows:
            entry.span = span._replace(first=max(rows[-1].id + 1, span.first))

    # ------------------------------------------------------------------ dispatching

    def head(self) -> deque[Row] | None:
        """Return the next rows to dispatch, or None if none is ready.

        The caller pops the rows that it dispatches from the left, and calls `dispatched`.
        """
        entries = self._entries
        while entries:
            entry = entries[0]
            if entry.rows:
                return entry.rows
            if not entry.is_complete:
                return None
            entries.popleft()
        return None

    def pop_run(self) -> list[Row]:
        """Remove and return the first rows of the head that can be dispatched together.

        They are of one transaction, and messages for the same members of a group, or messages
        each for its own channel.
        """
        rows = self._entries[0].rows
        _, group = next(groupby(rows, _together))
        run = list(group)
        if len(run) == len(rows):
            rows.clear()
        else:
            for _ in run:
                rows.popleft()
        self.dispatched(run)
        return run

    def dispatched(self, rows: Sequence[Row]) -> None:
        """Note that these rows have been taken out of their entries."""
        if self._jobs:
            self._jobs.subtract(row.channel for row in rows if row.is_job and row.channel)
            self._jobs = +self._jobs
        self._rows -= len(rows)
        self._bytes -= _size(rows)

    def keys(self) -> list[Key]:
        """Return the keys of all rows in the queue."""
        return [row.key for entry in self._entries for row in entry.rows]

    def has_unread(self, moment: Moment) -> bool:
        """Return whether rows that this moment sees must still be read."""
        return any(
            entry.span is not None and moment.sees(self._cursor.boot_of(entry.span), entry.span.xid)
            for entry in self._entries
        )

    def absent_rows(self, address: str, rows: Sequence[Row]) -> list[Row]:
        """Return those rows at an address that the queue does not hold.

        It holds a row if an entry has it, or will have it in its place when its span has been
        read. Late entries do not count as its place.
        """
        queued = set(self.keys())
        spans = self._spans(entry for entry in self._entries if not entry.is_late)
        return [
            row
            for row in rows
            if row.key not in queued
            and not any(
                span.covers(address, row.key) for span in spans.get((row.boot, row.xid), ())
            )
        ]

    @staticmethod
    def _spans(entries: Iterable[Entry]) -> dict[tuple[int, int], list[Span]]:
        """Return what entries must still read, by transaction."""
        found: dict[tuple[int, int], list[Span]] = {}
        for entry in entries:
            if entry.span is not None:
                found.setdefault((entry.span.boot, entry.span.xid), []).append(entry.span)
        return found

    def holds_jobs(self, channel: str) -> bool:
        """Return whether the queue has jobs of a normal channel."""
        return channel in self._jobs

    def due_before_catch_up(self, rows: Iterable[Row], moment: Moment) -> list[Row]:
        """Return the rows to insert now; a paused catch-up appends the others.

        ``moment``: the snapshot of the catch-up, which begins again and appends its rows in
        the order of ids. It cannot bring a row that its snapshot sees and that precedes rows in the
        queue. It cannot bring a row that is not new any more. Jobs do not count for this: they are
        not in the order of ids.
        """
        ids = (row.id for entry in self._entries for row in entry.rows if not row.is_job)
        spans = (entry.span.last for entry in self._entries if entry.span is not None)
        last = max(chain(ids, spans), default=0)
        cursor = self._cursor
        return [
            row
            for row in rows
            if (row.id <= last and moment.sees(cursor.boot_of(row), row.xid))
            or not cursor.is_new(row.key, row.marked)
        ]

    @property
    def rows(self) -> int:
        """How many rows are in the queue, or must be read for it; a span counts as one."""
        return self._rows

    def insert_missed(self, address: str, missed: Sequence[Row]) -> None:
        """Insert the rows of a group that its first member has missed.

        They keep the order of each writer. A row that an entry has, or will have in its
        place, stays there. Late rows of the same transactions are moved to their places.
        """
        late = self.remove_late(missed)
        absent = [
            row
            for row in self.absent_rows(address, missed)
            if self._cursor.admit_announced(row.key, row.marked, row.expires_at)
        ]
        self.merge([*late, *absent])

    def merge(self, rows: Sequence[Row], *, behind_head: bool = False) -> None:
        """Insert rows between those in the queue, for a member that joined late.

        Each row takes its place by boot and id, but not before what its own transaction has
        sent earlier. Such a transaction is announced at its end, behind other transactions
        that have drawn larger ids in the meantime. The boot comes first, because a promoted
        standby may draw ids again that its predecessor has drawn.

        ``behind_head``: the first row in the queue is a control message that is being
        applied. It keeps its place.
        """
        head = self._take_head() if behind_head else None
        following, by_id = self._places(rows)
        boots = (row.boot for entry in self._entries for row in entry.rows if row.boot)
        boot = next(boots, self._cursor.latest_boot)
        merged: deque[Entry] = deque()
        for entry in self._entries:
            if entry.rows and (by_id or following):
                between: deque[Row] = deque()
                for row in entry.rows:
                    boot = row.boot or boot
                    between.extend(_pop_before(by_id, boot, row.id))
                    between.append(row)
                    between.extend(following.get(row.key, ()))
                entry.rows = between
            elif entry.span is not None:
                boot = entry.span.boot or boot
                if earlier := list(_pop_before(by_id, boot, entry.span.first)):
                    merged.append(Entry(earlier))
            merged.append(entry)
            if entry in following:
                merged.append(Entry(following[entry]))
        if by_id:
            merged.append(Entry(row for _, _, row in by_id))
        self._entries = merged
        self._put_head(head)
        self._rows += len(rows)
        self._bytes += _size(rows)

    def _places(
        self, rows: Sequence[Row]
    ) -> tuple[dict[Key | Entry, list[Row]], deque[tuple[int, int, Row]]]:
        """Return where `merge` must put rows.

        The first part: rows that follow a row or an entry of their own transaction. The
        second part: the other rows, with the boot and id by which they find their places.
        A row of boot 0 has the boot of the rows around it.
        """
        behind = self._sent_earlier(rows)
        following: dict[Key | Entry, list[Row]] = {}
        by_id: deque[tuple[int, int, Row]] = deque()
        ordered = sorted(rows, key=lambda row: row.id)
        boot = next((row.boot for row in ordered if row.boot), self._cursor.latest_boot)
        for row in ordered:
            boot = max(boot, row.boot)
            if (earlier := behind.get(row.key)) is not None:
                following.setdefault(earlier, []).append(row)
            else:
                by_id.append((boot, row.id, row))
        return following, by_id

    def _sent_earlier(self, rows: Iterable[Row]) -> dict[Key, Key | Entry]:
        """Return the last place in the queue that each row must not stand before.

        It is the last row, or entry to be read, that the row's own transaction has sent before
        the row. Late entries do not count: the row may belong before them.
        """
        # For each transaction the ids in the queue with their places, in the order of the queue.
        # An id is removed when a smaller one follows it, so that the remaining ids ascend.
        sent: dict[tuple[int, int], list[tuple[int, Key | Entry]]] = {
            (row.boot, row.xid): [] for row in rows
        }

        def add(boot: int, xid: int, id: int, place: Key | Entry) -> None:
            ids = sent.get((boot, xid))
            if ids is not None:
                while ids and ids[-1][0] > id:
                    ids.pop()
                ids.append((id, place))

        for entry in self._entries:
            if not entry.is_late:
                for row in entry.rows:
                    add(row.boot, row.xid, row.id, row.key)
                if (span := entry.span) is not None:
                    add(span.boot, span.xid, span.first, entry)
        found: dict[Key, Key | Entry] = {}
        for row in rows:
            ids = sent[row.boot, row.xid]
            if index := bisect_left(ids, row.id, key=itemgetter(0)):
                found[row.key] = ids[index - 1][1]
        return found

    def remove_late(self, rows: Iterable[Row]) -> list[Row]:
        """Remove and return the late rows of the transactions of these rows."""
        removed: list[Row] = []
        sent = {(row.boot, row.xid) for row in rows}
        for entry in self._entries:
            found = (
                [row for row in entry.rows if (row.boot, row.xid) in sent]
                if entry.is_late
                else None
            )
            if found:
                entry.rows = deque(row for row in entry.rows if (row.boot, row.xid) not in sent)
                removed += found
        self.dispatched(removed)
        return removed

    def _take_head(self) -> Row | None:
        rows = self.head()
        return None if rows is None else rows.popleft()

    def _put_head(self, row: Row | None) -> None:
        if row is not None:
            self._entries.appendleft(Entry((row,)))

    # ------------------------------------------------------------------ catching up

    def begin_catch_up(self) -> None:
        """Keep announcements aside from now on, until the catch-up has ended."""
        self._kept_aside = []
        self.is_incomplete = self.is_over_limit = False
        self._cursor.suspend()

    def keys_to_read(self, keys: Iterable[KeyAt]) -> list[KeyAt]:
        """Return those keys that a catch-up must read.

        They are new, and no entry of the queue will read them.
        """
        spans = self._spans(self._entries)
        return [
            at
            for at in keys
            if self._cursor.is_new(at.key, at.marked)
            and not any(
                span.covers(at.address, at.key) for span in spans.get((at.boot, at.xid), ())
            )
        ]

    def end_catch_up(self) -> None:
        """Handle the announcements kept aside: rows are appended, and ``S`` has moved."""
        aside, self._kept_aside = self._kept_aside or [], None
        is_incomplete, self.is_incomplete = self.is_incomplete, False
        self._cursor.resume()
        for announcement in aside:
            self.hear(announcement)
        if is_incomplete:
            self.mark_incomplete()

    def fail_catch_up(self) -> None:
        """Discard the announcements kept aside: the next catch-up reads their rows."""
        self._kept_aside = None
        self.mark_incomplete()


def _pop_before(rows: deque[tuple[int, int, Row]], boot: int, id: int) -> Iterator[Row]:
    """Remove the rows that belong before this boot and id, and yield them."""
    while rows and rows[0][:2] < (boot, id):
        yield rows.popleft()[2]


def _size(rows: Iterable[Row]) -> int:
    return sum(map(len, map(_payload, rows)))
