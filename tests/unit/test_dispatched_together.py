"""What is judged and dispatched together: the messages of one transaction."""

from __future__ import annotations

import pytest

from pg_layer._messages.announcements import Messages
from pg_layer._messages.rows import Key, Row
from pg_layer._state.announcement_queue import AnnouncementQueue
from pg_layer._state.cursor import Cursor
from pg_layer._state.snapshot import Moment, Snapshot

END = 1_000.0


def row(
    id: int,
    xid: int = 100,
    *,
    boot: int = 1,
    marked: bool = False,
    kind: str = "message",
    group: str | None = "g",
    excluded: str | None = None,
) -> Row:
    return Row(id, xid, boot, marked, kind, group, None if group else "s.c!1", excluded, b"{}", END)


@pytest.fixture
def cursor() -> Cursor:
    """A cursor that has passed what was committed before transaction 100."""
    cursor = Cursor()
    cursor.advance_to(Moment(1, Snapshot("100:100:")))
    return cursor


@pytest.fixture
def queue(cursor: Cursor) -> AnnouncementQueue:
    queue = AnnouncementQueue(cursor)
    queue.begin_catch_up()
    queue.end_catch_up()
    return queue


def ids(rows: list[Row]) -> list[int]:
    return [row.id for row in rows]


def test_admit_together_rows_that_s_sees_are_not_new(cursor: Cursor) -> None:
    assert cursor.admit_together([row(5, 99), row(6, 99)]) == []
    assert cursor.key_count == 0


def test_admit_together_rows_that_were_admitted_before_are_not_new(cursor: Cursor) -> None:
    assert cursor.admit(Key(1, 100, 6), False, END)
    assert ids(cursor.admit_together([row(5), row(6), row(7)])) == [5, 7]
    assert cursor.admit_together([row(5), row(6), row(7)]) == []
    assert cursor.key_count == 3


def test_admit_together_rows_are_not_admitted_again_one_by_one(cursor: Cursor) -> None:
    cursor.admit_together([row(5), row(6)])
    assert not cursor.is_new(Key(1, 100, 5), False)
    assert not cursor.admit(Key(1, 100, 6), False, END)


def test_admit_together_marked_rows_are_judged_by_their_keys(cursor: Cursor) -> None:
    """``S`` may have passed them before they are announced."""
    cursor.admit(Key(1, 90, 5), True, END)
    assert ids(cursor.admit_together([row(5, 90, marked=True), row(6, 90, marked=True)])) == [6]


def test_pop_run_returns_the_messages_of_an_announcement(queue: AnnouncementQueue) -> None:
    queue.hear(Messages([row(5), row(6), row(7)]))
    assert queue.head() is not None
    assert ids(queue.pop_run()) == [5, 6, 7]
    assert (queue.head(), queue.rows, len(queue)) == (None, 0, 0)


@pytest.mark.parametrize(
    "other",
    [
        row(7, group="h"),
        row(7, group=None),
        row(7, excluded="s.c!1"),
        row(7, kind="add", group=None),
        row(7, 101),
        row(7, boot=2),
    ],
    ids=["group", "no group", "excluded", "control message", "transaction", "boot"],
)
def test_pop_run_ends_before_what_goes_elsewhere(queue: AnnouncementQueue, other: Row) -> None:
    """Also before another transaction: its messages may be from before the beginning of a membership."""
    queue.append([row(5), row(6), other, row(8)])
    assert queue.head() is not None
    assert ids(queue.pop_run()) == [5, 6]
    rows = queue.head()
    assert rows is not None
    assert ids(list(rows)) == [7, 8]
    assert queue.rows == 2
