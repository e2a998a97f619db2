"""The ledger of a soak: lost, doubled and disordered messages, and excused ones."""

from __future__ import annotations

import math

import pytest

from soak.absences import HEARTBEAT, LEASE, RETURN
from soak.ledger import (
    CRASH,
    DELIVERED_MOST,
    FOUND_MOST,
    KILLED,
    LEFT,
    LEFT_GROUP,
    NO_LEASE,
    PROMOTION,
    TAKEN_MOST,
    UNDONE_JOIN,
    UNEXPLAINED,
    Ledger,
    Tally,
    settle,
)
from soak.records import (
    EVERY_PROCESS,
    Away,
    Begun,
    Cancelled,
    Closed,
    Complaint,
    Crash,
    Ended,
    Fault,
    Gone,
    Got,
    Joined,
    Joining,
    Kind,
    Leaving,
    Opened,
    Outcome,
    Promotion,
    Record,
    Undone,
    decode,
    encode,
)
from soak.records import Left as HasLeft
from soak.report import describe

CHANNEL = "specific.a!1"


def sent(
    n: int,
    kind: Kind = "specific",
    stream: str = CHANNEL,
    at: float | None = None,
    outcome: Outcome = "returned",
) -> list[Record]:
    """Message ``n`` is sent at that time, by default at ``n`` seconds."""
    at = float(n) if at is None else at
    return [Begun(at, "w", n, kind, stream), Ended(at + 0.1, "w", n, outcome)]


def got(*numbers: int, channel: str = CHANNEL, after: float = 0.2) -> list[Record]:
    """Those messages are received, each a moment after it was sent."""
    return [Got(n + after, channel, "w", n) for n in numbers]


def ledger(
    writer: list[Record],
    reader: list[Record],
    faults: list[Record] | None = None,
    **others: list[Record],
) -> Ledger:
    return settle({"writer": writer, "reader": reader, "faults": faults or [], **others})


def tally(found: Ledger, kind: Kind = "specific") -> Tally:
    return found.tallies[kind]


def causes(found: Ledger, kind: Kind = "specific") -> dict[str, int]:
    return {cause: count for cause, count in tally(found, kind).lost.items() if count}


OPENED: list[Record] = [Opened(0, CHANNEL)]


def test_settle_all_received_is_clean() -> None:
    found = ledger([*sent(1), *sent(2)], [*OPENED, *got(1, 2)])
    assert found.is_clean
    assert (tally(found).returned, tally(found).delivered, causes(found)) == (2, 2, {})
    assert "All promises kept." in describe(found)


def test_settle_message_not_received_is_lost() -> None:
    found = ledger([*sent(1), *sent(2)], [*OPENED, *got(2)])
    assert not found.is_clean
    assert causes(found) == {UNEXPLAINED: 1}
    assert "w#1" in found.offences[0]
    assert "PROMISES BROKEN." in describe(found)


@pytest.mark.parametrize("kind", ["specific", "normal"])
def test_settle_message_received_twice_is_counted(kind: Kind) -> None:
    stream = CHANNEL if kind == "specific" else "jobs"
    found = ledger(
        sent(1, kind, stream), [*OPENED, *got(1, channel=stream)], other=[Got(5, stream, "w", 1)]
    )
    assert not found.is_clean
    assert tally(found, kind).twice == 1


@pytest.mark.parametrize(("kind", "disordered"), [("specific", 1), ("single", 1), ("normal", 0)])
def test_settle_order_counts_if_it_is_promised(kind: Kind, disordered: int) -> None:
    stream = CHANNEL if kind == "specific" else "line"
    found = ledger(
        [*sent(1, kind, stream), *sent(2, kind, stream)],
        [*OPENED, Got(3, stream, "w", 2), Got(3, stream, "w", 1)],
    )
    assert tally(found, kind).disordered == disordered
    assert found.is_clean == (not disordered)


@pytest.mark.parametrize(("kind", "disordered"), [("specific", 1), ("single", 0)])
def test_settle_job_of_a_transaction_may_come_after_later_ones(kind: Kind, disordered: int) -> None:
    """A consumer receives in commit order. A worker may get a job of a transaction later."""
    stream = CHANNEL if kind == "specific" else "line"
    first: list[Record] = [
        Begun(1, "w", 1, kind, stream, in_transaction=True),
        Ended(1.1, "w", 1, "returned"),
    ]
    found = ledger(
        [*first, *sent(2, kind, stream)], [*OPENED, Got(3, stream, "w", 2), Got(3, stream, "w", 1)]
    )
    assert tally(found, kind).disordered == disordered


@pytest.mark.parametrize("comes", [True, False])
def test_settle_unknown_outcome_may_come_at_any_time_or_not(comes: bool) -> None:
    messages = [*sent(1, outcome="unknown"), *sent(2)]
    late: list[Record] = [Got(3, CHANNEL, "w", 1)] if comes else []
    found = ledger(messages, [*OPENED, *got(2), *late])
    assert found.is_clean
    assert tally(found).unknown == 1


def test_settle_send_that_did_not_end_is_unknown() -> None:
    found = ledger([Begun(1, "w", 1, "specific", CHANNEL)], OPENED)
    assert found.is_clean
    assert tally(found).unknown == 1


def test_settle_refused_message_received_is_uninvited() -> None:
    assert ledger(sent(1, outcome="refused"), OPENED).is_clean
    found = ledger(sent(1, outcome="refused"), [*OPENED, *got(1)])
    assert not found.is_clean
    assert tally(found).uninvited == 1


def test_settle_message_on_another_channel_is_uninvited() -> None:
    found = ledger(sent(1), [*OPENED, Opened(0, "specific.a!2"), *got(1, channel="specific.a!2")])
    assert tally(found).uninvited == 1
    assert causes(found) == {UNEXPLAINED: 1}


def test_settle_message_that_was_never_sent_raises() -> None:
    with pytest.raises(ValueError, match="never sent"):
        ledger([], [*OPENED, *got(1)])


# ---------------------------------------------------------------------- what is excused


@pytest.mark.parametrize(
    ("at", "cause"), [(8.0, UNEXPLAINED), (9.5, CRASH), (10.2, CRASH), (10.6, UNEXPLAINED)]
)
def test_crash_excuses_losses_of_the_last_second(at: float, cause: str) -> None:
    found = ledger([*sent(1, at=at), *sent(20)], [*OPENED, *got(20)], [Crash(10.0, 10.5)])
    assert causes(found) == {cause: 1}


@pytest.mark.parametrize(("was_killed", "cause"), [(True, KILLED), (False, LEFT)])
def test_reader_that_ended_excuses_the_messages_after_its_last(
    was_killed: bool, cause: str
) -> None:
    """Messages before the last received one, or sent after its end, are not excused."""
    gone = Gone(2.5, "reader", was_killed)
    assert causes(ledger([*sent(1), *sent(2)], [*OPENED, *got(1)], [gone])) == {cause: 1}
    # But not from the middle, and not later than it lived.
    assert causes(ledger([*sent(1), *sent(2)], [*OPENED, *got(2)], [gone])) == {UNEXPLAINED: 1}
    assert causes(ledger(sent(3), OPENED, [gone])) == {}


def test_closed_channel_excuses_messages_it_had_not_received() -> None:
    assert causes(ledger(sent(1), [*OPENED, Closed(1.5, CHANNEL)])) == {LEFT: 1}


def test_killed_worker_excuses_a_limited_number_of_jobs() -> None:
    count = TAKEN_MOST + 1
    jobs = [record for n in range(1, count + 2) for record in sent(n, "normal", "jobs", at=1.0)]
    done = got(count + 1, channel="jobs")
    assert causes(ledger(jobs, done, [Gone(5, "reader", True)]), "normal") == {
        KILLED: TAKEN_MOST,
        UNEXPLAINED: 1,
    }


@pytest.mark.parametrize(
    "gone", [Gone(5, "reader", False), Gone(0.5, "reader", True), Gone(5, "other", True)]
)
def test_lost_job_is_not_excused_by_other_ends_of_processes(gone: Gone) -> None:
    jobs = [*sent(1, "normal", "jobs"), *sent(2, "normal", "jobs")]
    assert causes(ledger(jobs, got(2, channel="jobs"), [gone]), "normal") == {UNEXPLAINED: 1}


# ---------------------------------------------------------------------- groups

JOINED: list[Record] = [*OPENED, Joining(1, "g", CHANNEL), Joined(1.5, "g", CHANNEL)]
LEAVING: list[Record] = [Leaving(9, "g", CHANNEL)]


def group(*numbers: int) -> list[Record]:
    return [record for n in numbers for record in sent(n, "group", "g")]


def test_member_is_owed_messages_sent_during_its_membership() -> None:
    assert ledger(group(1, 2, 9), [*JOINED, *got(2), *LEAVING, HasLeft(9.2, "g", CHANNEL)]).is_clean
    assert ledger(group(1, 2, 9), [*JOINED, *got(1, 2), *LEAVING, *got(9)]).is_clean
    assert causes(ledger(group(2, 3), [*JOINED, *got(3)]), "group") == {UNEXPLAINED: 1}


def test_group_message_is_owed_to_each_member() -> None:
    other = "specific.b!1"
    found = ledger(
        group(2),
        [*JOINED, *got(2)],
        other=[Opened(0, other), Joining(0, "g", other), Joined(0.5, "g", other)],
    )
    assert causes(found, "group") == {UNEXPLAINED: 1}
    assert tally(found, "group").delivered == 1


def test_member_message_from_outside_its_membership_is_early_or_uninvited() -> None:
    early = ledger(sent(1, "group", "g", at=0.2), [*JOINED, Got(2, CHANNEL, "w", 1)])
    assert (tally(early, "group").early, tally(early, "group").uninvited) == (1, 0)
    late = ledger(group(10), [*JOINED, *LEAVING, HasLeft(9.5, "g", CHANNEL), *got(10)])
    assert (tally(late, "group").early, tally(late, "group").uninvited) == (0, 1)
    assert early.is_clean
    assert not late.is_clean


def left(leaving: float) -> list[Record]:
    return [Leaving(leaving, "g", CHANNEL), HasLeft(leaving + 0.5, "g", CHANNEL)]


def test_member_that_leaves_is_owed_only_messages_that_were_due() -> None:
    """The owner's group_discard ends delivery at once."""
    on_its_way = ledger(group(2), [*JOINED, *left(2.3)])
    assert causes(on_its_way, "group") == {LEFT_GROUP: 1}
    assert on_its_way.is_clean
    due = 2.1 + DELIVERED_MOST
    assert causes(ledger(group(2), [*JOINED, *left(due - 0.1)]), "group") == {LEFT_GROUP: 1}
    assert causes(ledger(group(2), [*JOINED, *left(due + 0.1)]), "group") == {UNEXPLAINED: 1}
    # The member had received one that was sent later.
    read_on = [*JOINED, *got(3), *left(3.3)]
    assert causes(ledger(group(2, 3), read_on), "group") == {UNEXPLAINED: 1}
    # It received one only after it had begun to leave: that shows nothing.
    read_on = [*JOINED, *left(3.15), *got(3)]
    assert causes(ledger(group(2, 3), read_on), "group") == {LEFT_GROUP: 1}


@pytest.mark.parametrize(
    ("away", "is_excused"),
    [
        (Away(2.0, 4.0, "reader", True), True),
        (Away(1.0, 1.2, "reader", True), True),  # nothing was received since
        (Away(2.0, 4.0, EVERY_PROCESS, False), True),
        (Away(2.0, 4.0, "other", True), False),
        (Away(9.5, 10.0, "reader", True), False),
    ],
)
def test_member_that_leaves_during_a_catch_up_may_miss_earlier_messages(
    away: Away, is_excused: bool
) -> None:
    """The owner may not have read the messages of its absence before the member leaves."""
    expected = {LEFT_GROUP: 1} if is_excused else {UNEXPLAINED: 1}
    assert causes(ledger(group(2), [*JOINED, *left(9)], [away]), "group") == expected


OTHER = "specific.b!1"


def test_discard_by_another_process_excuses_only_unannounced_messages() -> None:
    """Only a message that is found without an announcement may arrive too late for the member."""
    stay = [*join(CHANNEL), *left(2.3)]
    assert causes(ledger(group(2), OPENED, other=stay), "group") == {UNEXPLAINED: 1}

    def unannounced(leaving: float) -> dict[str, int]:
        sends = pair(("w.0", 2.0, True), outcome="unannounced")
        return causes(ledger(sends, OPENED, other=[*join(CHANNEL), *left(leaving)]), "group")

    assert unannounced(2.3) == {LEFT_GROUP: 1}
    assert unannounced(2.2 + FOUND_MOST) == {UNEXPLAINED: 1}


def join(
    channel: str, group: str = "g", at: float = 0.0, in_transaction: bool = False
) -> list[Record]:
    return [Joining(at, group, channel, in_transaction), Joined(at + 0.2, group, channel)]


@pytest.mark.parametrize(
    ("fault", "in_transaction", "is_excused"),
    [
        (Crash(2.0, 2.5), False, True),
        (Crash(9.0, 9.5), False, False),
        (Crash(2.0, 2.5), True, False),
        (Promotion(1.0, 1.1, 8.0, 9.0), True, True),
        (Promotion(3.0, 3.1, 8.0, 9.0), True, False),
    ],
)
def test_add_by_another_process_may_be_lost_until_its_owner_knows_it(
    fault: Record, in_transaction: bool, is_excused: bool
) -> None:
    """A crash or a promotion can undo a membership that its owner has not read yet."""
    joins = join(CHANNEL, at=1.5, in_transaction=in_transaction)
    sends = sent(12, "group", "g")
    expected = {UNDONE_JOIN: 1} if is_excused else {UNEXPLAINED: 1}
    assert causes(ledger(sends, OPENED, [fault], other=joins), "group") == expected
    # Memberships that the owner knows, or has added itself, do not depend on the database.
    sends = [*sent(2, "group", "g"), *sends]
    assert causes(ledger(sends, [*OPENED, *got(2)], [fault], other=joins), "group") == {
        UNEXPLAINED: 1
    }
    # A message of an earlier stay that is received late shows nothing of this one.
    earlier = [*sent(1, "group", "g", at=0.5), *sent(12, "group", "g")]
    late: list[Record] = [*OPENED, Got(11.0, CHANNEL, "w", 1)]
    stays = [*join(CHANNEL), *left(1.0), *joins]
    assert causes(ledger(earlier, late, [fault], other=stays), "group") == expected
    own = [*OPENED, *joins]
    assert causes(ledger(sent(12, "group", "g"), own, [fault]), "group") == {UNEXPLAINED: 1}


def test_discard_by_another_process_may_be_lost_until_its_owner_knows_it() -> None:
    """A promotion can undo a discard that the owner of the channel has not read yet."""
    leaves: list[Record] = [*join(CHANNEL), Leaving(4, "g", CHANNEL), HasLeft(4.5, "g", CHANNEL)]
    promotion = Promotion(3.0, 3.1, 5.0, 6.0)
    found = ledger(sent(8, "group", "g"), [*OPENED, *got(8)], [promotion], other=leaves)
    assert (tally(found, "group").stayed, tally(found, "group").uninvited) == (1, 0)
    assert found.is_clean
    assert (
        tally(ledger(sent(8, "group", "g"), [*OPENED, *got(8)], other=leaves), "group").uninvited
        == 1
    )
    own = ledger(sent(8, "group", "g"), [*OPENED, *leaves, *got(8)], [promotion])
    assert tally(own, "group").uninvited == 1


def test_membership_change_that_was_rolled_back_has_no_effect() -> None:
    joins: list[Record] = [Joining(1, "g", CHANNEL, True), Undone(2, "g", CHANNEL)]
    found = ledger(sent(1, "group", "g", at=1.1), [*OPENED, *got(1)], other=joins)
    assert tally(found, "group").uninvited == 1
    leaves: list[Record] = [*join(CHANNEL), Leaving(1, "g", CHANNEL, True), Undone(2, "g", CHANNEL)]
    assert causes(ledger(sent(3, "group", "g"), OPENED, other=leaves), "group") == {UNEXPLAINED: 1}


# ---------------------------------------------------------------------- order within a group


def pair(*kinds: tuple[str, float, bool], outcome: Outcome = "returned") -> list[Record]:
    """Message 1 of each writer is sent to the group at a time, in a transaction or not."""
    return [
        record
        for writer, at, in_transaction in kinds
        for record in (
            Begun(at, writer, 1, "group", "g", in_transaction),
            Ended(at + 0.1, writer, 1, outcome),
        )
    ]


def hears(channel: str, *messages: tuple[str, float]) -> list[Record]:
    """Return records of a member that receives message 1 of each writer at a time."""
    return [
        Opened(0, channel),
        *join(channel),
        *(Got(at, channel, writer, 1) for writer, at in messages),
    ]


def in_order(
    sends: list[Record], *members: list[Record], faults: list[Record] | None = None
) -> tuple[int, int, bool]:
    """Return the messages in another order, the excused ones, and whether the result is clean."""
    books = {f"reader-{number}": member for number, member in enumerate(members, 1)}
    found = settle({"sends": sends, "faults": faults or [], **books})
    return len(found.group_order.disagreements), len(found.group_order.excused), found.is_clean


A_AND_B = pair(("a.0", 5.0, False), ("b.0", 5.0, False))
A_FIRST = hears(CHANNEL, ("a.0", 6.0), ("b.0", 6.1))
B_FIRST = hears(OTHER, ("b.0", 6.0), ("a.0", 6.1))


def test_group_order_of_two_processes_must_agree() -> None:
    assert in_order(A_AND_B, A_FIRST, hears(OTHER, ("a.0", 7.0), ("b.0", 7.1))) == (0, 0, True)
    assert in_order(A_AND_B, A_FIRST, B_FIRST) == (1, 0, False)
    found = settle({"sends": A_AND_B, "one": A_FIRST, "two": B_FIRST})
    assert len(found.offences) == 1
    assert (
        f"came before a.0#1 to {OTHER} of two, and after it to {CHANNEL} of one"
        in found.offences[0]
    )
    assert "PROMISES BROKEN." in describe(found)


def test_group_order_in_one_process_must_agree() -> None:
    assert in_order(A_AND_B, [*A_FIRST, *B_FIRST]) == (1, 0, False)


def test_group_order_compares_only_messages_that_two_members_received() -> None:
    third = hears("specific.c!1", ("b.0", 6.0))
    found = settle({"sends": A_AND_B, "one": hears(CHANNEL, ("a.0", 6.0)), "three": third})
    assert (found.group_order.compared, found.group_order.disagreements) == (0, {})


@pytest.mark.parametrize(
    ("fault", "is_excused"),
    [
        (Away(5.5, 5.8, "reader-2", True), True),
        (Away(5.5, 5.8, EVERY_PROCESS, False), True),
        (Away(5.5, 5.8, "reader-3", True), False),  # another process
        (Away(6.5, 6.8, "reader-2", True), False),  # both messages had been received
        (Away(1.0, 1.5, "reader-2", True), True),  # nothing sent after it was received earlier
    ],
)
def test_group_order_in_a_catch_up_may_differ(fault: Record, is_excused: bool) -> None:
    assert in_order(A_AND_B, A_FIRST, B_FIRST, faults=[fault]) == (
        (0, 1, True) if is_excused else (1, 0, False)
    )


def test_group_order_counts_from_the_first_message_sent_after_an_absence() -> None:
    """A message that is sent after the absence ends the catch-up of its receiver."""
    sends = [*pair(("c.0", 2.0, False)), *A_AND_B]
    away = Away(1.0, 1.5, "reader-2", True)
    b_first = hears(OTHER, ("c.0", 2.2), ("b.0", 6.0), ("a.0", 6.1))
    assert in_order(sends, A_FIRST, b_first, faults=[away])[:2] == (1, 0)
    # It was sent before the absence was over: it shows nothing.
    sends = [*pair(("c.0", 1.2, False)), *A_AND_B]
    assert in_order(sends, A_FIRST, b_first, faults=[away])[:2] == (0, 1)


def test_group_order_catch_up_of_one_message_excuses_no_other_pair() -> None:
    sends = [*pair(("c.0", 2.0, False), ("d.0", 3.0, False)), *A_AND_B]
    # Of c it heard late; d was sent after the absence, as were a and b.
    away = Away(1.0, 2.5, "reader-2", True)
    one = hears(CHANNEL, ("c.0", 2.2), ("d.0", 3.2), ("a.0", 6.0), ("b.0", 6.1))
    other = hears(OTHER, ("d.0", 3.2), ("c.0", 3.3), ("b.0", 6.0), ("a.0", 6.1))
    assert in_order(sends, one, other, faults=[away])[:2] == (1, 1)


@pytest.mark.parametrize(
    ("in_transaction", "outcome", "faults", "has_a_place"),
    [
        (True, "returned", [], True),
        (True, "returned", [Away(5.05, 5.5, "a", False)], False),
        (True, "returned", [Away(7.0, 7.5, "a", False)], True),
        (True, "returned", [Gone(5.5, "a", True)], False),
        (True, "unknown", [], False),
        (True, "unannounced", [], False),
        (False, "unknown", [], True),  # its announcement is in its own transaction
        (False, "returned", [Away(5.05, 5.5, "a", False)], True),
    ],
)
def test_group_order_omits_messages_perhaps_never_announced(
    in_transaction: bool, outcome: Outcome, faults: list[Record], has_a_place: bool
) -> None:
    sends = [
        *pair(("a.0", 5.0, in_transaction), outcome=outcome),
        *pair(("b.0", 5.0, False)),
    ]
    found = in_order(sends, A_FIRST, B_FIRST, faults=faults)
    assert found == ((1, 0, False) if has_a_place else (0, 0, True))


def test_group_order_member_added_by_another_process_catches_up_first() -> None:
    three = pair(("a.0", 5.0, False), ("b.0", 5.0, False), ("c.0", 7.0, False), ("d.0", 7.0, False))
    one = hears(CHANNEL, ("a.0", 6.0), ("b.0", 6.1), ("c.0", 8.0), ("d.0", 8.1))

    def added(*messages: tuple[str, float]) -> Ledger:
        (opened, _, _, *gots) = hears(OTHER, *messages)
        books: dict[str, list[Record]] = {
            "one": one,
            "two": [opened, *gots],
            "host": join(OTHER, at=5.0),
        }
        return settle({"sends": three, **books})

    found = added(("b.0", 6.0), ("a.0", 6.1), ("c.0", 8.0), ("d.0", 8.1))
    assert (len(found.group_order.disagreements), len(found.group_order.excused)) == (0, 1)
    found = added(("b.0", 6.0), ("a.0", 6.1), ("d.0", 8.0), ("c.0", 8.1))
    assert (len(found.group_order.disagreements), len(found.group_order.excused)) == (1, 1)


# ---------------------------------------------------------------------- transactions


def in_transaction(n: int, outcome: Outcome, kind: Kind = "specific") -> list[Record]:
    stream = CHANNEL if kind == "specific" else "jobs"
    return [Begun(float(n), "w.0", n, kind, stream, True), Ended(n + 0.1, "w.0", n, outcome)]


def test_unannounced_message_is_owed_within_two_heartbeats() -> None:
    sends = in_transaction(1, "unannounced")
    assert causes(ledger(sends, OPENED)) == {UNEXPLAINED: 1}
    in_time: list[Record] = [Got(1.1 + FOUND_MOST, CHANNEL, "w.0", 1)]
    late: list[Record] = [Got(1.2 + FOUND_MOST, CHANNEL, "w.0", 1)]
    assert ledger(sends, [*OPENED, *in_time]).is_clean
    found = ledger(sends, [*OPENED, *late])
    assert tally(found).late == 1
    assert not found.is_clean
    assert ledger(sends, [*OPENED, *late], [Away(2, 3, "reader", True)]).is_clean
    assert 2 * HEARTBEAT <= FOUND_MOST <= 3 * HEARTBEAT


def test_late_message_is_excused_if_its_announcement_may_be_lost() -> None:
    """Only that message may be out of order."""
    sends = [record for n in (1, 2, 3) for record in in_transaction(n, "returned")]
    gots: list[Record] = [
        *OPENED,
        Got(4, CHANNEL, "w.0", 2),
        Got(5, CHANNEL, "w.0", 1),
        Got(6, CHANNEL, "w.0", 3),
    ]
    assert tally(ledger(sends, gots)).disordered == 1
    away = Away(1.05, 1.5, "w", False)
    assert tally(ledger(sends, gots, [away])).disordered == 0
    later = Away(3.05, 3.5, "w", False)
    assert tally(ledger(sends, gots, [later])).disordered == 1


def test_message_that_was_rolled_back_must_not_come() -> None:
    sends = in_transaction(1, "refused")
    assert ledger(sends, OPENED).is_clean
    assert tally(ledger(sends, [*OPENED, Got(3, CHANNEL, "w.0", 1)])).uninvited == 1


def test_crash_excuses_no_message_of_a_transaction() -> None:
    crash = Crash(1.5, 2.0)
    assert causes(ledger(sent(1), OPENED, [crash])) == {CRASH: 1}
    assert causes(ledger(in_transaction(1, "returned"), OPENED, [crash])) == {UNEXPLAINED: 1}


# ---------------------------------------------------------------------- a standby, and leases

PROMOTED = Promotion(10.0, 10.5, 15.0, 16.0)


@pytest.mark.parametrize(
    ("at", "cause"), [(9.5, UNEXPLAINED), (9.95, PROMOTION), (15.9, PROMOTION), (16.1, UNEXPLAINED)]
)
@pytest.mark.parametrize("of_transaction", [False, True])
def test_promotion_excuses_messages_that_the_standby_had_not_received(
    at: float, cause: str, of_transaction: bool
) -> None:
    sends: list[Record] = [
        Begun(at, "w", 1, "specific", CHANNEL, of_transaction),
        Ended(at + 0.1, "w", 1, "returned"),
    ]
    found = ledger([*sends, *sent(20)], [*OPENED, *got(20)], [PROMOTED])
    assert causes(found) == {cause: 1}


@pytest.mark.parametrize(
    ("first", "second", "twice"),
    [(12.0, 17.0, 0), (9.0, 17.0, 1), (12.0, 14.0, 1)],
)
def test_job_received_again_is_excused_if_the_standby_missed_its_claim(
    first: float, second: float, twice: int
) -> None:
    """The promoted standby restores the job, and another worker claims it."""
    gots: list[Record] = [Got(first, "jobs", "w", 1), Got(second, "jobs", "w", 1)]
    found = ledger(sent(1, "normal", "jobs"), gots, [PROMOTED])
    assert (tally(found, "normal").twice, tally(found, "normal").again) == (twice, 1 - twice)
    # It cannot know of later messages, and all others arrive once.
    assert (
        tally(
            ledger(
                sent(11, "normal", "jobs"),
                [*got(11, channel="jobs"), Got(17, "jobs", "w", 11)],
                [PROMOTED],
            ),
            "normal",
        ).twice
        == 1
    )
    assert (
        tally(
            ledger(
                sent(1),
                [*OPENED, Got(first, CHANNEL, "w", 1), Got(second, CHANNEL, "w", 1)],
                [PROMOTED],
            )
        ).twice
        == 1
    )


LONG = Away(10.0, 10.0 + LEASE, "reader", True)


@pytest.mark.parametrize(
    ("away", "at", "cause"),
    [
        (LONG, 20.0, NO_LEASE),
        (LONG, LONG.ended + RETURN + 1, UNEXPLAINED),
        (LONG, 5.0, UNEXPLAINED),
        (LONG._replace(is_alone=False), 20.0, UNEXPLAINED),  # leases do not expire in an outage
        (LONG._replace(process="other"), 20.0, UNEXPLAINED),
        (LONG._replace(ended=10.0 + LEASE / 2), 12.0, UNEXPLAINED),
    ],
)
def test_group_without_a_member_with_a_lease_may_be_skipped(
    away: Away, at: float, cause: str
) -> None:
    sends = [*sent(1, "group", "g", at=at), *sent(60, "group", "g")]
    found = ledger(sends, [*OPENED, *join(CHANNEL), *got(60)], [away])
    assert causes(found, "group") == {cause: 1}


@pytest.mark.parametrize(
    ("faults", "is_excused"),
    [
        ([Away(20.0, 20.5, EVERY_PROCESS, False)], True),  # a short restart
        ([Away(20.0, 20.5, EVERY_PROCESS, False), Crash(20.0, 20.1)], False),
        ([Away(20.0, 20.5, EVERY_PROCESS, False), Promotion(14.0, 14.1, 20.1, 20.2)], False),
        ([Away(11.0, 11.0 + LEASE + 1, EVERY_PROCESS, False)], False),
        # A whole lease follows.
        (
            [
                Away(20.0, 20.5, EVERY_PROCESS, False),
                Crash(20.0, 20.1),
                Away(10, 45, "reader", True),
            ],
            True,
        ),
    ],
)
def test_leases_after_an_outage_longer_than_all_of_them_begin_again(
    faults: list[Record], is_excused: bool
) -> None:
    """An outage or a promotion longer than the leases excuses no skipped group."""
    away = Away(10.0, 12.0 + LEASE, "reader", True)
    sends = [*sent(30, "group", "g"), *sent(60, "group", "g")]
    found = ledger(sends, [*OPENED, *join(CHANNEL), *got(60)], [away, *faults])
    assert causes(found, "group") == {NO_LEASE if is_excused else UNEXPLAINED: 1}


def test_reader_without_a_lease_is_owed_messages_of_groups_with_others() -> None:
    sends = [*sent(20, "group", "g"), *sent(60, "group", "g")]
    reader = [*OPENED, *join(CHANNEL), *got(60)]
    other = [Opened(0, OTHER), *join(OTHER), *got(20, 60, channel=OTHER)]
    assert causes(ledger(sends, reader, [LONG]), "group") == {NO_LEASE: 1}
    assert causes(ledger(sends, reader, [LONG], other=other), "group") == {UNEXPLAINED: 1}


def test_reader_without_a_lease_is_owed_own_messages_jobs_and_changes() -> None:
    """These messages are written and stay until the reader returns."""
    sends = [*sent(20), *sent(60)]
    assert causes(ledger(sends, [*OPENED, *got(60)], [LONG])) == {UNEXPLAINED: 1}
    jobs = [*sent(5, "normal", "jobs"), *sent(60, "normal", "jobs")]
    assert causes(ledger(jobs, got(60, channel="jobs"), [LONG]), "normal") == {UNEXPLAINED: 1}
    joins = join(CHANNEL, at=20.0)
    sends = [*sent(50, "group", "g"), *sent(60, "group", "g")]
    reader = [*OPENED, Got(60.2, CHANNEL, "w", 60)]
    assert causes(ledger(sends, reader, [LONG], other=joins), "group") == {UNEXPLAINED: 1}


# ---------------------------------------------------------------------- the rest


def test_recovery_lasts_until_the_first_message_of_each_reader() -> None:
    """It begins at the end of the fault. Readers that opened later do not count."""
    other = "specific.b!1"
    newcomer = "specific.c!1"
    found = ledger(
        [
            *sent(1),
            *sent(2, stream=other),
            *sent(5),
            *sent(6, stream=other),
            *sent(7, stream=newcomer),
        ],
        [*OPENED, *got(1, 5)],
        [Fault(3, "cut", 4.0)],
        other=[Opened(0, other), *got(2, 6, channel=other)],
        newcomer=[Opened(6, newcomer), *got(7, channel=newcomer)],
    )
    assert found.first == {"cut": [pytest.approx(1.2)]}
    assert found.all_back == {"cut": [pytest.approx(2.2)]}


def test_recovery_does_not_count_messages_after_the_next_fault() -> None:
    messages = [
        *sent(1),
        *sent(2, stream="specific.b!1"),
        *sent(5),
        *sent(6, stream="specific.b!1"),
    ]
    other = [Opened(0, "specific.b!1"), *got(2, 6, channel="specific.b!1")]
    faults: list[Record] = [Fault(3, "cut", 4.0), Fault(5.5, "restart", 5.9)]
    found = ledger(messages, [*OPENED, *got(1, 5)], faults, other=other)
    assert found.all_back == {"cut": [pytest.approx(1.2)], "restart": [pytest.approx(0.3)]}


def test_complaint_of_a_process_is_not_clean() -> None:
    found = ledger([], [Complaint(1, "Traceback"), Cancelled(1)])
    assert not found.is_clean
    assert found.complaints == ["reader: Traceback"]
    assert found.cancelled == 1
    assert "Traceback" in describe(found)


def test_decode_reads_books_up_to_an_unfinished_line() -> None:
    records: list[Record] = [
        *sent(1),
        *JOINED,
        Fault(3, "cut", math.pi),
        Crash(1, 2),
        Promotion(1, 2, 3, 4),
        Away(1, 2, EVERY_PROCESS, False),
        Undone(1, "g", CHANNEL),
        Gone(1, "p", True),
    ]
    book = b"".join(map(encode, records))
    assert list(decode(book)) == records
    assert list(decode(book[:-3])) == records[:-1]
    assert list(decode(b'["Got')) == []
