"""What the ledger of a soak calls lost, doubled and disordered, and what it excuses."""

from __future__ import annotations

import math

import pytest

from soak.ledger import (
    CRASH,
    FORGOTTEN,
    IN_DOUBT,
    KILLED,
    LEFT,
    TAKEN_MOST,
    UNDONE_JOIN,
    UNEXPLAINED,
    Begun,
    Cancelled,
    Closed,
    Complaint,
    Crash,
    Ended,
    Failed,
    Fault,
    Gone,
    Got,
    Joined,
    Joining,
    Kind,
    Leaving,
    Ledger,
    Opened,
    Outcome,
    Record,
    Tally,
    decode,
    encode,
    settle,
)
from soak.ledger import Left as HasLeft
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
    writer: list[Record], reader: list[Record], faults: list[Record] | None = None, **others: list[Record]
) -> Ledger:
    return settle({"writer": writer, "reader": reader, "faults": faults or [], **others})


def tally(found: Ledger, kind: Kind = "specific") -> Tally:
    return found.tallies[kind]


def causes(found: Ledger, kind: Kind = "specific") -> dict[str, int]:
    return {cause: count for cause, count in tally(found, kind).lost.items() if count}


OPENED: list[Record] = [Opened(0, CHANNEL)]


def test_all_is_well() -> None:
    found = ledger([*sent(1), *sent(2)], [*OPENED, *got(1, 2)])
    assert found.is_clean
    assert (tally(found).returned, tally(found).delivered, causes(found)) == (2, 2, {})
    assert "All promises kept." in describe(found)


def test_what_does_not_come_is_lost() -> None:
    found = ledger([*sent(1), *sent(2)], [*OPENED, *got(2)])
    assert not found.is_clean
    assert causes(found) == {UNEXPLAINED: 1}
    assert "w#1" in found.offences[0]
    assert "PROMISES BROKEN." in describe(found)


@pytest.mark.parametrize("kind", ["specific", "normal"])
def test_what_comes_twice_is_seen(kind: Kind) -> None:
    stream = CHANNEL if kind == "specific" else "jobs"
    found = ledger(sent(1, kind, stream), [*OPENED, *got(1, channel=stream)], other=[Got(5, stream, "w", 1)])
    assert not found.is_clean
    assert tally(found, kind).twice == 1


@pytest.mark.parametrize(("kind", "disordered"), [("specific", 1), ("single", 1), ("normal", 0)])
def test_order_counts_where_it_is_promised(kind: Kind, disordered: int) -> None:
    stream = CHANNEL if kind == "specific" else "line"
    found = ledger(
        [*sent(1, kind, stream), *sent(2, kind, stream)],
        [*OPENED, Got(3, stream, "w", 2), Got(3, stream, "w", 1)],
    )
    assert tally(found, kind).disordered == disordered
    assert found.is_clean == (not disordered)


@pytest.mark.parametrize("comes", [True, False])
def test_unknown_may_come_or_not_and_whenever(comes: bool) -> None:
    messages = [*sent(1, outcome="unknown"), *sent(2)]
    late: list[Record] = [Got(3, CHANNEL, "w", 1)] if comes else []
    found = ledger(messages, [*OPENED, *got(2), *late])
    assert found.is_clean
    assert tally(found).unknown == 1


def test_a_send_that_did_not_end_is_unknown() -> None:
    found = ledger([Begun(1, "w", 1, "specific", CHANNEL)], OPENED)
    assert found.is_clean
    assert tally(found).unknown == 1


def test_refused_must_not_come() -> None:
    assert ledger(sent(1, outcome="refused"), OPENED).is_clean
    found = ledger(sent(1, outcome="refused"), [*OPENED, *got(1)])
    assert not found.is_clean
    assert tally(found).uninvited == 1


def test_what_comes_to_another_channel_is_uninvited() -> None:
    found = ledger(sent(1), [*OPENED, Opened(0, "specific.a!2"), *got(1, channel="specific.a!2")])
    assert tally(found).uninvited == 1
    assert causes(found) == {UNEXPLAINED: 1}


def test_what_nobody_sent_is_a_fault_of_the_books() -> None:
    with pytest.raises(ValueError, match="never sent"):
        ledger([], [*OPENED, *got(1)])


# ---------------------------------------------------------------------- what is excused


@pytest.mark.parametrize(
    ("at", "cause"), [(8.0, UNEXPLAINED), (9.5, CRASH), (10.2, CRASH), (10.6, UNEXPLAINED)]
)
def test_a_crash_excuses_the_last_second(at: float, cause: str) -> None:
    found = ledger([*sent(1, at=at), *sent(20)], [*OPENED, *got(20)], [Crash(10.0, 10.5)])
    assert causes(found) == {cause: 1}


@pytest.mark.parametrize(("was_killed", "cause"), [(True, KILLED), (False, LEFT)])
def test_a_reader_takes_along_what_it_had_not_received(was_killed: bool, cause: str) -> None:
    gone = Gone(2.5, "reader", was_killed)
    assert causes(ledger([*sent(1), *sent(2)], [*OPENED, *got(1)], [gone])) == {cause: 1}
    # But not from the middle, and not later than it lived.
    assert causes(ledger([*sent(1), *sent(2)], [*OPENED, *got(2)], [gone])) == {UNEXPLAINED: 1}
    assert causes(ledger(sent(3), OPENED, [gone])) == {}


def test_a_closed_channel_takes_along_what_it_had_not_received() -> None:
    assert causes(ledger(sent(1), [*OPENED, Closed(1.5, CHANNEL)])) == {LEFT: 1}


def test_a_killed_worker_takes_along_a_limited_number_of_jobs() -> None:
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
def test_nobody_else_takes_jobs_along(gone: Gone) -> None:
    jobs = [*sent(1, "normal", "jobs"), *sent(2, "normal", "jobs")]
    assert causes(ledger(jobs, got(2, channel="jobs"), [gone]), "normal") == {UNEXPLAINED: 1}


# ---------------------------------------------------------------------- groups

JOINED: list[Record] = [*OPENED, Joining(1, "g", CHANNEL), Joined(1.5, "g", CHANNEL)]
LEAVING: list[Record] = [Leaving(9, "g", CHANNEL)]


def group(*numbers: int) -> list[Record]:
    return [record for n in numbers for record in sent(n, "group", "g")]


def test_members_get_what_is_sent_while_they_surely_belong() -> None:
    assert ledger(group(1, 2, 9), [*JOINED, *got(2), *LEAVING, HasLeft(9.2, "g", CHANNEL)]).is_clean
    assert ledger(group(1, 2, 9), [*JOINED, *got(1, 2), *LEAVING, *got(9)]).is_clean
    assert causes(ledger(group(2, 3), [*JOINED, *got(3)]), "group") == {UNEXPLAINED: 1}


def test_each_member_is_owed_a_message() -> None:
    other = "specific.b!1"
    found = ledger(
        group(2),
        [*JOINED, *got(2)],
        other=[Opened(0, other), Joining(0, "g", other), Joined(0.5, "g", other)],
    )
    assert causes(found, "group") == {UNEXPLAINED: 1}
    assert tally(found, "group").delivered == 1


def test_what_was_sent_before_joining_comes_early_and_after_leaving_uninvited() -> None:
    early = ledger(sent(1, "group", "g", at=0.2), [*JOINED, Got(2, CHANNEL, "w", 1)])
    assert (tally(early, "group").early, tally(early, "group").uninvited) == (1, 0)
    late = ledger(group(10), [*JOINED, *LEAVING, HasLeft(9.5, "g", CHANNEL), *got(10)])
    assert (tally(late, "group").early, tally(late, "group").uninvited) == (0, 1)
    assert early.is_clean
    assert not late.is_clean


def test_who_leaves_is_still_owed_what_was_sent_before() -> None:
    left = [*LEAVING, HasLeft(9.5, "g", CHANNEL)]
    assert causes(ledger(group(2), [*JOINED, *left]), "group") == {FORGOTTEN: 1}
    assert not ledger(group(2), [*JOINED, *left]).is_clean
    failed = [*LEAVING, Failed(9.2, "g", CHANNEL), HasLeft(9.5, "g", CHANNEL)]
    assert causes(ledger(group(2), [*JOINED, *failed]), "group") == {IN_DOUBT: 1}
    crash = Crash(5, 5.5)
    assert causes(ledger(group(2), [*JOINED, *left], [crash]), "group") == {IN_DOUBT: 1}
    # It had read on: no excuse.
    assert causes(ledger(group(2, 3), [*JOINED, *got(3), *failed]), "group") == {UNEXPLAINED: 1}


def test_a_crash_undoes_a_joining_until_the_client_has_put_it_back() -> None:
    crash = Crash(2.0, 2.5)
    found = ledger(group(4, 5, 6), [*JOINED, *got(5)], [crash])
    assert causes(found, "group") == {UNDONE_JOIN: 1, UNEXPLAINED: 1}
    early_crash = Crash(9.0, 9.5)  # by then, the joining was on the disk
    assert causes(ledger(group(12, 13), [*JOINED, *got(13)], [early_crash]), "group") == {UNEXPLAINED: 1}


# ---------------------------------------------------------------------- the rest


def test_recovery_is_from_the_end_of_a_fault_to_the_first_message_of_each_reader() -> None:
    other = "specific.b!1"
    newcomer = "specific.c!1"
    found = ledger(
        [*sent(1), *sent(2, stream=other), *sent(5), *sent(6, stream=other), *sent(7, stream=newcomer)],
        [*OPENED, *got(1, 5)],
        [Fault(3, "cut", 4.0)],
        other=[Opened(0, other), *got(2, 6, channel=other)],
        newcomer=[Opened(6, newcomer), *got(7, channel=newcomer)],
    )
    assert found.first == {"cut": [pytest.approx(1.2)]}
    assert found.all_back == {"cut": [pytest.approx(2.2)]}


def test_what_waits_for_the_next_fault_does_not_count() -> None:
    messages = [*sent(1), *sent(2, stream="specific.b!1"), *sent(5), *sent(6, stream="specific.b!1")]
    other = [Opened(0, "specific.b!1"), *got(2, 6, channel="specific.b!1")]
    faults: list[Record] = [Fault(3, "cut", 4.0), Fault(5.5, "restart", 5.9)]
    found = ledger(messages, [*OPENED, *got(1, 5)], faults, other=other)
    assert found.all_back == {"cut": [pytest.approx(1.2)], "restart": [pytest.approx(0.3)]}


def test_an_error_of_a_process_is_not_clean() -> None:
    found = ledger([], [Complaint(1, "Traceback"), Cancelled(1)])
    assert not found.is_clean
    assert found.complaints == ["reader: Traceback"]
    assert found.cancelled == 1
    assert "Traceback" in describe(found)


def test_books_are_read_as_written_up_to_an_unfinished_line() -> None:
    records: list[Record] = [
        *sent(1),
        *JOINED,
        Failed(2, "g", CHANNEL),
        Fault(3, "cut", math.pi),
        Crash(1, 2),
        Gone(1, "p", True),
    ]
    book = b"".join(map(encode, records))
    assert list(decode(book)) == records
    assert list(decode(book[:-3])) == records[:-1]
    assert list(decode(b'["Got')) == []
