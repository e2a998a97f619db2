"""The receiving state machine: a model of the database beside it, and every order in which things can happen.

`World` is the model: a table, a sequence, a queue of NOTIFYs, other processes. It drives the machine as
`pg_layer.receiver` does, with each statement cut into its begin, the moment at which it takes effect and the
moment at which its answer arrives. Which of all that comes next is drawn by Hypothesis, byte by byte.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from pg_layer import inbox as inbox_module
from pg_layer.inbox import EVERYTHING, LAST_ID, Inbox, Key, Row, Span

SPECIFIC = "specific.0a1b!1"
NORMAL = "jobs"
FOREVER = 1e12


def row(id: int, nonce: int | None = None, channel: str | None = SPECIFIC) -> Row:
    group = "group" if channel is None else None
    return Row(id, id if nonce is None else nonce, "message", channel, group, b"{}", FOREVER)


# --- The rules, one by one


def connected() -> Inbox:
    """A machine that listens, has read everything there was, and heard every doorbell."""
    inbox = Inbox()
    inbox.reconnected()
    assert read(inbox, []) == []
    assert not inbox.is_due
    return inbox


def read(inbox: Inbox, rows: list[Row]) -> list[int]:
    """Read what is due; the ids of what is to be dispatched."""
    view, _ = inbox.begin_read()
    fresh = inbox.read(view, rows)
    inbox.end_read(view)
    return [one.id for one in fresh]


def span_due(inbox: Inbox) -> Span:
    """What is due to be read; the read is begun, and fails."""
    view, span = inbox.begin_read()
    inbox.fail_read(view)
    return span


def test_spans_cover_each_other() -> None:
    assert Span(3, 5).cover(None) == Span(3, 5)
    assert Span(3, 5).cover(Span(9, 12)) == Span(9, 12).cover(Span(3, 5)) == Span(3, 12)
    assert Span(3, 5).cover(EVERYTHING) == EVERYTHING == Span(0, LAST_ID)


def test_a_row_is_known_by_its_id_and_its_nonce() -> None:
    assert row(7, 13).key == (7, 13)
    assert row(7, channel=NORMAL).was_taken
    assert not row(7, channel=SPECIFIC).was_taken
    assert not row(7, channel=None).was_taken


def test_a_message_in_a_doorbell_is_dispatched_at_once_on_a_quiet_inbox() -> None:
    inbox = connected()
    assert inbox.hear_message(5, 500)
    assert not inbox.is_due
    assert inbox.held == 1


def test_a_message_in_a_doorbell_waits_for_a_read_that_is_due() -> None:
    inbox = connected()
    inbox.hear_span(300, Span(3, 4))
    assert not inbox.hear_message(5, 500)
    assert span_due(inbox) == Span(3, 5)
    assert read(inbox, [row(3, 300), row(4, 300), row(5, 500)]) == [3, 4, 5]
    assert inbox.hear_message(6, 600)


def test_a_message_in_a_doorbell_waits_for_a_read_that_runs() -> None:
    inbox = connected()
    inbox.hear_span(300, Span(3, 4))
    view, _ = inbox.begin_read()
    assert not inbox.hear_message(5, 500)
    assert not inbox.is_due  # not before this one has ended
    assert inbox.read(view, [row(3, 300), row(4, 300)]) == [row(3, 300), row(4, 300)]
    inbox.end_read(view)
    assert span_due(inbox) == Span(5, 5)
    assert read(inbox, [row(5, 500)]) == [5]


def test_before_the_first_connection_nothing_is_dispatched_ahead_of_what_waits() -> None:
    inbox = Inbox()
    inbox.reconnected()
    assert inbox.is_due
    assert not inbox.hear_message(5, 500)
    assert read(inbox, [row(4, 400), row(5, 500)]) == [4, 5]


def test_only_what_is_due_is_read() -> None:
    inbox = connected()
    with pytest.raises(RuntimeError):
        inbox.begin_read()
    inbox.suspect()
    inbox.begin_read()
    inbox.suspect()
    with pytest.raises(RuntimeError):
        inbox.begin_read()


def test_a_row_read_before_its_doorbell_is_heard_is_not_dispatched_again() -> None:
    inbox = connected()
    inbox.suspect()
    assert read(inbox, [row(5, 500)]) == [5]
    inbox.deleted([(5, 500)])
    inbox.age()
    inbox.age()
    assert not inbox.hear_message(5, 500)
    assert not inbox.is_due


def test_a_ping_rung_after_the_read_shows_that_all_doorbells_before_were_heard() -> None:
    inbox = connected()
    earlier = inbox.ping()
    inbox.suspect()
    assert read(inbox, [row(5, 500)]) == [5]
    later = inbox.ping()
    inbox.deleted([(5, 500)])
    inbox.age()
    inbox.age()
    inbox.pong(earlier)  # the doorbell of 5 may still be on its way
    assert not inbox.hear_message(5, 500)
    inbox.suspect()
    assert read(inbox, [row(6, 600)]) == [6]
    inbox.deleted([(6, 600)])
    inbox.age()
    inbox.age()
    inbox.pong(later)
    assert not inbox.hear_message(6, 600)
    last = inbox.ping()
    inbox.pong(last)
    assert _state(inbox) == _state(connected())


def test_a_span_holds_only_what_was_announced() -> None:
    # One statement drew 3, 4, 7 and has committed, unheard; another announced 5 to 9.
    inbox = connected()
    inbox.hear_span(900, Span(5, 9))
    assert read(inbox, [row(5, 900), row(7, 300), row(9, 900)]) == [5, 9]
    inbox.hear_span(300, Span(3, 7))
    assert read(inbox, [row(3, 300), row(4, 300), row(5, 900), row(7, 300)]) == [3, 4, 7]


def test_what_is_announced_while_a_read_runs_is_for_the_next() -> None:
    # A transaction of 3 and 7: the read may have seen both, and asked for one of them only.
    inbox = connected()
    inbox.hear_span(900, Span(5, 9))
    view, _ = inbox.begin_read()
    assert not inbox.hear_message(3, 300)
    assert not inbox.hear_message(7, 700)
    assert inbox.read(view, [row(5, 900), row(7, 700), row(9, 900)]) == [row(5, 900), row(9, 900)]
    inbox.end_read(view)
    assert span_due(inbox) == Span(3, 7)
    assert read(inbox, [row(3, 300), row(5, 900), row(7, 700)]) == [3, 7]


def test_a_span_that_a_limit_cut_short_goes_on() -> None:
    inbox = connected()
    inbox.hear_span(300, Span(3, 8))
    view, _ = inbox.begin_read()
    assert inbox.read(view, [row(3, 300), row(4, 300)]) == [row(3, 300), row(4, 300)]
    assert not inbox.hear_message(9, 900)
    inbox.end_read(view, up_to=4)
    assert span_due(inbox) == Span(5, 9)
    assert read(inbox, [row(8, 300), row(9, 900)]) == [8, 9]
    assert not inbox.is_due


def test_a_span_read_up_to_its_end_is_done() -> None:
    inbox = connected()
    inbox.hear_span(300, Span(3, 4))
    view, _ = inbox.begin_read()
    inbox.read(view, [row(3, 300), row(4, 300)])
    inbox.end_read(view, up_to=4)
    assert not inbox.is_due


def test_everything_is_read_in_parts() -> None:
    inbox = connected()
    inbox.suspect()
    view, span = inbox.begin_read()
    assert span == EVERYTHING
    assert inbox.read(view, [row(3), row(4)]) == [row(3), row(4)]
    assert not inbox.hear_message(9, 900)
    assert inbox.read(view, [row(5)]) == [row(5)]
    inbox.end_read(view)
    assert span_due(inbox) == Span(9, 9)


def test_a_failed_read_is_due_again_together_with_what_came_meanwhile() -> None:
    inbox = connected()
    inbox.hear_span(300, Span(3, 4))
    view, _ = inbox.begin_read()
    inbox.hear_span(800, Span(8, 9))
    inbox.fail_read(view)
    assert span_due(inbox) == Span(3, 9)
    assert read(inbox, [row(3, 300), row(8, 800)]) == [3, 8]


def test_a_held_row_is_skipped_until_it_is_surely_deleted() -> None:
    inbox = connected()
    assert inbox.hear_message(5, 500)
    inbox.suspect()
    assert read(inbox, [row(5, 500)]) == []
    assert inbox.held == 1
    inbox.deleted([(5, 500)])
    assert inbox.held == 0


def test_a_view_opened_before_the_deletion_was_sure_may_have_seen_the_row() -> None:
    inbox = connected()
    assert inbox.hear_message(5, 500)
    inbox.suspect()
    view, _ = inbox.begin_read()
    inbox.deleted([(5, 500)])
    inbox.age()
    inbox.age()
    later = inbox.begin_view()
    assert inbox.read(view, [row(5, 500)]) == []
    assert inbox.held == 1
    inbox.end_read(view)
    inbox.deleted(inbox.pop_strays())  # it may be deleted once more, to be sure
    inbox.end_view(later)
    assert inbox.held == 0


def test_a_deletion_that_settles_while_a_crash_undoes_it_is_done_again() -> None:
    inbox = connected()
    assert inbox.hear_message(5, 500)
    inbox.suspect()
    view, _ = inbox.begin_read()
    inbox.deleted([(5, 500)])
    # The server crashes; the read is tried again, and sees the row that is back.
    assert inbox.read(view, [row(5, 500)]) == []
    inbox.end_read(view)
    assert inbox.pop_strays() == [(5, 500)]
    for _ in range(3):
        inbox.age()
        inbox.suspect()
        assert read(inbox, [row(5, 500)]) == []
    inbox.deleted([(5, 500)])
    assert inbox.held == 0


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_every_view_that_was_open_must_end_before_a_row_is_forgotten(order: tuple[int, int]) -> None:
    inbox = connected()
    job = row(5, channel=NORMAL)
    assert inbox.taken([job]) == [job]
    views = [inbox.begin_view(), inbox.begin_view()]
    inbox.put_back([job.key])
    later = inbox.begin_view()
    for which in order:
        assert inbox.held == 1
        inbox.end_view(views[which])
    assert inbox.held == 0
    inbox.end_view(later)


def test_a_view_that_is_opened_and_ended_meanwhile_changes_nothing() -> None:
    inbox = connected()
    job = row(5, channel=NORMAL)
    assert inbox.taken([job]) == [job]
    view = inbox.begin_view()
    inbox.put_back([job.key])
    inbox.end_view(inbox.begin_view())
    assert inbox.held == 1
    inbox.end_view(view)
    assert inbox.held == 0


def test_a_message_that_is_heard_twice_is_dispatched_once() -> None:
    inbox = connected()
    assert inbox.hear_message(5, 500)
    assert not inbox.hear_message(5, 500)
    inbox.deleted([(5, 500)])
    assert not inbox.hear_message(5, 500)
    assert not inbox.is_due


def test_the_same_id_with_another_nonce_is_another_row() -> None:
    inbox = connected()
    assert inbox.hear_message(5, 500)
    inbox.reconnected()
    assert read(inbox, [row(5, 501)]) == [5]
    inbox.deleted([(5, 500)])
    assert inbox.held == 1
    assert inbox.hear_message(6, 600)


def test_a_deleted_row_that_a_crash_brings_back_is_deleted_again_and_not_dispatched() -> None:
    inbox = connected()
    assert inbox.hear_message(5, 500)
    inbox.deleted([(5, 500)])
    inbox.age()
    for _ in range(5):
        inbox.reconnected()
        assert read(inbox, [row(5, 500)]) == []
        inbox.age()
    assert inbox.pop_strays() == [(5, 500)]
    assert inbox.pop_strays() == []
    inbox.deleted([(5, 500)])
    inbox.age()
    inbox.age()
    assert _state(inbox) == _state(connected())


def test_many_deleted_rows_crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "RECENT_MOST", 3)
    inbox = connected()
    inbox.deleted([(1, 1), (2, 2)])
    assert not inbox.is_crowded
    inbox.deleted([(3, 3)])
    assert inbox.is_crowded
    inbox.age()
    assert not inbox.is_crowded


def test_taken_rows_are_dispatched_by_id_and_once() -> None:
    inbox = connected()
    view = inbox.begin_view()
    taken = [row(id, channel=NORMAL) for id in (7, 5, 6)]
    assert [one.id for one in inbox.taken(taken)] == [5, 6, 7]
    inbox.end_view(view)
    inbox.suspect()
    assert read(inbox, sorted(taken)) == []


def test_rows_whose_taking_was_not_answered_are_found_by_reading() -> None:
    inbox = connected()
    view = inbox.begin_view()
    inbox.suspect()
    assert inbox.taken([]) == []
    inbox.end_view(view)
    taken = row(5, channel=NORMAL)
    assert read(inbox, [taken]) == [5]
    # No doorbell of this inbox announces it: the same statement's may be for another row.
    assert inbox.hear_message(4, taken.nonce)


def test_a_taken_row_whose_statement_announced_another_waits_for_the_answer_to_the_taking() -> None:
    inbox = connected()
    view = inbox.begin_view()
    older, taken = row(4, channel=NORMAL), row(6, channel=NORMAL)
    inbox.hear_span(taken.nonce, Span(5, 5))
    inbox.hear_span(7, Span(7, 7))
    assert read(inbox, [row(5, taken.nonce), taken, row(7, 7)]) == [5, 7]
    assert [one.id for one in inbox.taken([taken, older])] == [4, 6]
    inbox.end_view(view)


def test_rows_that_a_read_sees_before_the_taking_is_answered_are_dispatched_once() -> None:
    inbox = connected()
    view = inbox.begin_view()
    taken = [row(5, channel=NORMAL)]
    inbox.suspect()
    assert read(inbox, taken) == [5]
    inbox.deleted([taken[0].key])
    assert inbox.taken(taken) == []
    inbox.end_view(view)
    inbox.deleted(inbox.pop_strays())  # it may be deleted once more, to be sure
    assert inbox.held == 0
    assert not inbox.is_due


def test_a_row_put_back_and_taken_again_while_it_settles_is_dispatched_at_once() -> None:
    inbox = connected()
    job = row(5, channel=NORMAL)
    assert inbox.taken([job]) == [job]
    view = inbox.begin_view()
    inbox.put_back([job.key])
    assert inbox.taken([job]) == [job]
    inbox.end_view(view)
    assert inbox.held == 1
    assert not inbox.is_due
    inbox.deleted([job.key])
    assert inbox.held == 0


def test_a_row_whose_putting_back_failed_is_dispatched_again() -> None:
    inbox = connected()
    job = row(5, channel=NORMAL)
    assert inbox.taken([job]) == [job]
    view = inbox.begin_view()
    inbox.suspect()
    inbox.put_back([job.key], is_sure=False)
    assert read(inbox, [job]) == []  # that view may have been opened before
    inbox.end_view(view)
    assert read(inbox, [job]) == [5]


def test_a_row_whose_putting_back_failed_is_not_taken_for_one_taken_anew() -> None:
    inbox = connected()
    job = row(5, channel=NORMAL)
    view = inbox.begin_view()
    inbox.suspect()
    assert read(inbox, [job]) == [5]  # before the answer to the taking
    inbox.put_back([job.key], is_sure=False)
    assert inbox.taken([job]) == []
    inbox.end_view(view)
    assert read(inbox, [job]) == [5]


def test_a_row_that_was_put_back_can_be_taken_again() -> None:
    inbox = connected()
    job = row(5, channel=NORMAL)
    for _ in range(3):
        assert inbox.taken([job]) == [job]
        inbox.put_back([job.key])
    assert _state(inbox) == _state(connected())


def test_on_a_new_connection_no_old_doorbell_is_waited_for() -> None:
    inbox = connected()
    inbox.suspect()
    assert read(inbox, [row(5, 500)]) == [5]
    inbox.hear_span(800, Span(8, 9))
    inbox.reconnected()
    assert read(inbox, [row(5, 500)]) == []
    inbox.deleted([(5, 500)])
    inbox.age()
    inbox.age()
    assert _state(inbox) == _state(connected())


def test_when_the_loop_is_gone_what_it_began_is_done_anew() -> None:
    inbox = connected()
    assert inbox.hear_message(4, 400)
    inbox.hear_span(500, Span(5, 5))
    old, _ = inbox.begin_read()
    inbox.begin_view()
    inbox.deleted([(4, 400)])
    inbox.abandon_views()
    assert inbox.held == 0
    assert inbox.is_due
    new, span = inbox.begin_read()
    assert span == EVERYTHING
    # The old loop runs again: what it says does not count.
    assert inbox.read(old, [row(5, 500)]) == []
    inbox.end_read(old)
    inbox.fail_read(old)
    assert inbox.read(new, [row(5, 500)]) == [row(5, 500)]
    inbox.end_read(new)
    assert not inbox.is_due


# --- The model


class Source(NamedTuple):
    """Where a row came from: which writer, and how many rows that writer had written before."""

    writer: int
    serial: int


class Statement(NamedTuple):
    """One statement in a writer's transaction: its rows for the own inbox and for the normal channel."""

    nonce: int
    own: list[Row]
    normal: list[Row]
    is_small: bool


class Doorbell(NamedTuple):
    """A NOTIFY on the own doorbell: "M" brings a row, "R" announces a span, "P" is a ping."""

    what: str
    nonce: int
    first: int = 0
    last: int = 0


class Read:
    """A read in flight: without parts until it has its snapshot."""

    def __init__(self, view: int, span: Span) -> None:
        self.view = view
        self.span = span
        self.parts: deque[list[Row]] | None = None
        self.up_to = LAST_ID


class Take:
    """Jobs being moved into the own inbox: without rows until that is committed."""

    def __init__(self, view: int, limit: int) -> None:
        self.view = view
        self.limit = limit
        self.rows: list[Row] | None = None


class World:
    """The database, everybody else in it, and a driver of the machine."""

    WRITERS = 3

    def __init__(self, choices: bytes) -> None:
        self.inbox = Inbox()
        self.trace: list[str] = []
        self._choices = iter(choices)
        # The database.
        self._next_id = 1
        self._next_nonce = 1000
        self._open: list[list[Statement]] = [[] for _ in range(self.WRITERS)]
        self._own: dict[Key, Row] = {}
        self._normal: dict[Key, Row] = {}
        # What is not surely on disk: in which epoch it was committed, and how it is undone.
        self._lazy: list[tuple[int, Callable[[], None]]] = []
        self._epoch = 0
        self._wire: deque[Doorbell] | None = None  # what the LISTEN connection has not read yet
        # What is known of each row that was ever committed.
        self._sources: dict[Key, Source] = {}
        self._lost: set[Key] = set()  # with the primary
        self._elsewhere: set[Key] = set()  # handed over by another process
        self._serials = [0] * self.WRITERS
        # The driver.
        self._is_listening = False
        self._catching_up: Read | None = None  # with what was there before LISTEN
        self._is_caught_up = False
        self._stalled_for = 0
        self._read: Read | None = None
        self._take: Take | None = None
        self._stale: list[Read] = []
        self._lingering: list[Take] = []  # given up on, and yet to commit
        self._has_lingered = False
        self._returning: list[Key] = []
        self._deleting: list[Key] = []
        self._doomed: list[Key] = []
        self._pings: list[int] = []
        # What the process got.
        self._mailbox: dict[Key, Row] = {}
        self._delivered: set[Key] = set()
        self._newest = [-1] * self.WRITERS
        self._failovers = 0
        self._is_limited = False
        self._is_resting = False
        self._listen()
        self._listen()

    def pick(self, count: int) -> int:
        return next(self._choices, 0) % count

    def run(self) -> None:
        """Live through all the choices, then let everything come to rest."""
        # Each run knows only some kinds of trouble, so that it gets further with those.
        allowed = self.pick(256) + 256 * self.pick(256)
        actions = [*self.CALM]
        for bit, trouble in enumerate(self.TROUBLE):
            if allowed & (1 << bit):
                actions.extend(trouble)
        for choice in self._choices:
            if choice:
                actions[choice % len(actions)](self)
        self.come_to_rest()

    # --- writers

    def _write(self) -> None:
        """A statement in a writer's transaction; it draws ids now, and commits some other time."""
        shape = self.pick(24)
        writer, shape = shape % 3, shape // 3
        own, normal = ((1, 0), (1, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1), (0, 2))[shape]
        self._last_writer = writer
        nonce, self._next_nonce = self._next_nonce, self._next_nonce + 1
        statement = Statement(nonce, [], [], is_small=shape != 1)
        self._open[writer].append(statement)
        self.trace.append(f"writer {writer} writes {nonce}: {own} own, {normal} normal")
        for _ in range(normal):
            statement.normal.append(row(self._draw_id(), nonce, NORMAL))
        for _ in range(own):
            channel = SPECIFIC if nonce % 2 else None
            statement.own.append(row(self._draw_id(), nonce, channel))

    def _draw_id(self) -> int:
        id, self._next_id = self._next_id, self._next_id + 1
        return id

    def _send(self) -> None:
        self._write()
        self._commit_of(self._last_writer)

    def _grow(self) -> None:
        """A statement that has drawn some ids draws another: ids of statements interleave."""
        for statements in self._open:
            if statements and len(statements[-1].own) > 1:
                nonce = statements[-1].nonce
                statements[-1].own.append(row(self._draw_id(), nonce, statements[-1].own[0].channel))
                self.trace.append(f"{nonce} grows")

    def _commit(self) -> None:
        self._commit_of(self.pick(self.WRITERS))

    def _commit_of(self, writer: int) -> None:
        statements, self._open[writer] = self._open[writer], []
        if not statements:
            return
        written: list[Key] = []
        for statement in statements:
            for new, table in ((statement.own, self._own), (statement.normal, self._normal)):
                for one in new:
                    table[one.key] = one
                    written.append(one.key)
                    self._sources[one.key] = Source(writer, self._serials[writer])
                    self._serials[writer] += 1
            self._ring(statement)
        self._lazy.append((self._epoch, partial(self._never_written, written)))
        self.trace.append(f"writer {writer} commits {written}")

    def _never_written(self, keys: list[Key]) -> None:
        self._lost.update(keys)
        for key in keys:
            self._own.pop(key, None)
            self._normal.pop(key, None)

    def _ring(self, statement: Statement) -> None:
        if self._wire is None or not statement.own:
            return
        first, last = statement.own[0].id, statement.own[-1].id
        what = "M" if statement.is_small and len(statement.own) == 1 else "R"
        self._wire.append(Doorbell(what, statement.nonce, first, last))

    def _roll_back(self) -> None:
        self._open[self.pick(self.WRITERS)] = []

    # --- doorbells

    def _hear(self) -> None:
        if self._stalled_for:
            self._stalled_for -= 1
        elif self._wire:
            self._hear_one(self._wire)

    def _hear_one(self, wire: deque[Doorbell]) -> None:
        bell = wire.popleft()
        self.trace.append(f"hear {bell}")
        if bell.what == "P":
            self.inbox.pong(bell.nonce)
            self.inbox.suspect()
            self._age()
        elif bell.what == "R":
            self.inbox.hear_span(bell.nonce, Span(bell.first, bell.last))
        elif self.inbox.hear_message(bell.first, bell.nonce):
            self._dispatch([row(bell.first, bell.nonce, SPECIFIC if bell.nonce % 2 else None)])

    def _stall(self) -> None:
        """The LISTEN connection is slow."""
        self._stalled_for = 10

    def _lose_connection(self) -> None:
        self.trace.append("the connection is lost")
        self._catching_up, self._is_caught_up = None, False
        self._wire = None
        self._is_listening = False

    def _listen(self) -> None:
        if self._wire is None:
            self.trace.append("LISTEN takes effect")
            self.inbox.reconnected()
            self._wire = deque()
        elif not self._is_listening:
            self.trace.append("LISTEN returns")
            self._is_listening = True
            self.inbox.suspect()

    def _suspect(self) -> None:
        self.trace.append("suspect")
        self.inbox.suspect()

    def _ping(self) -> None:
        if len(self._pings) < 2:
            self._pings.append(self.inbox.ping())
            self.trace.append(f"ping {self._pings[-1]}")

    def _ping_commits(self) -> None:
        if self._pings:
            ping = self._pings.pop(0)
            if self._wire is not None:
                self.trace.append(f"ping {ping} rings")
                self._wire.append(Doorbell("P", ping))

    def _be_limited(self) -> None:
        self._is_limited = True

    # --- reading

    def _go_on_reading(self) -> None:
        if self._read is None:
            if self.inbox.is_due:
                self._read = Read(*self.inbox.begin_read())
                self.trace.append(f"begin to read {tuple(self._read.span)}")
                if self._is_listening and self._read.span == EVERYTHING:
                    self._catching_up = self._read
        elif self._read.parts is None:
            self._see(self._read)
        elif self._receive_part(self._read):
            self._read = None

    def _see(self, read: Read) -> None:
        """The read's snapshot. Everything is read in parts, a span as far as the limit allows."""
        limit = (1000, 1, 2, 3)[self.pick(4)] if self._is_limited else 1000
        seen = sorted(one for one in self._own.values() if read.span.first <= one.id <= read.span.last)
        if read.span == EVERYTHING:
            read.parts = deque(seen[i : i + limit] for i in range(0, len(seen) + 1, limit))
        else:
            read.parts = deque([seen[:limit]])
            read.up_to = LAST_ID if len(seen) < limit else seen[limit - 1].id
        self.trace.append(f"read sees {[[one.key for one in part] for part in read.parts]}")

    def _receive_part(self, read: Read) -> bool:
        """A part of the answer; whether it was the last."""
        if read.parts:
            part = read.parts.popleft()
            self.trace.append(f"read returns {[one.key for one in part]}")
            self._dispatch(self.inbox.read(read.view, part))
            if read.parts or read.span == EVERYTHING:
                return False
        self.trace.append("read ends")
        if read is self._catching_up:
            self._is_caught_up = True
        self.inbox.end_read(read.view, read.up_to)
        return True

    def _see_again(self) -> None:
        """The answer was lost, and the read is tried again on another connection."""
        if self._read is not None:
            self._see(self._read)

    def _fail_read(self) -> None:
        if self._read is not None:
            self.trace.append("read fails")
            self.inbox.fail_read(self._read.view)
            self._read = None

    # --- taking

    def _go_on_taking(self) -> None:
        take = self._take
        if take is None:
            if self._normal and not self._returning:  # the receiver does one of the two at a time
                self._take = Take(self.inbox.begin_view(), 1 + self.pick(2))
                self.trace.append("begin to take")
        elif take.rows is None:
            self._move(take)
        else:
            self._take = None
            self.trace.append("take returns")
            fresh = self.inbox.taken(take.rows)
            self.inbox.end_view(take.view)
            self._dispatch(fresh)

    def _move(self, take: Take) -> None:
        if take.rows is None:
            take.rows = sorted(self._normal.values())[: take.limit]
            for one in take.rows:
                self._own[one.key] = self._normal.pop(one.key)
            self._lazy.clear()  # taking waits for the disk
            self.trace.append(f"take moves {[one.key for one in take.rows]}")

    def _lose_take(self) -> None:
        """The answer is lost; the statement took effect, or it will, or never does."""
        take, self._take = self._take, None
        if take is None:
            return
        self.trace.append("the answer to the take is lost")
        self.inbox.suspect()
        self.inbox.taken([])
        self.inbox.end_view(take.view)
        if take.rows is None and self.pick(2):
            self._lingering.append(take)

    def _lingering_take_commits(self) -> None:
        while self._lingering:
            self._move(self._lingering.pop())
            self._has_lingered = True

    def _other_process_takes(self) -> None:
        if self._normal:
            key = min(self._normal)
            del self._normal[key]
            self._lazy.clear()
            assert key not in self._delivered, f"{key} was handed over here and elsewhere"
            self._elsewhere.add(key)
            self.trace.append(f"another process takes {key}")

    def _begin_to_put_back(self) -> None:
        if self._take is not None:
            return
        self._returning = [key for key, one in self._mailbox.items() if one.channel == NORMAL]
        for key in self._returning:
            self.trace.append(f"put back {key}")
            del self._mailbox[key]

    def _go_on_putting_back(self) -> None:
        if not self._returning:
            if not self._is_resting:
                self._begin_to_put_back()
        elif any(key in self._own for key in self._returning) or self.pick(4) == 1:
            # Once, or again where the answer was lost.
            self.trace.append(f"{self._returning} are put back")
            moved = {key: self._own.pop(key) for key in self._returning if key in self._own}
            self._normal.update(moved)
            self._lazy.append((self._epoch, partial(self._never_put_back, moved)))
        else:
            self.trace.append(f"putting back {self._returning} returns")
            self.inbox.put_back(self._returning)
            self._returning = []

    def _lose_put_back(self) -> None:
        """The answer is lost, or the loop ends: what was not put back is read again."""
        if self._returning:
            self.trace.append("the answer to the putting back is lost")
            self.inbox.suspect()
            self.inbox.put_back(self._returning, is_sure=False)
            self._returning = []

    def _never_put_back(self, rows: dict[Key, Row]) -> None:
        for key, one in rows.items():
            if self._normal.pop(key, None) is not None:
                self._own[key] = one

    # --- what the process does with rows

    def _dispatch(self, rows: Iterable[Row]) -> None:
        for one in rows:
            key = one.key
            self.trace.append(f"dispatch {key}")
            assert key not in self._delivered, f"{key} is dispatched twice"
            assert key not in self._mailbox, f"{key} is dispatched twice"
            assert key not in self._elsewhere, f"{key} is dispatched here and elsewhere"
            assert key in self._own or key in self._lost, f"{key} is dispatched, and others may take it"
            if one.channel == NORMAL:
                self._mailbox[key] = one
                continue
            source = self._sources[key]
            if not self._failovers:
                assert source.serial > self._newest[source.writer], f"{key} comes too late"
            self._newest[source.writer] = source.serial
            if one.channel is None:  # for all members of a group, so that the row has done its work
                self._delivered.add(key)
                self._doomed.append(key)
            else:
                self._mailbox[key] = one
        self._doomed.extend(self.inbox.pop_strays())

    def _receive(self) -> None:
        for key in list(self._mailbox)[:2]:
            self.trace.append(f"receive {key}")
            del self._mailbox[key]
            self._delivered.add(key)
            self._doomed.append(key)

    def _go_on_deleting(self) -> None:
        if not self._deleting:
            if self._doomed:
                self._deleting, self._doomed = self._doomed, []
                self.trace.append(f"delete {self._deleting}")
        elif any(key in self._own for key in self._deleting):
            self.trace.append(f"{self._deleting} are deleted")
            gone = {key: self._own.pop(key) for key in self._deleting if key in self._own}
            self._lazy.append((self._epoch, partial(self._own.update, gone)))
        else:
            self.trace.append(f"deleting {self._deleting} returns")
            self.inbox.deleted(self._deleting)
            self._deleting = []

    def _lose_delete(self) -> None:
        """The answer is lost: it is done again."""
        self._doomed = self._deleting + self._doomed
        self._deleting = []

    # --- what happens to servers, and to loops

    def _crash(self) -> None:
        """The server loses its last moments, or a standby that has not heard of them takes over.

        The ids of rows that are lost in it are handed out again.
        """
        self.trace.append("the server crashes")
        self._failovers += 1
        self._lose_connection()
        for _ in range(self.pick(1 + min(6, len(self._lazy)))):
            _, undo = self._lazy.pop()
            undo()
        self._lazy.clear()
        self.trace.append(f"lost: {sorted(self._lost)}")
        self._open = [[] for _ in range(self.WRITERS)]
        self._next_id = 1 + max((id for id, nonce in self._sources.keys() - self._lost), default=0)

    def _age(self) -> None:
        """Long enough after the last time for the disk: after a heartbeat, or when there are many rows."""
        if self._is_listening and self._read is None and self._is_caught_up:
            self.trace.append("age")
            self.inbox.age()
            self._epoch += 1
            self._lazy = [(epoch, undo) for epoch, undo in self._lazy if epoch >= self._epoch - 1]

    def _change_home(self) -> None:
        """The loop that did all this is gone, or stands still."""
        self.trace.append("another loop takes over")
        self._lose_connection()
        if self._take is not None and self._take.rows is None:
            self._lingering.append(self._take)
        self._take = None
        if self._read is not None:
            self._stale.append(self._read)
        self._read = None
        self._lose_delete()
        self._lose_put_back()
        self.inbox.abandon_views()

    def _old_loop_runs_again(self) -> None:
        while self._stale:
            read = self._stale.pop()
            self.trace.append("an abandoned read ends")
            while read.parts is not None and not self._receive_part(read):
                pass
            self.inbox.fail_read(read.view)

    # --- rest

    def come_to_rest(self) -> None:
        """Everything under way arrives; then nothing may be missing, and nothing left over."""
        self.trace.append("--- come to rest")
        self._is_resting = True
        self._stalled_for = 0
        for writer in range(self.WRITERS):
            self._commit_of(writer)
        self._lingering_take_commits()
        self._old_loop_runs_again()
        if self._has_lingered or self._failovers:
            self._suspect()  # as at every heartbeat
        self._rest()
        missing = self._sources.keys() - self._lost - self._delivered - self._elsewhere
        assert not missing, f"{sorted(missing)} were never dispatched"
        for _ in range(3):
            self._ping()
            self._rest()
        assert not self._own, f"{sorted(self._own)} were not deleted"
        assert self.inbox.held == 0
        assert _state(self.inbox) == _state(Inbox())

    def _rest(self) -> None:
        for _ in range(1000):
            before = len(self.trace)
            for go_on in self.REST:
                go_on(self)
            if len(self.trace) == before:
                return
        pytest.fail("It never comes to rest.")

    CALM: tuple[Callable[[World], None], ...] = (
        _send,
        _send,
        _send,
        _write,
        _commit,
        _hear,
        _hear,
        _hear,
        _hear,
        _go_on_reading,
        _go_on_reading,
        _go_on_reading,
        _go_on_reading,
        _receive,
        _go_on_deleting,
        _go_on_deleting,
    )
    TROUBLE: tuple[tuple[Callable[[World], None], ...], ...] = (
        (_be_limited,),
        (_write, _write, _commit, _grow, _roll_back),
        (_see_again, _fail_read, _lose_delete),
        (_lose_connection, _listen, _listen, _listen),
        (_ping, _ping_commits, _suspect),
        (_age, _age, _age, _age, _stall, _suspect),
        (_go_on_taking, _go_on_taking, _go_on_taking, _lose_take, _lingering_take_commits),
        (_go_on_putting_back, _go_on_putting_back, _lose_put_back, _other_process_takes),
        (_crash, _age, _listen, _listen),
        (_change_home, _old_loop_runs_again, _listen, _listen),
    )
    REST = (
        _listen,
        _ping_commits,
        _hear,
        _go_on_reading,
        _go_on_taking,
        _go_on_putting_back,
        _receive,
        _go_on_deleting,
    )


def _state(inbox: Inbox) -> dict[str, object]:
    """All that a machine remembers, but for the numbers it counts up."""
    counters = ("_pings", "_views", "_read_view")
    return {name: value for name, value in vars(inbox).items() if name not in counters}


@settings(
    max_examples=700,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
)
@given(st.binary(min_size=160, max_size=400))
def test_whatever_happens_each_row_is_dispatched_once_and_in_order(choices: bytes) -> None:
    world = World(choices)
    try:
        world.run()
    except BaseException:
        note("\n".join(world.trace))
        raise
