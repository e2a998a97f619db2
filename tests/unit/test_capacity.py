"""Credits: how many messages a sender may send without a count, and for how long."""

from __future__ import annotations

import pytest

from pg_layer._state import capacity as module
from pg_layer._state.capacity import CREDIT_AGE, CREDIT_PART, Credits


class Clock:
    """A clock that the test advances."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


def grant(credits: Credits, channel: str, free: int) -> None:
    credits.grant([channel], [1000], 1000 - free)


def spend(credits: Credits, *channels: str) -> bool:
    return credits.spend(channels, [1000] * len(channels))


def test_credits_uncounted_channel_has_none(clock: Clock) -> None:
    credits = Credits()
    assert not spend(credits, "jobs")
    grant(credits, "jobs", 10 * CREDIT_PART)
    assert not spend(credits, "other")


def test_credits_part_of_the_free_capacity_is_spent_by_message(clock: Clock) -> None:
    credits = Credits()
    grant(credits, "jobs", 4 * CREDIT_PART + CREDIT_PART - 1)
    assert [spend(credits, "jobs") for _ in range(6)] == [True] * 4 + [False] * 2


def test_credits_nearly_full_channel_has_none(clock: Clock) -> None:
    credits = Credits()
    for free in (CREDIT_PART - 1, 1, 0, -3):
        grant(credits, "jobs", 10 * CREDIT_PART)
        grant(credits, "jobs", free)
        assert not spend(credits, "jobs")


def test_credits_batch_needs_a_credit_for_each_channel(clock: Clock) -> None:
    credits = Credits()
    for channel in ("a", "b"):
        grant(credits, channel, 3 * CREDIT_PART)
    assert spend(credits, "a", "b", "a")
    assert spend(credits, "b", "b", "a")
    assert not spend(credits, "a")
    grant(credits, "a", 2 * CREDIT_PART)
    assert not spend(credits, "a", "c")
    assert not spend(credits, "a", "a")


def test_credits_after_credit_age_end(clock: Clock) -> None:
    credits = Credits()
    clock.now += CREDIT_AGE / 2
    grant(credits, "jobs", 100 * CREDIT_PART)
    assert spend(credits, "jobs")
    clock.now += CREDIT_AGE
    assert not spend(credits, "jobs")
    assert not spend(credits, "jobs")


def test_credits_without_a_count_are_not_granted(clock: Clock) -> None:
    credits = Credits()
    credits.grant(["jobs"], [1000], None)
    assert not spend(credits, "jobs")


def test_credits_of_another_capacity_do_not_count(clock: Clock) -> None:
    """Code may have changed the capacity since."""
    credits = Credits()
    grant(credits, "jobs", 10 * CREDIT_PART)
    assert not credits.spend(["jobs"], [999])
    assert credits.spend(["jobs"], [1000])
