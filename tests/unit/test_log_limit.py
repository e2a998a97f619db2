"""The limit of log lines whose cause is outside of the process."""

from __future__ import annotations

import threading

import pytest

from pg_layer._state.log_limit import MAX_RECORDS, PERIOD, LogLimit


class Clock:
    """A clock that does not move by itself."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def limit(clock: Clock) -> LogLimit:
    return LogLimit(clock)


def said(end: str) -> int:
    """Return how many lines were left out, from the end of one."""
    return int(end.rpartition(" ")[2].rstrip(".)")) if end else 0


def test_admit_same_thing_is_logged_once_in_a_period(clock: Clock, limit: LogLimit) -> None:
    assert limit.admit("full", "a") == ""
    clock.now += PERIOD - 1
    assert limit.admit("full", "a") is None
    clock.now += 1
    assert limit.admit("full", "a") == " (Similar records left out: 1.)"
    clock.now += PERIOD
    assert limit.admit("full", "a") == ""


def test_admit_many_things_are_bounded_in_any_period_and_counted(
    clock: Clock, limit: LogLimit
) -> None:
    """Each at a moment of its own: no period, wherever it begins, has more lines."""
    logged = []
    left_out = told = 0
    for number in range(5000):
        end = limit.admit("full", number)
        if end is None:
            left_out += 1
        else:
            logged.append(clock.now)
            told += said(end)
        clock.now += 0.1
    assert max(sum(at <= other < at + PERIOD for other in logged) for at in logged) == MAX_RECORDS
    assert len(logged) >= MAX_RECORDS * int(500 / PERIOD)
    clock.now += PERIOD
    end = limit.admit("full", "the end")
    assert end is not None
    assert told + said(end) == left_out


def test_admit_kinds_are_counted_apart(limit: LogLimit) -> None:
    for number in range(MAX_RECORDS + 5):
        limit.admit("full", number)
    assert limit.admit("foreign", 1) == ""
    assert limit.admit("silent") == ""
    assert limit.admit("silent") is None


def test_admit_remembers_a_bounded_number(clock: Clock, limit: LogLimit) -> None:
    for number in range(3000):
        limit.admit("foreign", number)
        clock.now += 1.0
    assert len(limit._logged["foreign"]) <= MAX_RECORDS


def test_admit_from_many_threads_is_exact(limit: LogLimit) -> None:
    admitted: list[int] = []

    def work(base: int) -> None:
        admitted.extend(n for n in range(base, base + 500) if limit.admit("full", n) is not None)

    threads = [threading.Thread(target=work, args=(base,)) for base in range(0, 2000, 500)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(admitted) == MAX_RECORDS
    assert limit._left_out["full"] == 2000 - MAX_RECORDS
