"""The announcement queue: what was heard and is not dispatched yet, in one order.

See ``docs/protocols.md``, section 2. Pure; used by the owner loop only.
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

MAX_ROWS = 100_000  # in the queue; beyond it a catch-up brings what follows
MAX_BYTES = 256 * 1024 * 1024
MAX_ASIDE = 20_000  # notifications, of at most 8,000 bytes each

_payload = attrgetter("payload")
_together = attrgetter("kind", "group", "excluded", "boot", "xid")


class Entry:
    """Rows that are dispatched one after the other, once they are all there or the first are.

    ``is_late``: they are marked, and were announced when ``S`` had passed them. A catch-up may have brought
    control messages that were sent later.
    """

    __slots__ = ("is_complete", "is_late", "rows", "span")

    def __init__(self, rows: Iterable[Row] = (), span: Span | None = None) -> None:
        self.rows = deque(rows)
        self.span = span  # what remains to be read
        self.is_complete = span is None
        self.is_late = False


class AnnouncementQueue:
    """Entries in the order in which they were heard."""

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self._entries: deque[Entry] = deque()
        self._rows = 0
        self._bytes = 0
        self._unread = 0  # entries of which something must be read
        self._jobs: Counter[str] = Counter()  # by channel
        self._kept_aside: list[Messages | ToRead] | None = None  # heard during a catch-up
        self.is_incomplete = True  # nothing more is appended until a catch-up has begun
        self.is_over_limit = False  # that is so because too much was heard: a catch-up is due

    def __len__(self) -> int:
        return len(self._entries)

    def restart(self) -> None:
        """Another loop goes on: forget what the last one had begun. A catch-up must follow."""
        self._kept_aside = None
        self.mark_incomplete()

    def mark_incomplete(self) -> None:
        """Announcements may be missed from here on, and nothing may overtake them.

        Whatever is heard before the next catch-up begins, that one brings.
        """
        self.is_incomplete = True
        self._cursor.interrupt()

    # ------------------------------------------------------------------ hearing

    def hear(self, announcement: Messages | ToRead) -> None:
        """Append what is new of an announcement.

        Of a server that has gone nothing is, once a catch-up at its successor has ended.
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
                entry = Entry(fresh)
                entry.is_late = fresh[0].marked and self._cursor.has_passed(
                    self._cursor.boot_of(fresh[0]), fresh[0].xid
                )
                self._push(entry)
        else:
            self._append_span(announcement.span)

    def append(
        self,
        rows: Iterable[Row],
        joining: str | None = None,
        newly_joined: Container[str | None] = (),
    ) -> int:
        """Append rows that are here, without those that are not new. Return how many are.

        ``joining``: a group whose first member is being added by the control message at the head.
        ``newly_joined``: groups that are listened to since a moment ago. Their rows may be older than others that
        are here: see `merge`.
        """
        fresh = self._admit(rows)
        older = [
            row
            for row in fresh
            if row.group and (row.group == joining or row.group in newly_joined)
        ]
        self._append_but(fresh, older, Entry(), behind_head=joining is not None)
        return len(fresh)

    def append_unannounced(
        self, rows: Iterable[Row], joining: str | None, newly_joined: Container[str | None]
    ) -> None:
        """The same for marked rows that were not announced in time.

        What was sent later may be here. So all that the same transactions have sent takes its place with the
        rows of those groups.
        """
        fresh = self._admit(rows)
        sent = {
            (row.boot, row.xid)
            for row in fresh
            if row.group and (row.group == joining or row.group in newly_joined)
        }
        older = [row for row in fresh if (row.boot, row.xid) in sent]
        entry = Entry()
        entry.is_late = True
        self._append_but(fresh, older, entry, behind_head=joining is not None)

    def _admit(self, rows: Iterable[Row]) -> list[Row]:
        admit = self._cursor.admit
        return [row for row in rows if admit(row.key, row.marked, row.expires_at)]

    def _append_but(
        self, rows: Sequence[Row], older: Sequence[Row], entry: Entry, *, behind_head: bool
    ) -> None:
        keys = {row.key for row in older}
        entry.rows.extend(row for row in rows if row.key not in keys)
        if entry.rows:
            self._push(entry)
        if older:
            self.merge(older, behind_head=behind_head)

    def _append_span(self, span: Span) -> None:
        has_passed = self._cursor.has_passed(self._cursor.boot_of(span), span.xid)
        if not (
            self._cursor.has_searched_marked(span.boot, span.xid) if span.marked else has_passed
        ):
            entry = Entry(span=span)
            entry.is_late = has_passed
            self._entries.append(entry)
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
        """The first entries whose rows must be read."""
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
        """The read brought these rows of an entry, in the order of ids; ``is_all``: and there are no more."""
        span = entry.span
        if span is None or entry.is_complete:
            return  # read by another loop before
        # A read that was repeated brings the first rows again.
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
        """The rows that come next; dispatched ones are popped from the left. None: none is ready."""
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
        """Remove the first rows of the head that go together.

        They are messages of one transaction, for the same members of a group or each for its channel.
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
        """These rows of the head have left the queue."""
        if self._jobs:
            self._jobs.subtract(row.channel for row in rows if row.is_job and row.channel)
            self._jobs = +self._jobs
        self._rows -= len(rows)
        self._bytes -= _size(rows)

    def keys(self) -> list[Key]:
        """The keys of the rows that are here."""
        return [row.key for entry in self._entries for row in entry.rows]

    def has_unread(self, moment: Moment) -> bool:
        """Whether rows that this moment sees must still be read."""
        return any(
            entry.span is not None and moment.sees(self._cursor.boot_of(entry.span), entry.span.xid)
            for entry in self._entries
        )

    def absent_rows(self, address: str, rows: Sequence[Row]) -> list[Row]:
        """Those rows at an address that no entry has, or will bring in their places."""
        held = set(self.keys())
        spans = self._spans(entry for entry in self._entries if not entry.is_late)
        return [
            row
            for row in rows
            if row.key not in held
            and not any(
                span.covers(address, row.key) for span in spans.get((row.boot, row.xid), ())
            )
        ]

    @staticmethod
    def _spans(entries: Iterable[Entry]) -> dict[tuple[int, int], list[Span]]:
        """What entries have still to read, by transaction."""
        found: dict[tuple[int, int], list[Span]] = {}
        for entry in entries:
            if entry.span is not None:
                found.setdefault((entry.span.boot, entry.span.xid), []).append(entry.span)
        return found

    def holds_jobs(self, channel: str) -> bool:
        """Whether jobs of a normal channel are here."""
        return channel in self._jobs

    def due_before_catch_up(self, rows: Iterable[Row], moment: Moment) -> list[Row]:
        """Those that a catch-up at this moment would put before rows that are here, or would not bring.

        Jobs that are here do not count, which are not in the order of ids.
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
        """How many rows are here."""
        return self._rows

    def insert_missed(self, address: str, missed: Sequence[Row]) -> None:
        """Put what the first member of a group has missed between what is here, in the order of each writer.

        What an entry has, or will bring in its place, stays there.
        """
        withdrawn = self.remove_late(missed)
        brought = [
            row
            for row in self.absent_rows(address, missed)
            if self._cursor.admit_announced(row.key, row.marked, row.expires_at)
        ]
        self.merge([*withdrawn, *brought])

    def merge(self, rows: Sequence[Row], *, behind_head: bool = False) -> None:
        """Put rows between those that are here: an `add` brings them to its member.

        Each takes its place by its id, but not before what its own transaction has sent earlier, which is
        announced at its end, behind others that drew larger ids meanwhile.
        A promoted standby may draw ids again that its predecessor has drawn: a later boot comes later.
        ``behind_head``: the first row is a control message that is being applied, and keeps its place.
        """
        head = self._take_head() if behind_head else None
        behind = self._sent_earlier(rows)
        # A row of boot 0 is of the boot of the rows around it.
        ordered = sorted(rows, key=lambda row: row.id)
        boot = next((row.boot for row in ordered if row.boot), self._cursor.latest_boot)
        rest: deque[tuple[int, int, Row]] = deque()
        following: dict[Key | Entry, list[Row]] = {}
        for row in ordered:
            boot = max(boot, row.boot)
            if (earlier := behind.get(row.key)) is not None:
                following.setdefault(earlier, []).append(row)
            else:
                rest.append((boot, row.id, row))

        def before(boot: int, id: int) -> Iterator[Row]:
            while rest and rest[0][:2] < (boot, id):
                yield rest.popleft()[2]

        here = (row.boot for entry in self._entries for row in entry.rows if row.boot)
        boot = next(here, self._cursor.latest_boot)
        merged: deque[Entry] = deque()
        for entry in self._entries:
            if entry.rows and (rest or following):
                between: deque[Row] = deque()
                for row in entry.rows:
                    boot = row.boot or boot
                    between.extend(before(boot, row.id))
                    between.append(row)
                    between.extend(following.get(row.key, ()))
                entry.rows = between
            elif entry.span is not None:
                boot = entry.span.boot or boot
                if earlier_rows := list(before(boot, entry.span.first)):
                    merged.append(Entry(earlier_rows))
            merged.append(entry)
            if entry in following:
                merged.append(Entry(following[entry]))
        if rest:
            merged.append(Entry(row for _, _, row in rest))
        self._entries = merged
        self._put_head(head)
        self._rows += len(rows)
        self._bytes += _size(rows)

    def _sent_earlier(self, rows: Iterable[Row]) -> dict[Key, Key | Entry]:
        """What is here last of that which the transactions of these rows have sent before them.

        Not what came late, before whose place the rows may belong.
        """
        # For each transaction the ids that are here, without those before which a smaller one stands.
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
        """Remove what came late of the transactions of these rows, and return it."""
        withdrawn: list[Row] = []
        sent = {(row.boot, row.xid) for row in rows}
        for entry in self._entries:
            found = (
                [row for row in entry.rows if (row.boot, row.xid) in sent]
                if entry.is_late
                else None
            )
            if found:
                entry.rows = deque(row for row in entry.rows if (row.boot, row.xid) not in sent)
                withdrawn += found
        self.dispatched(withdrawn)
        return withdrawn

    def _take_head(self) -> Row | None:
        rows = self.head()
        return None if rows is None else rows.popleft()

    def _put_head(self, row: Row | None) -> None:
        if row is not None:
            self._entries.appendleft(Entry((row,)))

    # ------------------------------------------------------------------ catching up

    def begin_catch_up(self) -> None:
        """From here on announcements are kept aside, and judged when the catch-up has ended."""
        self._kept_aside = []
        self.is_incomplete = self.is_over_limit = False
        self._cursor.suspend()

    def keys_to_read(self, keys: Iterable[KeyAt]) -> list[KeyAt]:
        """Those that are new, and that no entry of the queue will bring."""
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
        """The catch-up has appended its rows, and the cursor has moved."""
        aside, self._kept_aside = self._kept_aside or [], None
        is_incomplete, self.is_incomplete = self.is_incomplete, False
        self._cursor.resume()
        for announcement in aside:
            self.hear(announcement)
        if is_incomplete:
            self.mark_incomplete()

    def fail_catch_up(self) -> None:
        """The catch-up has failed: the next one brings what was kept aside."""
        self._kept_aside = None
        self.mark_incomplete()


def _size(rows: Iterable[Row]) -> int:
    return sum(map(len, map(_payload, rows)))
