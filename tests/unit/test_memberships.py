"""Memberships in the memory of the owner: ``docs/protocols.md``, section 4."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pg_layer._state import memberships as module
from pg_layer._state.channel_queue import ChannelQueue
from pg_layer._state.memberships import Memberships
from pg_layer._state.snapshot import Moment, Snapshot

QUEUES = {name: ChannelQueue(name, 10) for name in "xyz"}


def at(xid: int, boot: int = 1) -> Moment:
    """The moment in which the transactions before ``xid`` had ended."""
    return Moment(boot, Snapshot(f"{xid}:{xid}:"))


def channels(memberships: Memberships, group: str) -> list[str]:
    return [member.channel for member in memberships.members(group)]


@pytest.fixture
def memberships() -> Memberships:
    return Memberships()


def test_add_and_discard_change_both_directions(memberships: Memberships) -> None:
    memberships.add("g", QUEUES["x"], math.inf, at(1))
    memberships.add("g", QUEUES["y"], math.inf, at(1))
    memberships.add("h", QUEUES["x"], math.inf, at(1))
    assert channels(memberships, "g") == ["x", "y"]
    assert (len(memberships), set(memberships.groups)) == (3, {"g", "h"})
    assert memberships.discard("g", "x")
    assert memberships.is_member("x")
    assert memberships.discard("h", "x")
    assert not memberships.is_member("x")
    assert set(memberships.groups) == {"g"}
    assert memberships.pairs() == [("g", "y")]


def test_discard_of_no_member_returns_false(memberships: Memberships) -> None:
    assert not memberships.discard("g", "x")
    memberships.add("g", QUEUES["x"], math.inf, None)
    assert not memberships.discard("g", "y")
    assert not memberships.discard("h", "x")
    assert len(memberships) == 1


def test_get_returns_a_member_or_none(memberships: Memberships) -> None:
    memberships.add("g", QUEUES["x"], 5.0, None)
    member = memberships.get("g", "x")
    assert member is not None
    assert (member.queue, member.expires_at, member.since) == (QUEUES["x"], 5.0, None)
    assert memberships.get("g", "y") is None
    assert memberships.get("h", "x") is None
    assert list(memberships.members("h")) == []


def test_add_again_prolongs_and_keeps_the_beginning(memberships: Memberships) -> None:
    """A repeated add must not hide messages that were sent after the first one."""
    first = at(10)
    memberships.add("g", QUEUES["x"], 5.0, first)
    memberships.add("g", QUEUES["x"], 9.0, at(20))
    member = memberships.get("g", "x")
    assert member is not None
    assert (member.expires_at, member.since) == (9.0, first)


def test_add_after_discard_begins_at_the_new_moment(memberships: Memberships) -> None:
    memberships.add("g", QUEUES["x"], math.inf, at(10))
    memberships.discard("g", "x")
    memberships.add("g", QUEUES["x"], math.inf, at(20))
    member = memberships.get("g", "x")
    assert member is not None
    assert member.since is not None
    assert member.since.sees(1, 15)


def test_grow_old_forgets_only_beginnings_that_are_past(memberships: Memberships) -> None:
    memberships.add("g", QUEUES["x"], math.inf, at(10))
    memberships.add("g", QUEUES["y"], math.inf, at(20))
    memberships.forget_past(at(15).covers)
    since = {member.channel: member.since for member in memberships.members("g")}
    assert since == {"x": None, "y": since["y"]}
    assert since["y"] is not None
    memberships.discard("g", "x")
    memberships.forget_past(at(25).covers)
    assert [member.since for member in memberships.members("g")] == [None]


def test_expire_removes_what_has_ended(memberships: Memberships) -> None:
    memberships.add("g", QUEUES["x"], 10.0, at(1))
    memberships.add("g", QUEUES["y"], 11.0, None)
    memberships.add("h", QUEUES["x"], math.inf, None)
    assert memberships.expire(10.0) == [("g", "x")]
    assert memberships.pairs() == [("g", "y"), ("h", "x")]


def test_flush_removes_what_began_before_it(memberships: Memberships) -> None:
    """A flush in transaction 15: a membership that began in a snapshot that sees it is later."""
    memberships.add("g", QUEUES["x"], math.inf, at(10))
    memberships.add("g", QUEUES["y"], math.inf, at(16))
    memberships.add("h", QUEUES["z"], math.inf, None)
    assert memberships.flush(1, 15) == [("g", "x"), ("h", "z")]
    assert memberships.pairs() == [("g", "y")]


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "discard", "grow old", "expire", "flush"]),
            st.sampled_from("gh"),
            st.sampled_from("xyz"),
            st.integers(1, 30),
        )
    )
)
def test_memberships_any_changes_agree_with_a_plain_set(
    changes: list[tuple[str, str, str, int]],
) -> None:
    memberships = Memberships()
    expected: dict[tuple[str, str], float] = {}
    began: dict[tuple[str, str], int | None] = {}
    for change, group, channel, number in changes:
        pair = (group, channel)
        if change == "add":
            if pair not in expected:
                began[pair] = number
            expected[pair] = float(number)
            memberships.add(group, QUEUES[channel], float(number), at(number))
        elif change == "discard":
            assert memberships.discard(*pair) is (expected.pop(pair, None) is not None)
        elif change == "grow old":
            memberships.forget_past(at(number).covers)
            for each in expected:
                if (xid := began[each]) is not None and xid <= number:
                    began[each] = None
        else:
            if change == "expire":
                gone = [each for each, end in expected.items() if end <= number]
                assert sorted(memberships.expire(number)) == sorted(gone)
            else:
                gone = [each for each in expected if (began[each] or 0) <= number]
                assert sorted(memberships.flush(1, number)) == sorted(gone)
            for each in gone:
                del expected[each]
        assert sorted(memberships.pairs()) == sorted(expected)
        assert len(memberships) == len(expected)
        assert {channel for _, channel in expected} == {
            name for name in "xyz" if memberships.is_member(name)
        }
        for each in expected:
            member = memberships.get(*each)
            assert member is not None
            assert (member.since is None) is (began[each] is None)


# ---------------------------------------------------------------------- requests that the owner has overruled


def test_discard_before_an_own_add_ends_the_membership_until_that_add(
    memberships: Memberships,
) -> None:
    """A transaction 5 has asked for the discard; the owner adds the channel at 10 and again at 20."""
    memberships.add("g", QUEUES["x"], math.inf, None)
    first, second = at(10), at(20)
    for moment in (first, second):
        memberships.add("g", QUEUES["x"], math.inf, moment)
        memberships.note_own_change([("g", "x")], moment)
    assert memberships.resolve_against_own_change("g", "x", 1, 5, None)
    member = memberships.get("g", "x")
    assert member is not None
    assert member.since is first
    memberships.forget_past(lambda moment: moment is first)
    assert member.since is None


def test_add_before_an_own_add_begins_the_membership_earlier(memberships: Memberships) -> None:
    added, own = at(4), at(10)
    memberships.add("g", QUEUES["x"], math.inf, own)
    memberships.note_own_change([("g", "x")], own)
    assert memberships.resolve_against_own_change("g", "x", 1, 5, added)
    member = memberships.get("g", "x")
    assert member is not None
    assert member.since is added
    assert memberships.resolve_against_own_change("g", "x", 1, 6, None)
    assert member.since is own


def test_request_after_the_last_own_change_is_not_overruled(memberships: Memberships) -> None:
    memberships.add("g", QUEUES["x"], math.inf, at(10))
    memberships.note_own_change([("g", "x")], at(10))
    assert not memberships.resolve_against_own_change("g", "x", 1, 15, None)
    assert not memberships.resolve_against_own_change("g", "y", 1, 5, None)
    memberships.forget_past(lambda moment: True)
    assert not memberships.resolve_against_own_change("g", "x", 1, 5, None)


def test_is_given_up_an_earlier_number_of_the_same_client_is() -> None:
    memberships = Memberships()
    pair = ("room", "specific.1!1")
    assert not memberships.is_stale_request(pair, "client", 5, 100)
    assert not memberships.is_stale_request(
        pair, "client", 5, 100
    )  # the same control message once more
    assert memberships.is_stale_request(
        pair, "client", 5, 101
    )  # the statement was repeated, and both arrived
    assert memberships.is_stale_request(pair, "client", 4, 102)
    assert not memberships.is_stale_request(pair, "other", 4, 103)
    assert not memberships.is_stale_request(("hall", "specific.1!1"), "client", 4, 104)
    assert not memberships.is_stale_request(pair, "client", 6, 105)


def test_begins_not_before_the_owners_own_last_change() -> None:
    """An open transaction has asked for an add. Meanwhile the channel was a member, received, and left."""
    memberships = Memberships()
    pair = ("room", "x")
    asked, joined, left, later = at(100), at(120), at(130), at(140)
    assert memberships.start_of(pair, 1, 150, asked) is asked
    memberships.note_own_change([pair], joined)
    memberships.note_own_change([pair], left)
    assert memberships.start_of(pair, 1, 150, asked) is left
    assert memberships.start_of(pair, 1, 150, later) is later
    assert memberships.start_of(pair, 1, 125, asked) is asked  # the owner has left after that


def test_is_given_up_remembers_the_last_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_REQUESTS", 2)
    memberships = Memberships()
    pairs = [("room", f"specific.1!{n}") for n in range(3)]
    for pair in pairs:
        assert not memberships.is_stale_request(pair, "client", 5, 100)
    assert memberships.is_stale_request(pairs[2], "client", 4, 101)
    assert memberships.is_stale_request(pairs[1], "client", 4, 102)
    assert not memberships.is_stale_request(pairs[0], "client", 4, 103)
