"""The database's clock: what is told is never earlier than what the database would have said."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pg_layer._state.clock import DatabaseClock


class Machine:
    """A process's monotonic clock and a database's clock, which tick together."""

    def __init__(self, monotonic: float, ahead: float) -> None:
        self.monotonic = monotonic
        self._ahead = ahead

    @property
    def database(self) -> float:
        return self.monotonic + self._ahead

    def ask(self, clock: DatabaseClock, there: float, back: float) -> None:
        """Ask the database for its time: ``there`` and ``back`` are what the ways take, in seconds."""
        asked_at = self.monotonic
        self.monotonic += there
        answer = self.database
        self.monotonic += back
        clock.observe(asked_at, answer)


SECONDS = st.floats(0, 1e6)
LATENCY = st.floats(0, 100)
ROUNDING = 1e-5


@given(
    start=SECONDS,
    ahead=st.floats(-1e6, 2e9),
    questions=st.lists(st.tuples(LATENCY, LATENCY, SECONDS), min_size=1, max_size=5),
)
def test_it_is_never_behind_the_database(
    start: float, ahead: float, questions: list[tuple[float, float, float]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(start, ahead)
        patch.setattr(time, "monotonic", lambda: machine.monotonic)
        clock = DatabaseClock()
        for there, back, later in questions:
            machine.ask(clock, there, back)
            assert clock.now() >= machine.database - ROUNDING
            machine.monotonic += later
            assert clock.now() >= machine.database - ROUNDING
            # And ahead of it by no more than the question's way took.
            assert clock.now() <= machine.database + there + ROUNDING


def test_before_the_first_answer_nothing_is_expired() -> None:
    clock = DatabaseClock()
    assert not clock.is_set
    assert clock.now() == 0.0


def test_it_goes_on_between_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(1000.0, 1.75e9)
    monkeypatch.setattr(time, "monotonic", lambda: machine.monotonic)
    clock = DatabaseClock()
    machine.ask(clock, 0.0, 0.5)
    assert clock.is_set
    before = clock.now()
    machine.monotonic += 12.5
    assert clock.now() == before + 12.5


def test_it_follows_a_step_of_the_databases_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    machine, stepped = Machine(1000.0, 1.75e9), Machine(1001.0, 1.75e9 - 3600)
    monkeypatch.setattr(time, "monotonic", lambda: stepped.monotonic)
    clock = DatabaseClock()
    machine.ask(clock, 0.0, 0.0)
    stepped.ask(clock, 0.0, 0.0)
    assert clock.now() == stepped.database


def test_the_clock_of_the_process_plays_no_part(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = DatabaseClock()
    clock.observe(time.monotonic(), 5000.0)
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert 5000.0 <= clock.now() < 5060.0
