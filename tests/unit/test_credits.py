"""Credits: for how many messages, and how long, a sender trusts the room it saw."""

from __future__ import annotations

import pytest

from pg_layer import sender
from pg_layer.sender import CREDIT_AGE, CREDIT_PART, Credits


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(sender, "time", clock)
    return clock


def test_a_channel_that_was_not_looked_at_has_none(clock: Clock) -> None:
    credits = Credits()
    assert not credits.spend(["jobs"])
    credits.grant("jobs", 10 * CREDIT_PART)
    assert not credits.spend(["other"])


def test_a_part_of_the_room_that_was_seen_is_spent_message_by_message(clock: Clock) -> None:
    credits = Credits()
    credits.grant("jobs", 4 * CREDIT_PART + CREDIT_PART - 1)
    assert [credits.spend(["jobs"]) for _ in range(6)] == [True] * 4 + [False] * 2


def test_near_the_limit_every_message_looks(clock: Clock) -> None:
    credits = Credits()
    for room in (CREDIT_PART - 1, 1, 0, -3):
        credits.grant("jobs", 10 * CREDIT_PART)
        credits.grant("jobs", room)
        assert not credits.spend(["jobs"])


def test_a_batch_goes_without_a_look_if_each_of_its_channels_may(clock: Clock) -> None:
    credits = Credits()
    for channel in ("a", "b"):
        credits.grant(channel, 3 * CREDIT_PART)
    assert credits.spend(["a", "b", "a"])
    assert credits.spend(["b", "b", "a"])
    assert not credits.spend(["a"])
    credits.grant("a", 2 * CREDIT_PART)
    assert not credits.spend(["a", "c"])
    assert not credits.spend(["a", "a"])


def test_after_a_moment_it_is_looked_again(clock: Clock) -> None:
    credits = Credits()
    clock.now += CREDIT_AGE / 2
    credits.grant("jobs", 100 * CREDIT_PART)
    assert credits.spend(["jobs"])
    clock.now += CREDIT_AGE
    assert not credits.spend(["jobs"])
    assert not credits.spend(["jobs"])
