"""Tasks of the receiving side that raise once are repeated, and none starts twice."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from pg_layer import PostgresChannelLayer
from pg_layer._db.session import Session
from pg_layer._receive.dispatcher import Dispatcher
from pg_layer._receive.receiver import Receiver
from pg_layer._runtime.owner import Owner
from tests.conftest import MakeLayer, Observer
from tests.faults.test_unexpected_answers import SHORT_HEARTBEAT, extra_column
from tests.integration.test_catch_up import hear_all, owner_of
from tests.processes import TIMEOUT, receive, until


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pg_layer._process.tasks.PAUSE", 0.05)


class FailingDispatch:
    """A fault: ``Dispatcher.dispatch`` raises once, as soon as a condition is set and true."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.condition: Callable[[Dispatcher], bool] | None = None
        self.has_failed = asyncio.Event()
        dispatch = Dispatcher.dispatch

        def failing_dispatch(dispatcher: Dispatcher) -> None:
            if self.condition is not None and self.condition(dispatcher):
                self.condition = None
                self.has_failed.set()
                raise RuntimeError("Unexpected.")
            dispatch(dispatcher)

        monkeypatch.setattr(Dispatcher, "dispatch", failing_dispatch)


@pytest.fixture
async def failing_dispatch(monkeypatch: pytest.MonkeyPatch) -> FailingDispatch:
    return FailingDispatch(monkeypatch)


async def no_task_fails(layer: PostgresChannelLayer) -> None:
    await until(lambda: not layer.stats()["failing_tasks"])


async def test_catch_up_requested_after_dispatch_raised_runs_alone(
    make_layer: MakeLayer, failing_dispatch: FailingDispatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = make_layer(heartbeat=20)
    await hear_all(layer)
    receiver = owner_of(layer).receiver
    may_read, reading, most = asyncio.Event(), 0, 0
    read_new = Receiver._read_new

    async def read_slowly(receiver: Receiver, session: Session, counted: list[int]) -> bool:
        nonlocal reading, most
        reading += 1
        most = max(most, reading)
        try:
            await may_read.wait()
            return await read_new(receiver, session, counted)
        finally:
            reading -= 1

    failing_dispatch.condition = lambda _: not receiver._is_catching_up
    receiver.catch_up_soon()
    await asyncio.wait_for(failing_dispatch.has_failed.wait(), TIMEOUT)
    monkeypatch.setattr(Receiver, "_read_new", read_slowly)
    receiver.catch_up_soon()
    await until(lambda: reading)
    await no_task_fails(layer)  # the failed dispatch was repeated
    assert receiver.is_catch_up_pending
    receiver.catch_up_soon()
    await layer.group_count("room")  # gives a second catch-up time to begin
    may_read.set()
    await until(lambda: not receiver.is_catch_up_pending)
    assert most == 1


async def test_block_requested_after_dispatch_raised_is_not_ended_by_an_earlier_one(
    make_layer: MakeLayer, failing_dispatch: FailingDispatch
) -> None:
    layer = make_layer(heartbeat=20)
    await hear_all(layer)
    dispatcher = owner_of(layer).receiver.dispatcher
    runs, may_end = [0, 0], asyncio.Event()

    async def first() -> None:
        runs[0] += 1

    async def second() -> None:
        runs[1] += 1
        await may_end.wait()

    failing_dispatch.condition = lambda dispatcher: not dispatcher.is_blocked
    dispatcher._block(first)
    await asyncio.wait_for(failing_dispatch.has_failed.wait(), TIMEOUT)
    dispatcher._block(second)
    await no_task_fails(layer)
    assert (runs, dispatcher.is_blocked) == ([1, 1], True)
    may_end.set()
    await until(lambda: not dispatcher.is_blocked)
    assert runs == [1, 1]


async def test_receiving_raising_at_its_start_does_not_start_twice(
    make_layer: MakeLayer, failing_dispatch: FailingDispatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = 0
    start = Dispatcher.start

    def start_and_count(dispatcher: Dispatcher) -> None:
        nonlocal begun
        begun += 1
        start(dispatcher)

    monkeypatch.setattr(Dispatcher, "start", start_and_count)
    failing_dispatch.condition = lambda _: True
    layer = make_layer()
    await hear_all(layer)
    assert failing_dispatch.has_failed.is_set()
    await no_task_fails(layer)
    assert begun == 1
    channel = await layer.new_channel()
    await layer.send(channel, {"type": "test"})
    assert await receive(layer, channel) == {"type": "test"}


async def test_polling_failing_ends_when_notifications_arrive_again(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer(**SHORT_HEARTBEAT)
    await hear_all(layer)
    owner: Owner = owner_of(layer)

    def is_failing() -> bool:
        return any(
            problem.startswith("Polling fails")
            for problem in layer._loops.client.failures.problems()
        )

    with extra_column(observer, "pg_layer_renew"):
        owner._fall_back("the test says so.")
        await until(is_failing)
        owner._hears_again()
        await until(lambda: not is_failing())
