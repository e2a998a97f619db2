"""The cursor: ``docs/protocols.md``, section 3."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pg_layer._messages.rows import Key, Row
from pg_layer._state.cursor import Cursor
from pg_layer._state.snapshot import Moment, Position, Snapshot

END = 1_000.0


def at(xid: int, boot: int = 1, running: tuple[int, ...] = ()) -> Moment:
    """Return the moment in which all transactions before ``xid`` had ended but the running."""
    xmin = min(running, default=xid)
    return Moment(boot, Snapshot(f"{xmin}:{xid}:{','.join(map(str, running))}"))


@pytest.fixture
def cursor() -> Cursor:
    """Return a cursor whose catch-up has ended at transaction 100."""
    cursor = Cursor()
    cursor.note_position(at(100), Position(10, 100))
    cursor.advance_to(at(100))
    cursor.resume()
    return cursor


# --- The rule


def test_admit_row_visible_in_s_is_not_new(cursor: Cursor) -> None:
    assert not cursor.admit(Key(1, 99, 5), False, END)
    assert cursor.admit(Key(1, 100, 11), False, END)


def test_admit_row_of_a_transaction_that_ran_at_s_is_new() -> None:
    """Ids are drawn before the commit: an id does not say what had been committed."""
    cursor = Cursor()
    cursor.advance_to(at(100, running=(90,)))
    assert cursor.admit(Key(1, 90, 3), False, END)
    assert not cursor.admit(Key(1, 95, 4), False, END)


def test_admit_same_key_again_is_not_new(cursor: Cursor) -> None:
    assert cursor.admit(Key(1, 100, 11), False, END)
    assert not cursor.is_new(Key(1, 100, 11), False)
    assert not cursor.admit(Key(1, 100, 11), False, END)


def test_admit_other_row_of_the_same_transaction_is_new(cursor: Cursor) -> None:
    """A statement may send two notifications: the rows of the second one are new."""
    assert cursor.admit(Key(1, 100, 11), False, END)
    assert cursor.admit(Key(1, 100, 12), False, END)


def test_admit_row_of_a_later_boot_is_new_whatever_its_xid(cursor: Cursor) -> None:
    """After a crash transaction ids and ids are given out again."""
    assert cursor.admit(Key(1, 100, 11), False, END)
    assert cursor.admit(Key(2, 50, 11), False, END)
    assert cursor.admit(Key(2, 100, 11), False, END)


def test_admit_row_of_an_earlier_boot_is_not_new(cursor: Cursor) -> None:
    """A standby that lagged brings back rows that were dispatched long ago."""
    cursor.advance_to(at(60, boot=2))
    assert not cursor.admit(Key(1, 10_000, 11), False, END)


def test_admit_without_a_snapshot_admits_each_row_once() -> None:
    cursor = Cursor()
    assert cursor.admit(Key(1, 5, 1), False, END)
    assert not cursor.admit(Key(1, 5, 1), False, END)
    assert not cursor.has_passed(1, 5)


def test_admit_announced_row_that_s_has_passed_since_is_admitted(cursor: Cursor) -> None:
    """``S`` has moved while the rows of an announcement were being read."""
    key = Key(1, 100, 11)
    cursor.advance_to(at(105))
    assert not cursor.admit(key, False, END)
    assert cursor.admit_announced(key, False, END)


def test_admit_announced_done_row_is_not_admitted(cursor: Cursor) -> None:
    key = Key(1, 100, 11)
    assert cursor.admit_announced(key, False, END)
    assert not cursor.admit_announced(key, False, END)


# --- Marked rows


def test_admit_marked_row_visible_in_s_is_new_until_it_is_done(cursor: Cursor) -> None:
    """``S`` may pass a marked row before it is announced."""
    key = Key(1, 90, 5)
    assert cursor.admit(key, True, END)
    cursor.advance_to(at(200))
    assert not cursor.admit(key, True, END)


def test_admit_marked_row_that_a_search_has_seen_is_not_new(cursor: Cursor) -> None:
    """The search did not admit it: the client was not interested in its address then."""
    cursor.marked_searched(at(90))
    assert not cursor.admit(Key(1, 89, 5), True, END)
    assert cursor.admit(Key(1, 90, 6), True, END)
    # Also after a failover, which restores old rows that a catch-up finds.
    cursor.advance_to(at(50, boot=2))
    assert not cursor.admit(Key(1, 89, 5), True, END)
    assert cursor.admit(Key(2, 40, 4), True, END)
    # The new server gives out transaction ids again: with an unknown boot they prove nothing.
    assert cursor.admit(Key(0, 60, 4), True, END)


def test_admit_announced_marked_row_searched_since_is_admitted_once(
    cursor: Cursor,
) -> None:
    """A search does not admit announced rows: they are read after it."""
    key = Key(1, 89, 5)
    cursor.marked_searched(at(90))
    assert cursor.admit_announced(key, True, END)
    assert not cursor.admit_announced(key, True, END)


def test_forget_expired_keeps_marked_keys_until_their_messages_expire(cursor: Cursor) -> None:
    early, late = Key(1, 90, 5), Key(1, 91, 6)
    cursor.admit(early, True, 10.0)
    cursor.admit(late, True, 20.0)
    cursor.forget_expired(10.0)
    assert cursor.key_count == 1
    assert not cursor.is_new(late, True)


def test_overdue_is_the_renewal_before_the_last(cursor: Cursor) -> None:
    """A marked row that was visible then should have been announced by now."""
    assert cursor.overdue is None
    cursor.renew(at(110), Position(20, 110), "a")
    assert cursor.overdue is None
    cursor.renew(at(120), Position(30, 120), "b")
    assert cursor.overdue is not None
    assert cursor.overdue.snapshot.xmax == 110
    cursor.renew(at(130), Position(40, 130), "c")
    assert cursor.overdue.snapshot.xmax == 120


def test_is_past_needs_s_and_the_search_for_marked_rows(cursor: Cursor) -> None:
    """A marked row from before a membership may still be announced."""
    began = at(105)
    assert not cursor.is_past(began)
    cursor.advance_to(at(110))
    assert not cursor.is_past(began)
    cursor.marked_searched(at(104))
    assert not cursor.is_past(began)
    cursor.marked_searched(at(106))
    assert cursor.is_past(began)


# --- Renewal


def test_confirm_ping_moves_s_and_forgets_what_it_sees(cursor: Cursor) -> None:
    key = Key(1, 100, 11)
    cursor.admit(key, False, END)
    cursor.renew(at(110), Position(20, 110), "token")
    assert cursor.key_count == 1
    assert cursor.confirm("token")
    assert cursor.key_count == 0
    assert not cursor.is_new(key, False)


def test_renew_ping_not_heard_leaves_s(cursor: Cursor) -> None:
    """A row that the snapshot sees may be in the socket: it is new when it is heard."""
    cursor.renew(at(110), Position(20, 110), "token")
    assert cursor.admit(Key(1, 105, 15), False, END)


def test_confirm_before_the_answer_moves_s_with_the_answer(cursor: Cursor) -> None:
    assert not cursor.confirm("token")
    cursor.renew(at(110), Position(20, 110), "token")
    assert not cursor.is_new(Key(1, 105, 15), False)


def test_confirm_after_discard_pending_leaves_s(cursor: Cursor) -> None:
    """The connection was lost: rows that the snapshot sees may not have been heard."""
    cursor.renew(at(110), Position(20, 110), "token")
    cursor.discard_pending()
    assert not cursor.confirm("token")
    assert cursor.is_new(Key(1, 105, 15), False)


def test_confirm_before_the_answer_then_discard_pending_leaves_s(cursor: Cursor) -> None:
    assert not cursor.confirm("token")
    cursor.discard_pending()
    cursor.renew(at(110), Position(20, 110), "token")
    assert cursor.is_new(Key(1, 105, 15), False)


def test_confirm_while_suspended_leaves_s(cursor: Cursor) -> None:
    """During a catch-up announcements are kept aside, and are not in ``done`` yet."""
    cursor.renew(at(110), Position(20, 110), "token")
    cursor.suspend()
    assert not cursor.confirm("token")
    assert cursor.is_new(Key(1, 105, 15), False)


def test_confirm_late_ping_of_an_older_snapshot_leaves_s(cursor: Cursor) -> None:
    cursor.renew(at(110), Position(20, 110), "old")
    cursor.renew(at(120), Position(30, 120), "new")
    assert cursor.confirm("new")
    assert not cursor.confirm("old")
    assert not cursor.is_new(Key(1, 115, 25), False)


def test_confirm_unknown_token_leaves_s(cursor: Cursor) -> None:
    assert not cursor.confirm("forged")
    assert cursor.is_new(Key(1, 100, 11), False)


def test_advance_to_older_snapshot_is_ignored(cursor: Cursor) -> None:
    cursor.advance_to(at(90))
    assert cursor.has_passed(1, 99)


def test_renew_of_another_boot_discards_snapshots_of_the_last(cursor: Cursor) -> None:
    cursor.renew(at(110), Position(20, 110), "old")
    cursor.renew(at(50, boot=2), Position(9, 50), None)
    assert not cursor.confirm("old")
    assert cursor.low_id() == 0
    assert cursor.overdue is None


# --- Claims in flight


def test_confirm_claim_in_flight_delays_s_until_its_answer(cursor: Cursor) -> None:
    """The snapshot may see rows of a claim whose answer has not arrived."""
    number = cursor.begin_claim()
    cursor.renew(at(110), Position(20, 110), "token")
    assert not cursor.confirm("token")
    claimed = Key(1, 105, 7)
    assert cursor.admit(claimed, False, END)
    cursor.end_claim(number)
    assert cursor.has_passed(1, 105)
    assert not cursor.is_new(claimed, False)


def test_confirm_later_claim_does_not_delay_s(cursor: Cursor) -> None:
    first = cursor.begin_claim()
    cursor.renew(at(110), Position(20, 110), "token")
    cursor.confirm("token")
    second = cursor.begin_claim()
    cursor.end_claim(first)
    assert cursor.has_passed(1, 105)
    cursor.end_claim(second)


def test_end_claim_after_discard_pending_leaves_s(cursor: Cursor) -> None:
    """The answer is lost: a catch-up must find the claimed rows."""
    number = cursor.begin_claim()
    cursor.renew(at(110), Position(20, 110), "token")
    cursor.confirm("token")
    cursor.discard_pending()
    cursor.end_claim(number)
    assert cursor.is_new(Key(1, 105, 7), False)


# --- Bounds


def test_low_id_every_new_row_has_a_larger_one(cursor: Cursor) -> None:
    assert cursor.low_id() == 10
    cursor.renew(at(110, running=(105,)), Position(20, 105), "token")
    cursor.confirm("token")
    assert cursor.low_id() == 20
    cursor.renew(at(130, running=(105,)), Position(40, 105), "next")
    cursor.confirm("next")
    assert cursor.low_id() == 40


def test_low_id_transaction_began_before_the_position_keeps_it_small(cursor: Cursor) -> None:
    """A transaction that runs at ``S`` may have drawn its ids before the position was read."""
    cursor.renew(at(130, running=(105,)), Position(40, 130), "token")
    cursor.confirm("token")
    assert cursor.low_id() == 10


def test_marked_low_id_without_a_search_is_0(cursor: Cursor) -> None:
    assert cursor.marked_low_id() == 0
    cursor.renew(at(110), Position(20, 110), None)
    cursor.renew(at(120), Position(30, 120), None)
    overdue = cursor.overdue
    assert overdue is not None
    cursor.marked_searched(overdue)
    assert cursor.marked_low_id() == 20


def test_note_position_many_renewals_keep_a_bounded_number(cursor: Cursor) -> None:
    for number in range(1_000):
        moment = at(110 + number)
        cursor.renew(moment, Position(20 + number, 110 + number), str(number))
        cursor.confirm(str(number))
        if cursor.overdue is not None:
            cursor.marked_searched(cursor.overdue)
    assert len(cursor._positions) < 10
    assert cursor.key_count == 0


def test_discard_pending_often_keeps_no_snapshots(cursor: Cursor) -> None:
    """Without notifications, as through a pooler, nothing grows."""
    for number in range(1_000):
        cursor.renew(at(110 + number), Position(20 + number, 110 + number), f"t{number}")
        cursor.discard_pending()
    assert not cursor._pending


@given(
    st.lists(
        st.tuples(
            st.sampled_from(
                ["begin", "commit", "hear", "renew", "ping", "lose", "catch up", "crash"]
            ),
            st.integers(0, 5),
        ),
        max_size=60,
    )
)
def test_cursor_any_interleaving_admits_each_row_exactly_once(
    steps: list[tuple[str, int]],
) -> None:
    """One client, a socket in commit order, and transactions with one row each."""
    cursor = Cursor()
    boot, next_xid, last_id = 1, 10, 0
    open_rows: list[Key] = []
    committed: list[Key] = []
    socket: list[Key | str] = []
    taken: list[Key] = []
    tokens = 0

    def now() -> Moment:
        return at(next_xid, boot, tuple(sorted(key.xid for key in open_rows)))

    def take(key: Key) -> None:
        if cursor.admit(key, False, math.inf):
            taken.append(key)

    def catch_up() -> None:
        moment = now()
        cursor.note_position(moment, Position(last_id, next_xid))
        low_id = cursor.low_id()
        for key in sorted(committed, key=lambda key: key.id):
            if cursor.is_new(key, False):
                assert key.id > low_id or key.boot != boot
            take(key)
        cursor.advance_to(moment)
        cursor.resume()

    catch_up()
    for step, number in steps:
        if step == "begin":
            last_id += 1
            open_rows.append(Key(boot, next_xid, last_id))
            next_xid += 1
        elif step == "commit" and open_rows:
            key = open_rows.pop(number % len(open_rows))
            committed.append(key)
            socket.append(key)
        elif step in ("hear", "ping") and socket:
            heard = socket.pop(0)
            if isinstance(heard, str):
                cursor.confirm(heard)
            else:
                take(heard)
        elif step == "renew":
            tokens += 1
            cursor.renew(now(), Position(last_id, next_xid), str(tokens))
            socket.append(str(tokens))
        elif step == "lose":
            socket.clear()
            cursor.discard_pending()
            catch_up()
        elif step == "catch up":
            catch_up()
        elif step == "crash":
            open_rows.clear()
            socket.clear()
            boot, next_xid = boot + 1, max(next_xid - number, 10)
            cursor.discard_pending()
            catch_up()
        assert len(taken) == len(set(taken))
    while socket:
        heard = socket.pop(0)
        if isinstance(heard, str):
            cursor.confirm(heard)
        else:
            take(heard)
    assert set(taken) == set(committed)


def test_note_position_of_an_earlier_boot_changes_nothing(cursor: Cursor) -> None:
    """The answer of the old server arrives after the answer of the new one."""
    cursor.note_position(at(50, boot=2), Position(4, 50))
    cursor.note_position(at(200), Position(90, 200))
    cursor.renew(at(200), Position(90, 200), "late")
    assert cursor.latest_boot == cursor.known_boot == 2
    assert not cursor.confirm("late")


def test_marked_searched_earlier_moment_changes_nothing(cursor: Cursor) -> None:
    """Two searches overlapped, and the earlier one ended last."""
    cursor.marked_searched(at(200))
    cursor.marked_searched(at(150))
    assert cursor.has_searched_marked(1, 199)


def test_boot_of_row_without_a_boot_is_the_latest(cursor: Cursor) -> None:
    """A promoted standby gives out transaction ids again.

    A snapshot of an earlier boot must not see the row.
    """
    unknown = Row(5, 90, 0, True, "message", "room", None, None, b"", END)
    since = at(100)
    assert since.sees(cursor.boot_of(unknown), unknown.xid)
    cursor.note_position(at(80, boot=2), Position(4, 80))
    assert not since.sees(cursor.boot_of(unknown), unknown.xid)
    assert cursor.boot_of(unknown._replace(boot=1)) == 1
