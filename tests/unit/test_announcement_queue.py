"""The announcement queue: ``docs/protocols.md``, section 2."""

from __future__ import annotations

import pytest

from pg_layer._messages.announcements import Messages, ToRead
from pg_layer._messages.rows import Key, KeyAt, Row, Span
from pg_layer._state import announcement_queue
from pg_layer._state.announcement_queue import AnnouncementQueue
from pg_layer._state.cursor import Cursor
from pg_layer._state.snapshot import Moment, Position, Snapshot

OWN, GROUP = "p!c", "p!@g"
END = 1_000.0


def at(xid: int, boot: int = 1) -> Moment:
    return Moment(boot, Snapshot(f"{xid}:{xid}:"))


def row(id: int, xid: int = 100, *, marked: bool = False, payload: bytes = b"{}") -> Row:
    return Row(id, xid, 1, marked, "message", "g", None, None, payload, END)


def job(id: int, channel: str, xid: int = 120) -> Row:
    """Return a job that was claimed from a normal channel."""
    return row(id, xid)._replace(group=None, channel=channel)


def heard(*rows: Row) -> Messages:
    return Messages(list(rows))


def to_read(
    first: int, last: int, xid: int = 100, *, marked: bool = False, address: str = GROUP
) -> ToRead:
    return ToRead(Span(address, 1, xid, marked, first, last))


def key_at(id: int, xid: int = 100, *, marked: bool = False, address: str = GROUP) -> KeyAt:
    return KeyAt(address, id, xid, 1, marked, 2)


@pytest.fixture
def cursor() -> Cursor:
    return Cursor()


@pytest.fixture
def queue(cursor: Cursor) -> AnnouncementQueue:
    """Return a queue and its cursor. Their first catch-up has ended at transaction 100."""
    queue = AnnouncementQueue(cursor)
    queue.begin_catch_up()
    cursor.advance_to(at(100))
    queue.end_catch_up()
    return queue


def dispatch(queue: AnnouncementQueue) -> list[int]:
    """Dispatch the entries that are ready, and return the ids of their rows."""
    ids = []
    while (rows := queue.head()) is not None:
        row = rows.popleft()
        queue.dispatched((row,))
        ids.append(row.id)
    return ids


# --- Hearing


def test_hear_several_messages_are_ready_in_the_order_heard(queue: AnnouncementQueue) -> None:
    """Notifications arrive in commit order; ids are drawn before the commit."""
    queue.hear(heard(row(5, 102), row(6, 102)))
    queue.hear(heard(row(3, 101)))
    assert queue.rows == 3
    assert dispatch(queue) == [5, 6, 3]
    assert (queue.rows, len(queue)) == (0, 0)


def test_hear_message_that_is_not_new_is_dropped(queue: AnnouncementQueue) -> None:
    queue.hear(heard(row(5, 99)))
    queue.hear(heard(row(6)))
    queue.hear(heard(row(6), row(7)))
    assert dispatch(queue) == [6, 7]


def test_hear_span_that_s_has_passed_is_dropped(queue: AnnouncementQueue) -> None:
    queue.hear(to_read(5, 6, 99))
    assert queue.to_read(10) == []
    queue.hear(to_read(5, 6, 99, marked=True))
    assert len(queue.to_read(10)) == 1


def test_hear_before_the_first_catch_up_appends_nothing(cursor: Cursor) -> None:
    queue = AnnouncementQueue(cursor)
    queue.hear(heard(row(5)))
    assert queue.rows == 0
    assert cursor.is_new(row(5).key, False)


def test_hear_after_mark_incomplete_appends_nothing_until_a_catch_up(
    queue: AnnouncementQueue,
) -> None:
    """Announcements may have been missed, and nothing may overtake them."""
    queue.hear(heard(row(5)))
    queue.mark_incomplete()
    queue.hear(heard(row(7)))
    assert dispatch(queue) == [5]


# --- Reading


def test_head_entry_with_unread_rows_is_not_overtaken(queue: AnnouncementQueue) -> None:
    """The messages of one writer keep their order, whatever their sizes."""
    queue.hear(heard(row(5, 101)))
    queue.hear(to_read(6, 7, 102))
    queue.hear(heard(row(8, 103)))
    assert dispatch(queue) == [5]
    (entry,) = queue.to_read(10)
    queue.fill(entry, [row(6, 102), row(7, 102)], is_all=True)
    assert dispatch(queue) == [6, 7, 8]
    assert queue.rows == 0


def test_to_read_returns_the_first_waiting_entries(queue: AnnouncementQueue) -> None:
    for xid in (101, 102, 103):
        queue.hear(heard(row(xid, xid)))
        queue.hear(to_read(xid + 100, xid + 100, xid))
    assert [entry.span.xid for entry in queue.to_read(2) if entry.span] == [101, 102]


def test_fill_partial_answer_continues_behind_its_last_row(queue: AnnouncementQueue) -> None:
    """Rows of the first answer are dispatched. A repeated read must not append them again."""
    queue.hear(to_read(5, 8))
    (entry,) = queue.to_read(10)
    queue.fill(entry, [row(5), row(6)], is_all=False)
    assert entry.span is not None
    assert entry.span.first == 7
    assert dispatch(queue) == [5, 6]
    queue.fill(entry, [row(5), row(6), row(7)], is_all=False)
    queue.fill(entry, [row(8)], is_all=True)
    assert dispatch(queue) == [7, 8]


def test_fill_second_answer_is_ignored(queue: AnnouncementQueue) -> None:
    queue.hear(to_read(5, 6))
    (entry,) = queue.to_read(10)
    queue.fill(entry, [row(5), row(6)], is_all=True)
    queue.fill(entry, [row(5), row(6)], is_all=True)
    assert dispatch(queue) == [5, 6]
    assert queue.rows == 0


def test_fill_no_rows_lets_the_next_entry_be_dispatched(queue: AnnouncementQueue) -> None:
    queue.hear(to_read(5, 6, 101))
    queue.hear(heard(row(7, 102)))
    (entry,) = queue.to_read(10)
    queue.fill(entry, [], is_all=True)
    assert dispatch(queue) == [7]


def test_fill_rows_that_s_has_passed_meanwhile_are_kept(
    cursor: Cursor, queue: AnnouncementQueue
) -> None:
    """``S`` moves when a ping is heard. The entry was announced before the ping."""
    queue.hear(to_read(5, 6))
    cursor.advance_to(at(110))
    (entry,) = queue.to_read(10)
    queue.fill(entry, [row(5), row(6)], is_all=True)
    assert dispatch(queue) == [5, 6]


def test_fill_marked_row_that_a_search_brought_is_dropped(queue: AnnouncementQueue) -> None:
    queue.hear(to_read(5, 6, marked=True))
    queue.append([row(5, marked=True)])
    (entry,) = queue.to_read(10)
    queue.fill(entry, [row(5, marked=True), row(6, marked=True)], is_all=True)
    assert dispatch(queue) == [6, 5]


def test_to_read_and_holds_jobs_many_waiting_entries_take_few_steps(
    queue: AnnouncementQueue,
) -> None:
    """Both are called all the time. If each call walked all entries, it would take minutes."""
    count = announcement_queue.MAX_ROWS
    for n in range(count):
        queue.hear(heard(row(n, 101 + n)))
        for _ in range(5):
            assert queue.to_read(1) == []
            assert not queue.holds_jobs("jobs")
    assert queue.rows == count


def test_to_read_entries_filled_in_any_order_leave_the_others(
    queue: AnnouncementQueue,
) -> None:
    for xid in (101, 102, 103):
        queue.hear(to_read(2 * xid, 2 * xid + 1, xid))
    first, second, third = queue.to_read(10)
    queue.fill(second, [row(204, 102)], is_all=False)
    queue.merge([row(1, 100)])
    assert queue.to_read(10) == [first, second, third]
    queue.fill(second, [row(205, 102)], is_all=True)
    queue.fill(second, [row(205, 102)], is_all=True)  # the answer of a repeated read
    assert queue.to_read(10) == [first, third]
    queue.fill(first, [], is_all=True)
    assert queue.to_read(10) == [third]
    queue.hear(to_read(300, 301, 104))
    queue.fill(third, [row(206, 103), row(207, 103)], is_all=True)
    (fourth,) = queue.to_read(10)
    queue.fill(fourth, [row(300, 104), row(301, 104)], is_all=True)
    assert queue.to_read(10) == []
    assert dispatch(queue) == [1, 204, 205, 206, 207, 300, 301]
    assert queue.rows == 0


def test_holds_jobs_until_the_last_of_the_channel_is_dispatched(
    cursor: Cursor, queue: AnnouncementQueue
) -> None:
    """Rows of groups and of other channels, and late rows that are removed, come between."""
    cursor.advance_to(at(110))
    queue.append([job(5, "jobs"), job(6, "jobs", 121), job(7, "mail", 122)])
    queue.hear(heard(row(9, 104, marked=True)))
    queue.append([job(8, "jobs"), row(10, 120)._replace(group=None, channel="specific.1!1")])
    missed = [row(11, 104, marked=True)]
    queue.merge([*queue.remove_late(missed), *missed])
    held = []
    while queue.head() is not None:
        (first, *_) = queue.pop_run()
        held.append((first.id, queue.holds_jobs("jobs"), queue.holds_jobs("mail")))
    assert held == [
        (5, True, True),
        (6, True, True),
        (7, True, False),
        (8, False, False),
        (9, False, False),
        (10, False, False),
        (11, False, False),
    ]
    assert not queue.holds_jobs("specific.1!1")


# --- Catching up


def test_hear_during_a_catch_up_is_judged_when_it_has_ended(
    cursor: Cursor, queue: AnnouncementQueue
) -> None:
    queue.begin_catch_up()
    queue.hear(heard(row(9, 103)))
    queue.hear(heard(row(6, 101)))
    assert queue.rows == 0
    queue.append([row(5, 101), row(6, 101)])
    cursor.advance_to(at(103))
    queue.end_catch_up()
    assert dispatch(queue) == [5, 6, 9]


def test_mark_incomplete_during_a_catch_up_needs_another(
    cursor: Cursor, queue: AnnouncementQueue
) -> None:
    queue.begin_catch_up()
    queue.mark_incomplete()
    queue.end_catch_up()
    queue.hear(heard(row(9, 103)))
    assert queue.rows == 0
    assert cursor.is_suspended


def test_fail_catch_up_leaves_what_was_heard_to_the_next(
    cursor: Cursor, queue: AnnouncementQueue
) -> None:
    queue.begin_catch_up()
    queue.hear(heard(row(9, 103)))
    queue.append([row(5, 101)])
    queue.fail_catch_up()
    assert cursor.is_new(row(9, 103).key, False)
    queue.begin_catch_up()
    assert queue.append([row(5, 101), row(9, 103)]) == 1
    queue.end_catch_up()
    assert dispatch(queue) == [5, 9]


def test_restart_discards_the_catch_up_of_the_last_loop(queue: AnnouncementQueue) -> None:
    queue.hear(heard(row(5)))
    queue.begin_catch_up()
    queue.hear(heard(row(9, 103)))
    queue.restart()
    queue.hear(heard(row(10, 104)))
    assert dispatch(queue) == [5]


def test_keys_to_read_leaves_out_done_keys_and_those_of_entries(queue: AnnouncementQueue) -> None:
    """A waiting entry survives a reconnection: the catch-up must not read its rows again."""
    queue.hear(heard(row(5)))
    queue.hear(to_read(6, 7))
    keys = [key_at(5), key_at(6), key_at(7), key_at(8), key_at(6, address=OWN), key_at(9, 99)]
    assert queue.keys_to_read(keys) == [key_at(8), key_at(6, address=OWN)]


def test_append_marked_row_that_s_has_passed_is_appended(
    cursor: Cursor, queue: AnnouncementQueue
) -> None:
    """The connection was lost while a marked row waited for its announcement."""
    cursor.advance_to(at(200))
    assert queue.keys_to_read([key_at(5, marked=True)]) == [key_at(5, marked=True)]
    assert queue.append([row(5, marked=True)]) == 1
    queue.hear(heard(row(5, marked=True)))
    assert dispatch(queue) == [5]


# --- Bounds


def test_hear_beyond_the_limit_appends_nothing_until_a_catch_up(
    cursor: Cursor, queue: AnnouncementQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcement_queue, "MAX_ROWS", 2)
    queue.hear(heard(row(5), row(6)))
    cursor.renew(at(110), Position(20, 110), "token")
    queue.hear(heard(row(7)))
    assert queue.is_over_limit
    assert not cursor.confirm("token")
    assert dispatch(queue) == [5, 6]
    queue.hear(heard(row(8)))
    assert queue.rows == 0
    queue.begin_catch_up()
    assert not queue.is_over_limit
    assert queue.append([row(7), row(8)]) == 2


def test_hear_beyond_the_limit_of_bytes_appends_nothing(
    queue: AnnouncementQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcement_queue, "MAX_BYTES", 10)
    queue.hear(heard(row(5, payload=b"x" * 10)))
    queue.hear(heard(row(6)))
    assert dispatch(queue) == [5]


def test_hear_too_much_during_a_catch_up_needs_another(
    queue: AnnouncementQueue, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(announcement_queue, "MAX_ASIDE", 1)
    queue.begin_catch_up()
    queue.hear(heard(row(9, 103)))
    queue.hear(heard(row(10, 104)))
    queue.end_catch_up()
    assert dispatch(queue) == [9]
    queue.hear(heard(row(11, 105)))
    assert queue.rows == 0
    assert queue.is_over_limit


# --- Rows that an added member has missed


def test_merge_rows_take_their_places_by_id(queue: AnnouncementQueue) -> None:
    queue.hear(heard(row(5, 101)))
    queue.hear(heard(row(8, 102), row(9, 102)))
    queue.merge([row(10, 99), row(7, 99), row(4, 99)])
    assert queue.rows == 6
    assert dispatch(queue) == [4, 5, 7, 8, 9, 10]
    assert queue.rows == 0


def test_append_rows_of_a_joining_group_come_behind_the_add(
    queue: AnnouncementQueue,
) -> None:
    """A transaction may draw an id before the add does, and commit after it."""
    queue.hear(heard(row(8, 102), row(9, 102)))
    head = queue.head()
    assert head is not None
    add = head[0]
    queue.append([row(4, 103)], "g")
    head = queue.head()
    assert head is not None
    assert head[0] is add
    assert queue.rows == 3
    assert dispatch(queue) == [8, 4, 9]


def test_merge_rows_of_a_later_boot_come_later_whatever_their_ids(queue: AnnouncementQueue) -> None:
    """A promoted standby draws ids again that its predecessor drew after the separation."""
    queue.hear(heard(row(8, 102), row(9, 102)))
    queue.append([row(7, 50)._replace(boot=2)])
    queue.merge([row(6, 49)._replace(boot=2), row(8, 51)._replace(boot=2), row(5, 99)])
    assert dispatch(queue) == [5, 8, 9, 6, 7, 8]


def test_merge_rows_of_boot_0_count_as_of_the_boot_around_them(queue: AnnouncementQueue) -> None:
    """After a crash or a failover a transaction may write before the boot has a number."""
    queue.append(
        [row(4, 101), row(5, 102, marked=True)._replace(boot=0), row(7, 50)._replace(boot=2)]
    )
    queue.append([row(12, 50)._replace(boot=3)])
    queue.merge(
        [
            row(6, 49)._replace(boot=2),
            row(8, 51, marked=True)._replace(boot=0),
            row(9, 52)._replace(boot=2),
        ]
    )
    assert dispatch(queue) == [4, 5, 6, 7, 8, 9, 12]


def test_merge_rows_come_behind_what_their_transaction_has_sent_before(
    queue: AnnouncementQueue,
) -> None:
    """The transaction drew its ids before another statement, and was announced after it."""
    queue.hear(heard(row(8, 102)))
    queue.hear(heard(row(5, 101, marked=True)))
    queue.hear(to_read(12, 13, 103, marked=True))
    queue.hear(heard(row(11, 104)))
    queue.merge(
        [row(6, 101, marked=True), row(7, 101, marked=True), row(14, 103, marked=True), row(4, 100)]
    )
    queue.fill(
        queue.to_read(1)[0], [row(12, 103, marked=True), row(13, 103, marked=True)], is_all=True
    )
    assert dispatch(queue) == [4, 8, 5, 6, 7, 12, 13, 14, 11]


def test_merge_many_rows_of_one_transaction_takes_few_steps(queue: AnnouncementQueue) -> None:
    """The transaction has sent thousands of rows. Comparing all pairs would take minutes."""
    count = 30_000
    queue.hear(heard(*(row(2 * n, 101) for n in range(count))))
    queue.merge([row(2 * n + 1, 101) for n in range(count)])
    assert dispatch(queue) == list(range(2 * count))


def test_merge_rows_of_boot_0_at_the_beginning_count_as_of_the_latest(
    cursor: Cursor, queue: AnnouncementQueue
) -> None:
    """A transaction after a crash sent the row in the queue. The join's rows are older."""
    cursor.note_position(at(100), Position(1, 100))
    cursor.note_position(at(50, boot=2), Position(1, 50))
    queue.append([row(20, 60, marked=True)._replace(boot=0)])
    queue.merge([row(30, 120)])
    assert dispatch(queue) == [30, 20]


def test_remove_late_returns_late_rows_of_the_same_transactions(
    cursor: Cursor, queue: AnnouncementQueue
) -> None:
    """One row was sent to another group. Another one is in the table only."""
    cursor.advance_to(at(110))
    queue.append([row(9, 120)])
    queue.hear(heard(row(6, 104, marked=True)))
    queue.merge([*queue.remove_late([row(7, 104, marked=True)]), row(7, 104, marked=True)])
    assert dispatch(queue) == [6, 7, 9]


def test_append_unannounced_transaction_comes_before_what_was_sent_later(
    queue: AnnouncementQueue,
) -> None:
    """A search finds a row for a group that is being joined, and one for a channel."""
    queue.hear(heard(row(4, 101), row(8, 101)))
    other = row(6, 104, marked=True)._replace(group=None, channel="specific.1!1")
    queue.append_unannounced([other, row(7, 104, marked=True)], "g", ())
    assert dispatch(queue) == [4, 6, 7, 8]


def test_append_unannounced_rows_are_no_places_for_later_rows(queue: AnnouncementQueue) -> None:
    """A search has found the transaction's earlier row before the join began."""
    queue.hear(heard(row(4, 101), row(8, 101)))
    other = row(6, 104, marked=True)._replace(group=None, channel="specific.1!1")
    queue.append_unannounced([other], None, ())
    missed = [row(7, 104, marked=True)]
    queue.merge([*queue.remove_late(missed), *missed])
    assert dispatch(queue) == [4, 6, 7, 8]


def test_hear_announcement_of_an_earlier_boot_appends_nothing(
    cursor: Cursor, queue: AnnouncementQueue
) -> None:
    """The catch-up has found the marked rows of that boot at the new server, or they are lost."""
    cursor.advance_to(at(50, boot=2))
    queue.hear(heard(row(5, 105, marked=True)))
    queue.hear(to_read(6, 7, 105, marked=True))
    assert queue.rows == 0
    queue.hear(heard(row(5, 60, marked=True)._replace(boot=2)))
    queue.hear(heard(row(6, 61, marked=True)._replace(boot=0)))  # its writer did not know the boot
    assert queue.rows == 2


def test_remove_late_returns_marked_rows_announced_after_s_passed_them(
    cursor: Cursor, queue: AnnouncementQueue
) -> None:
    """A catch-up may have read messages that were sent later, and cannot have read these."""
    missed = [row(id, xid, marked=True) for id, xid in ((5, 105), (6, 104), (7, 103), (8, 115))]
    queue.hear(heard(row(5, 105, marked=True)))
    cursor.advance_to(at(110))
    queue.append([row(9, 120)])
    queue.hear(heard(row(6, 104, marked=True)))
    queue.hear(to_read(7, 7, 103, marked=True))
    queue.hear(heard(row(8, 115, marked=True)))
    assert queue.absent_rows(GROUP, [row(7, 103)]) == [row(7, 103)]
    queue.fill(queue.to_read(1)[0], [row(7, 103, marked=True)], is_all=True)
    late = queue.remove_late(missed)
    assert [each.id for each in late] == [6, 7]
    queue.merge(late)
    assert queue.rows == 5
    assert dispatch(queue) == [5, 6, 7, 9, 8]
    assert queue.rows == 0


def test_absent_rows_leaves_out_queued_rows_and_spans(queue: AnnouncementQueue) -> None:
    queue.hear(heard(row(5)))
    queue.hear(to_read(6, 7))
    assert queue.absent_rows(GROUP, [row(5), row(7), row(8)]) == [row(8)]
    assert queue.absent_rows(OWN, [row(7)]) == [row(7)]
    assert queue.keys() == [Key(1, 100, 5)]


def test_has_unread_span_that_a_moment_sees_until_it_was_read(queue: AnnouncementQueue) -> None:
    """After a crash received rows are deleted again. Unread rows were not received."""
    queue.hear(to_read(6, 7, 105))
    queue.hear(heard(row(8, 106)))
    assert not queue.has_unread(at(105))
    assert queue.has_unread(at(106))
    assert queue.has_unread(at(50, boot=2))
    (entry,) = queue.to_read(10)
    queue.fill(entry, [row(6, 105), row(7, 105)], is_all=True)
    assert not queue.has_unread(at(106))
