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


def test_credits_uncounted_channel_has_none(clock: Clock) -> None:
    credits = Credits()
    assert not credits.spend(["jobs"])
    grant(credits, "jobs", 10 * CREDIT_PART)
    assert not credits.spend(["other"])


def test_credits_part_of_the_free_capacity_is_spent_by_message(clock: Clock) -> None:
    credits = Credits()
    grant(credits, "jobs", 4 * CREDIT_PART + CREDIT_PART - 1)
    assert [credits.spend(["jobs"]) for _ in range(6)] == [True] * 4 + [False] * 2


def test_credits_nearly_full_channel_has_none(clock: Clock) -> None:
    credits = Credits()
    for free in (CREDIT_PART - 1, 1, 0, -3):
        grant(credits, "jobs", 10 * CREDIT_PART)
        grant(credits, "jobs", free)
        assert not credits.spend(["jobs"])


def test_credits_batch_needs_a_credit_for_each_channel(clock: Clock) -> None:
    credits = Credits()
    for channel in ("a", "b"):
        grant(credits, channel, 3 * CREDIT_PART)
    assert credits.spend(["a", "b", "a"])
    assert credits.spend(["b", "b", "a"])
    assert not credits.spend(["a"])
    grant(credits, "a", 2 * CREDIT_PART)
    assert not credits.spend(["a", "c"])
    assert not credits.spend(["a", "a"])


def test_credits_after_credit_age_end(clock: Clock) -> None:
    credits = Credits()
    clock.now += CREDIT_AGE / 2
    grant(credits, "jobs", 100 * CREDIT_PART)
    assert credits.spend(["jobs"])
    clock.now += CREDIT_AGE
    assert not credits.spend(["jobs"])
    assert not credits.spend(["jobs"])


def test_credits_without_a_count_are_not_granted(clock: Clock) -> None:
    credits = Credits()
    credits.grant(["jobs"], [1000], None)
    assert not credits.spend(["jobs"])
