"""Snapshots and moments: what had been committed, and which of two is later."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pg_layer._state.snapshot import Moment, Snapshot


@st.composite
def histories(draw: st.DrawFn) -> list[Moment]:
    """Return moments of a server, in the order in which they were taken."""
    moments, running, next_xid, boot = [], set[int](), 10, 1
    for step in draw(st.lists(st.integers(0, 9), max_size=25)):
        if step < 4:
            running.add(next_xid)
            next_xid += 1
        elif step < 7 and running:
            running.discard(sorted(running)[step % len(running)])
        elif step == 9 and draw(st.booleans()):
            boot, next_xid = boot + 1, max(next_xid - 5, 10)
            running.clear()
        else:
            xmin = min(running, default=next_xid)
            text = f"{xmin}:{next_xid}:{','.join(map(str, sorted(running)))}"
            moments.append(Moment(boot, Snapshot(text)))
    return moments


@pytest.mark.parametrize(
    ("xid", "is_seen"),
    [(99, True), (100, False), (101, True), (103, False), (104, True), (105, False), (200, False)],
)
def test_snapshot_sees_what_had_ended(xid: int, is_seen: bool) -> None:
    assert Snapshot("100:105:100,103").sees(xid) is is_seen


def test_snapshot_without_running_transactions_sees_all_before() -> None:
    snapshot = Snapshot("100:100:")
    assert (snapshot.xmin, snapshot.xmax) == (100, 100)
    assert snapshot.sees(99)
    assert not snapshot.sees(100)
    assert repr(snapshot) == "Snapshot('100:100:')"


def test_moment_sees_all_rows_of_earlier_boots_and_none_of_later() -> None:
    """After a crash transaction ids are given out again: the boot is what differs."""
    moment = Moment(5, Snapshot("100:100:"))
    assert moment.sees(4, 10_000)
    assert not moment.sees(6, 1)
    assert moment.sees(5, 99)
    assert not moment.sees(5, 100)


def test_moment_of_a_later_boot_is_later_and_covers() -> None:
    old, new = Moment(4, Snapshot("900:900:")), Moment(5, Snapshot("100:100:"))
    assert new.is_later(old)
    assert new.covers(old)
    assert not old.is_later(new)
    assert not old.covers(new)


def test_moment_covers_only_if_no_transaction_of_the_other_runs() -> None:
    before = Moment(1, Snapshot("100:105:"))
    assert not Moment(1, Snapshot("103:110:103")).covers(before)
    assert Moment(1, Snapshot("105:110:105")).covers(before)


@given(histories(), st.data())
def test_moment_taken_later_sees_all_that_an_earlier_one_sees(
    history: list[Moment], data: st.DataObject
) -> None:
    if not history:
        return
    first = data.draw(st.integers(0, len(history) - 1))
    second = data.draw(st.integers(first, len(history) - 1))
    before, after = history[first], history[second]
    assert after.is_later(before)
    if before.boot == after.boot:
        for xid in range(5, before.snapshot.xmax + 1):
            assert after.sees(after.boot, xid) or not before.sees(before.boot, xid)
    if after.is_later(before) and before.is_later(after):
        assert (before.snapshot.xmin, before.snapshot.xmax) == (
            after.snapshot.xmin,
            after.snapshot.xmax,
        )
    if after.covers(before):
        for xid in range(5, before.snapshot.xmax + 1):
            assert after.sees(before.boot, xid) or not before.sees(before.boot, xid)
