"""The mirror of memberships: both directions agree, and the change with the largest id counts."""

from __future__ import annotations

import math
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pg_layer import membership
from pg_layer.mailbox import Mailbox
from pg_layer.membership import Member, Memberships

A = Mailbox("a", 10)
B = Mailbox("b", 10)
MAILBOXES = (A, B)


def pairs(memberships: Memberships) -> set[tuple[str, str]]:
    return {(group, member.mailbox.channel) for group, member in memberships.all()}


def of_group(memberships: Memberships, group: str) -> list[Member]:
    """Who is in a group, and who was of late."""
    members, times = memberships.of_group(group)
    return members + [member for each in times for member in each]


def test_channels_join_and_leave() -> None:
    memberships = Memberships()
    assert not memberships
    memberships.join("g", A, 1, 50.0)
    memberships.join("g", B, 2, math.inf)
    memberships.join("h", A, 3, 60.0)
    assert memberships
    assert len(memberships) == 3
    assert of_group(memberships, "g") == [Member(A, 1, 1, 50.0), Member(B, 2, 2, math.inf)]
    assert sorted(memberships.of_channel("a")) == ["g", "h"]
    memberships.leave("g", "a", 4)
    assert pairs(memberships) == {("g", "b"), ("h", "a")}
    assert memberships.of_channel("a") == ["h"]
    memberships.leave("h", "a", 5)
    assert not memberships.is_member("a")
    assert memberships.is_member("b")
    assert len(memberships) == 1
    assert of_group(memberships, "nobody") == []


def test_who_has_left_is_kept_a_while_for_what_was_sent_before() -> None:
    memberships = Memberships()
    memberships.join("g", A, 1, 50.0)
    memberships.leave("g", "a", 4)
    assert not memberships
    assert pairs(memberships) == set()
    (member,) = of_group(memberships, "g")
    assert member.has_left
    assert (member.since, member.until) == (1, 4)
    memberships.forget_left()
    assert of_group(memberships, "g") == [member]
    memberships.forget_left()
    assert of_group(memberships, "g") == []


def test_who_left_again_meanwhile_is_kept_longer() -> None:
    memberships = Memberships()
    memberships.join("g", A, 1, 50.0)
    memberships.leave("g", "a", 4)
    memberships.forget_left()
    memberships.join("g", A, 6, 50.0)
    memberships.leave("g", "a", 8)
    memberships.forget_left()
    assert {(member.since, member.until) for member in of_group(memberships, "g")} == {(1, 4), (6, 8)}
    memberships.forget_left()
    assert of_group(memberships, "g") == []


def test_who_has_come_back_is_not_forgotten_with_those_who_left() -> None:
    memberships = Memberships()
    memberships.join("g", A, 1, 50.0)
    memberships.leave("g", "a", 4)
    memberships.join("g", A, 6, 50.0)
    assert pairs(memberships) == {("g", "a")}
    memberships.forget_left()
    memberships.forget_left()
    assert of_group(memberships, "g") == [Member(A, 6, 6, 50.0)]


def test_leaving_what_one_is_not_in_does_nothing() -> None:
    memberships = Memberships()
    memberships.join("g", A, 1, 50.0)
    memberships.leave("g", "b", 2)
    memberships.leave("nobody", "a", 2)
    assert pairs(memberships) == {("g", "a")}


def test_who_joins_again_has_missed_nothing_and_stays_longer() -> None:
    memberships = Memberships()
    memberships.join("g", A, 5, 50.0)
    memberships.join("g", A, 9, 70.0)
    assert of_group(memberships, "g") == [Member(A, 5, 9, 70.0)]
    # A row about an earlier joining, read late.
    memberships.join("g", A, 3, 40.0)
    assert of_group(memberships, "g") == [Member(A, 3, 9, 70.0)]
    assert len(memberships) == 1


def test_an_older_leave_does_not_undo_a_joining() -> None:
    memberships = Memberships()
    memberships.join("g", A, 2, 50.0)
    memberships.join("g", A, 6, 50.0)
    memberships.leave("g", "a", 5)
    assert pairs(memberships) == {("g", "a")}
    memberships.leave("g", "a", 7)
    assert pairs(memberships) == set()


def test_an_older_joining_does_not_undo_a_leave() -> None:
    memberships = Memberships()
    memberships.join("h", A, 3, 50.0)
    memberships.leave("g", "a", 6)
    memberships.join("g", A, 5, 50.0)
    memberships.join("h", A, 5, 50.0)
    memberships.join("g", B, 5, 50.0)
    assert pairs(memberships) == {("h", "a"), ("g", "b")}
    memberships.join("g", A, 7, 50.0)
    assert ("g", "a") in pairs(memberships)


def test_what_is_dropped_may_come_back() -> None:
    memberships = Memberships()
    memberships.join("g", A, 5, 50.0)
    memberships.drop("g", "a")
    memberships.drop("g", "b")
    memberships.drop("nobody", "a")
    assert not memberships
    memberships.join("g", A, 4, 50.0)
    assert pairs(memberships) == {("g", "a")}


def test_after_a_reconnect_ids_known_before_keep_nobody_out() -> None:
    memberships = Memberships()
    memberships.join("g", A, 100, 50.0)
    memberships.leave("h", "b", 100)
    memberships.flush(99)
    memberships.ids_begin_anew(80)
    # A server that hands ids out again.
    assert of_group(memberships, "g")[0].since < 0
    memberships.join("h", B, 90, 50.0)
    assert pairs(memberships) == {("g", "a"), ("h", "b")}


def test_only_so_many_times_of_leaving_are_remembered() -> None:
    memberships = Memberships()
    for number in range(1, 100, 2):
        memberships.join("g", A, number, 50.0)
        memberships.leave("g", "a", number + 1)
    spans = [(member.since, member.until) for member in of_group(memberships, "g")]
    assert spans == [(93, 94), (95, 96), (97, 98), (99, 100)]


def test_who_leaves_and_joins_again_is_due_what_was_sent_before() -> None:
    memberships = Memberships()
    memberships.join("g", A, 1, 50.0)
    memberships.leave("g", "a", 5)
    memberships.join("g", A, 7, 50.0)
    memberships.leave("g", "a", 9)
    spans = {(member.since, member.until) for member in of_group(memberships, "g")}
    assert spans == {(1, 5), (7, 9)}
    memberships.forget_left()
    memberships.forget_left()
    assert of_group(memberships, "g") == []


@pytest.mark.parametrize("next_id", [7, 1000])
@pytest.mark.parametrize("change", ["leave", "flush"])
def test_after_a_reconnect_an_older_change_still_does_not_undo_a_joining(change: str, next_id: int) -> None:
    memberships = Memberships()
    memberships.join("g", A, 6, 50.0)
    memberships.ids_begin_anew(next_id)
    if change == "leave":
        memberships.leave("g", "a", 5)
    else:
        memberships.flush(5)
    assert pairs(memberships) == {("g", "a")}


@pytest.mark.parametrize("change", ["leave", "flush"])
def test_after_a_reconnect_a_change_undoes_a_joining_whose_id_is_handed_out_again(change: str) -> None:
    memberships = Memberships()
    memberships.join("g", A, 100, 50.0)
    memberships.ids_begin_anew(80)
    if change == "leave":
        memberships.leave("g", "a", 80)
    else:
        memberships.flush(80)
    assert pairs(memberships) == set()


def test_only_so_many_leaves_are_remembered() -> None:
    memberships = Memberships()
    for number in range(membership.LEFT_MOST + 1):
        memberships.leave(f"g{number}", "a", 10)
    memberships.join("g0", A, 5, 50.0)
    memberships.join("g1", A, 5, 50.0)
    assert pairs(memberships) == {("g0", "a")}


def test_who_was_put_back_and_had_left_is_a_ghost() -> None:
    memberships = Memberships()
    for group in ("g", "h", "i"):
        memberships.join(group, A, 1, math.inf)
    memberships.leave("g", "a", 2)
    assert not memberships.has_ghosts
    memberships.put_back([("g", "a"), ("h", "a")])
    assert memberships.ghosts() == [("g", "a")]  # it has left while it was put back
    memberships.leave("h", "a", 3)  # and it before, as is known only now
    memberships.leave("i", "a", 4)  # and it was never put back
    assert sorted(memberships.ghosts()) == [("g", "a"), ("h", "a")]
    memberships.banished([("g", "a")])
    assert memberships.ghosts() == [("h", "a")]
    memberships.join("h", A, 5, math.inf)
    assert not memberships.has_ghosts


def test_what_has_ended_is_dropped() -> None:
    memberships = Memberships()
    memberships.join("g", A, 1, 50.0)
    memberships.join("g", B, 1, 50.1)
    memberships.join("h", A, 1, math.inf)
    memberships.drop_expired(50.0)
    assert pairs(memberships) == {("g", "b"), ("h", "a")}
    memberships.drop_expired(51.0)
    assert pairs(memberships) == {("h", "a")}
    assert memberships.of_channel("b") == []


def test_a_flush_forgets_what_joined_before_it() -> None:
    memberships = Memberships()
    memberships.join("g", A, 5, 50.0)
    memberships.join("g", B, 6, 50.0)
    memberships.join("h", A, 2, 50.0)
    memberships.join("h", A, 8, 50.0)
    memberships.flush(6)
    assert pairs(memberships) == {("h", "a")}
    memberships.flush(9)
    assert not memberships


CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["join", "join", "leave", "drop", "flush", "expire", "forget", "reconnect"]),
        st.sampled_from("gh"),
        st.sampled_from(MAILBOXES),
        st.integers(0, 9),
    ),
    max_size=30,
)


@settings(deadline=None)
@given(CHANGES)
def test_both_directions_always_agree(changes: list[tuple[str, str, Mailbox, int]]) -> None:
    memberships = Memberships()
    for change, group, mailbox, number in changes:
        if change == "join":
            memberships.join(group, mailbox, number, float(number))
        elif change == "leave":
            memberships.leave(group, mailbox.channel, number)
        elif change == "flush":
            memberships.flush(number)
        elif change == "drop":
            memberships.drop(group, mailbox.channel)
        elif change == "expire":
            memberships.drop_expired(number)
        elif change == "forget":
            memberships.forget_left()
        else:
            memberships.ids_begin_anew(number)
        all_pairs = pairs(memberships)
        assert len(memberships) == len(all_pairs)
        assert bool(memberships) is bool(all_pairs)
        assert all_pairs == {
            (group, member.mailbox.channel)
            for group in "gh"
            for member in of_group(memberships, group)
            if not member.has_left
        }
        for mailbox in MAILBOXES:
            of_channel = {group for group, channel in all_pairs if channel == mailbox.channel}
            assert set(memberships.of_channel(mailbox.channel)) == of_channel
            assert memberships.is_member(mailbox.channel) is bool(of_channel)


@settings(deadline=None)
@given(
    st.permutations(range(6)),
    st.lists(st.sampled_from(["join", "leave", "flush"]), min_size=6, max_size=6),
)
def test_changes_count_by_their_ids_in_whatever_order_they_become_known(
    order: list[int], changes: list[str]
) -> None:
    memberships = Memberships()
    for id in order:
        if changes[id] == "join":
            memberships.join("g", A, id, 50.0)
        elif changes[id] == "leave":
            memberships.leave("g", "a", id)
        else:
            memberships.flush(id)
    assert bool(memberships) is (changes[5] == "join")


def test_threads_may_change_it_at_once() -> None:
    memberships = Memberships()
    begun = threading.Barrier(4)

    def work(name: str) -> None:
        mailbox = Mailbox(name, 10)
        begun.wait()
        for number in range(200):
            memberships.join(f"g{number % 5}", mailbox, number, 50.0)
            of_group(memberships, "g0")
            memberships.drop_expired(10.0)
            if number % 5:
                memberships.leave(f"g{number % 5}", name, number + 1)

    threads = [threading.Thread(target=work, args=(name,)) for name in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert pairs(memberships) == {("g0", name) for name in "abcd"}
