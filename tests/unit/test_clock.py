"""The database's clock: the computed time is never earlier than the database's own."""

from __future__ import annotations

import runpy
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pg_layer._state import clock as module
from pg_layer._state.clock import DatabaseClock


class Machine:
    """The monotonic clock of a process, and the clock of a database, with one rate."""

    def __init__(self, ticks: float, ahead: float) -> None:
        self.ticks = ticks
        self.ahead = ahead

    @property
    def database(self) -> float:
        return self.ticks + self.ahead

    def ask(self, clock: DatabaseClock, there: float, back: float) -> None:
        """Ask the database for its time. ``there`` and ``back``: the latencies in seconds."""
        asked_at = self.ticks
        self.ticks += there
        answer = self.database
        self.ticks += back
        clock.observe(asked_at, answer)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    machine = Machine(1000.0, 1.75e9)
    monkeypatch.setattr(DatabaseClock, "ticks", lambda *_: machine.ticks)
    return machine


SECONDS = st.floats(0, 1e6)
LATENCY = st.floats(0, 100)
ROUNDING = 1e-5


@given(
    start=SECONDS,
    ahead=st.floats(-1e6, 2e9),
    questions=st.lists(st.tuples(LATENCY, LATENCY, SECONDS), min_size=1, max_size=5),
)
def test_now_is_ahead_of_the_database_by_the_quickest_answer_at_most(
    start: float, ahead: float, questions: list[tuple[float, float, float]]
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        machine = Machine(start, ahead)
        patch.setattr(DatabaseClock, "ticks", lambda *_: machine.ticks)
        clock = DatabaseClock()
        quickest = 100.0
        for there, back, later in questions:
            machine.ask(clock, there, back)
            quickest = min(quickest, there)
            for pause in (0.0, later):
                machine.ticks += pause
                assert machine.database - ROUNDING <= clock.now()
                assert clock.now() <= machine.database + quickest + ROUNDING


def test_now_before_the_first_answer_is_0() -> None:
    clock = DatabaseClock()
    assert not clock.is_set
    assert clock.now() == 0.0


def test_now_between_answers_advances(machine: Machine) -> None:
    clock = DatabaseClock()
    machine.ask(clock, 0.0, 0.5)
    assert clock.is_set
    before = clock.now()
    machine.ticks += 12.5
    assert clock.now() == before + 12.5


def test_observe_slow_answer_does_not_move_the_clock(machine: Machine) -> None:
    clock = DatabaseClock()
    machine.ask(clock, 0.0, 0.0)
    machine.ask(clock, 2.5, 0.0)
    assert clock.now() == machine.database


@pytest.mark.parametrize("step", [-3600.0, 3600.0])
def test_observe_contradicting_answer_follows_the_databases_clock(
    machine: Machine, step: float
) -> None:
    clock = DatabaseClock()
    machine.ask(clock, 0.0, 0.0)
    machine.ahead += step
    machine.ask(clock, 0.0, 0.0)
    assert clock.now() == machine.database


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="only Linux has the clock")
def test_ticks_count_the_time_while_the_machine_is_suspended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Linux's monotonic clock stops while the machine is suspended."""
    slept = 0.0
    real = time.clock_gettime

    def clock_gettime(clock: int) -> float:
        return real(clock) + (slept if clock == time.CLOCK_BOOTTIME else 0.0)

    monkeypatch.setattr(time, "clock_gettime", clock_gettime)
    clock = runpy.run_path(module.__file__)[
        "DatabaseClock"
    ]()  # the module chooses its clock when imported
    clock.observe(clock.ticks(), 5000.0)
    slept = 3600.0
    assert clock.now() >= 8600.0


def test_now_does_not_follow_the_wall_clock_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = DatabaseClock()
    clock.observe(clock.ticks(), 5000.0)
    monkeypatch.setattr(time, "time", lambda: 1e12)
    assert 5000.0 <= clock.now() < 5060.0
