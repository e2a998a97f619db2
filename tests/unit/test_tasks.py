"""Tasks that fail with an unexpected error continue, and are logged once."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pg_layer._process.tasks import Tasks
from pg_layer._state import log_events
from pg_layer._state.failures import Failures
from tests.logs import event_of, records
from tests.processes import until

PROBLEM = "Counting fails, and is tried again: ValueError: No."


class Counting:
    """Work that fails until it may succeed."""

    def __init__(self) -> None:
        self.tries = 0
        self.may_succeed = False

    async def __call__(self) -> None:
        self.tries += 1
        if not self.may_succeed:
            raise ValueError("No.")


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pg_layer._process.tasks.PAUSE", 0.001)


FAILED, RECOVERED = (log_events.TASK_FAILED, "Counting"), (log_events.TASK_RECOVERED, "Counting")


def logged(caplog: pytest.LogCaptureFixture) -> list[tuple[str | None, str]]:
    return [(event_of(record), record.__dict__["task"]) for record in records(caplog)]


async def ended(tasks: Tasks) -> None:
    await until(lambda: not tasks.running)


async def test_tasks_spawn_work_that_fails_is_tried_until_it_succeeds(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures, work = Failures(), Counting()
    tasks = Tasks(failures)
    tasks.spawn("Counting", work)
    await until(lambda: work.tries >= 5)
    assert (len(failures), failures.problems()) == (1, [PROBLEM])
    assert logged(caplog) == [FAILED]
    assert caplog.records[0].exc_info
    assert caplog.records[0].exc_info[0] is ValueError
    work.may_succeed = True
    await ended(tasks)
    assert (len(failures), failures.problems()) == (0, [])
    assert logged(caplog) == [FAILED, RECOVERED]


async def test_tasks_every_round_that_fails_is_tried_again_and_the_next_follows() -> None:
    failures, work = Failures(), Counting()
    tasks = Tasks(failures)
    tasks.every(0.001, "Counting", work)
    await until(lambda: work.tries >= 5)
    assert failures.problems() == [PROBLEM]
    work.may_succeed = True
    await until(lambda: not failures)
    tries = work.tries
    await until(lambda: work.tries > tries + 3)
    for task in tasks.running:
        task.cancel()
    await ended(tasks)


async def test_failures_of_several_tasks_at_the_same_work_are_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures, works = Failures(), [Counting() for _ in range(3)]
    tasks = Tasks(failures)
    for work in works:
        tasks.spawn("Counting", work)
    await until(lambda: all(work.tries >= 3 for work in works))
    assert (len(failures), failures.problems()) == (3, [PROBLEM])
    assert len(logged(caplog)) == 1
    for work in works:
        work.may_succeed = True
    await ended(tasks)
    assert not failures
    assert logged(caplog)[1:] == [RECOVERED]


async def test_failures_end_while_another_task_fails_at_the_same_says_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures = Failures()
    for task in range(2):
        failures.begin(task, "Counting", ValueError("No."))
    failures.end(0, is_done=True)
    assert logged(caplog) == [FAILED]
    failures.end(1, is_done=True)
    assert logged(caplog) == [FAILED, RECOVERED]


async def test_failures_that_come_within_a_minute_and_stay_are_logged_after_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the log would end with "works again"."""
    failures = Failures()
    failures.begin(0, "Counting", ValueError("No."))
    failures.end(0, is_done=True)
    failures.begin(1, "Counting", ValueError("No."))
    assert len(logged(caplog)) == 2
    monkeypatch.setattr("pg_layer._state.failures.LOG_PERIOD", 0.0)
    failures.begin(1, "Counting", ValueError("No."))
    failures.begin(1, "Counting", ValueError("No."))
    assert logged(caplog) == [FAILED, RECOVERED, FAILED]


async def test_failures_that_come_and_go_are_logged_once_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures = Failures()
    for task in range(3):
        failures.begin(task, "Counting", ValueError("No."))
        failures.end(task, is_done=True)
    assert logged(caplog) == [FAILED, RECOVERED]


async def test_tasks_cancelled_while_they_fail_do_not_fail_any_more(
    caplog: pytest.LogCaptureFixture,
) -> None:
    failures, work = Failures(), Counting()
    tasks = Tasks(failures)
    tasks.spawn("Counting", work)
    await until(lambda: work.tries)
    for task in tasks.running:
        task.cancel()
    await ended(tasks)
    assert not failures
    assert len(logged(caplog)) == 1


@pytest.mark.parametrize("is_over_before", [True, False], ids=["before", "meanwhile"])
async def test_tasks_of_an_engine_that_has_ended_are_not_tried_again(
    is_over_before: bool, caplog: pytest.LogCaptureFixture
) -> None:
    failures, work = Failures(), Counting()
    is_over = is_over_before
    has_ended: Callable[[], bool] = lambda: is_over or work.tries > 0  # noqa: E731
    tasks = Tasks(failures, has_ended)
    tasks.spawn("Counting", work)
    await ended(tasks)
    assert work.tries == (not is_over_before)
    assert not failures
    assert not logged(caplog)
