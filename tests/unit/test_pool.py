"""The pool of connections, with stand-ins for sessions and for the clock."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest

from pg_layer._db import pool as pool_module
from pg_layer._db.pool import Pool
from pg_layer._db.session import Session


class FakeSession:
    """A session without a connection."""

    def __init__(self) -> None:
        self.is_closed = False
        self.is_reusable = True
        self.has_hung_up = False

    def close(self) -> None:
        self.is_closed = True
        self.is_reusable = False


class Bench:
    """A pool on the running loop, and the sessions that it has opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, max_size: int = 2) -> None:
        self.opened: list[FakeSession] = []
        self.attempts = 0
        self.may_connect = asyncio.Event()
        self.may_connect.set()
        self.may_settle = asyncio.Event()
        self.connect_error: Exception | None = None
        self.prepare_error: Exception | None = None
        self.now = 100.0
        self.timers: list[tuple[float, Callable[[], None]]] = []
        loop = asyncio.get_running_loop()
        self.pool = Pool(
            self._connect, self._prepare, self._settle, max_size=max_size, max_idle=10.0
        )
        self.pool._loop = cast("asyncio.AbstractEventLoop", _Loop(loop, self))
        monkeypatch.setattr(pool_module, "_RECONNECT", 0.0)

    async def _connect(self) -> Session:
        self.attempts += 1
        await self.may_connect.wait()
        if self.connect_error is not None:
            raise self.connect_error
        self.opened.append(FakeSession())
        return cast("Session", self.opened[-1])

    async def _prepare(self, session: Session) -> None:
        if self.prepare_error is not None:
            raise self.prepare_error

    async def _settle(self, session: Session) -> None:
        await self.may_settle.wait()
        cast("FakeSession", session).is_reusable = True

    async def get(self) -> FakeSession:
        return cast("FakeSession", await self.pool.get(10.0))

    def asks(self) -> asyncio.Task[FakeSession]:
        return asyncio.create_task(self.get())

    def give_back(self, session: FakeSession) -> None:
        self.pool.give_back(cast("Session", session))

    def take(self) -> FakeSession | None:
        return cast("FakeSession | None", self.pool.take())

    def passes(self, seconds: float) -> None:
        """Let time pass, and run the timers that are due."""
        self.now += seconds
        due = [timer for timer in self.timers if timer[0] <= self.now]
        for timer in due:
            self.timers.remove(timer)
            timer[1]()


class _Loop:
    """The running loop with another clock."""

    def __init__(self, loop: asyncio.AbstractEventLoop, bench: Bench) -> None:
        self._bench = bench
        self.create_task = loop.create_task
        self.create_future = loop.create_future
        self.is_closed = loop.is_closed

    def time(self) -> float:
        return self._bench.now

    def call_at(self, when: float, callback: Callable[[], None]) -> Any:
        timer = (when, callback)
        self._bench.timers.append(timer)

        class Handle:
            cancel = staticmethod(lambda: self._bench.timers.remove(timer))

        return Handle

    def call_later(self, delay: float, callback: Callable[[], None]) -> Any:
        return self.call_at(self.time() + delay, callback)


MakeBench = Callable[..., Bench]


@pytest.fixture
def make_bench(monkeypatch: pytest.MonkeyPatch) -> MakeBench:
    return lambda **options: Bench(monkeypatch, **options)


async def turns(count: int = 6) -> None:
    """Let all tasks run until they wait."""
    for _ in range(count):
        await asyncio.sleep(0)


async def test_pool_opens_nothing_before_the_first_get(make_bench: MakeBench) -> None:
    bench = make_bench()
    await turns()
    assert bench.take() is None
    assert bench.attempts == 0


async def test_session_given_back_is_taken_again(make_bench: MakeBench) -> None:
    bench = make_bench()
    session = await bench.get()
    assert bench.take() is None
    bench.give_back(session)
    assert bench.take() is session
    assert bench.attempts == 1


async def test_pool_never_opens_more_than_max_size(make_bench: MakeBench) -> None:
    bench = make_bench()
    calls = [bench.asks() for _ in range(5)]
    await turns()
    assert bench.attempts == 2
    # Callers get the two sessions in the order in which they asked.
    for index, call in enumerate(calls):
        await turns()
        assert [each.done() for each in calls].count(True) == min(index + 2, 5)
        bench.give_back(await call)
    assert bench.attempts == 2


async def test_resize_allows_more_sessions(make_bench: MakeBench) -> None:
    bench = make_bench(max_size=1)
    calls = [bench.asks() for _ in range(3)]
    await turns()
    assert bench.attempts == 1
    bench.pool.resize(2, 10.0)
    bench.give_back(await calls[0])
    await turns()
    calls.append(bench.asks())
    await turns()
    assert bench.attempts == 2
    assert [call.done() for call in calls] == [True, True, True, False]
    calls[3].cancel()


async def test_get_without_a_free_session_returns_none_after_its_timeout(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(max_size=1)
    session = await bench.get()
    assert await bench.pool.get(0.001) is None
    bench.give_back(session)
    assert bench.take() is session


@pytest.mark.parametrize("is_opening", [False, True])
async def test_get_cancelled_passes_its_session_on(make_bench: MakeBench, is_opening: bool) -> None:
    """The caller is cancelled in the step in which its session becomes free."""
    bench = make_bench(max_size=1)
    if is_opening:
        bench.may_connect.clear()
    else:
        session = await bench.get()
    first, second = bench.asks(), bench.asks()
    await turns()
    if is_opening:
        bench.may_connect.set()
        first.cancel()
    else:
        bench.give_back(session)
        first.cancel()
    await turns()
    assert first.cancelled()
    assert second.done()
    bench.give_back(await second)
    assert bench.take() is bench.opened[0]
    assert len(bench.opened) == 1


async def test_get_keeps_its_place_when_it_checks_why_it_waits(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_CHECK_INTERVAL", 0.0)
    bench = make_bench(max_size=1)
    session = await bench.get()
    checked = asyncio.Event()
    first = asyncio.create_task(bench.pool.get(10.0, checked.set))
    await turns()
    second = bench.asks()
    checked.clear()
    await checked.wait()
    bench.give_back(session)
    await turns()
    assert (first.done(), second.done()) == (True, False)
    bench.give_back(session)
    assert await second is session


async def test_get_whose_check_raises_leaves_the_queue(
    make_bench: MakeBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_CHECK_INTERVAL", 0.0)
    bench = make_bench(max_size=1)
    session = await bench.get()

    def check() -> None:
        raise LookupError

    with pytest.raises(LookupError):
        await bench.pool.get(10.0, check)
    bench.give_back(session)
    assert bench.take() is session


async def test_session_that_hung_up_after_it_was_handed_over_is_replaced(
    make_bench: MakeBench,
) -> None:
    """The loop was busy between the step that hands it over and the caller's next step."""
    bench = make_bench(max_size=1)
    session = await bench.get()
    call = bench.asks()
    await turns()
    bench.give_back(session)
    session.has_hung_up = True
    assert await call is None
    assert session.is_closed
    assert await bench.get() is bench.opened[1]


@pytest.mark.parametrize("what", ["connect_error", "prepare_error"])
async def test_open_failing_is_repeated_while_a_caller_waits(
    make_bench: MakeBench, what: str
) -> None:
    bench = make_bench()
    error = OSError("away")
    setattr(bench, what, error)
    call = bench.asks()
    await turns(20)
    assert not call.done()
    assert bench.pool.error is error
    setattr(bench, what, None)
    await turns(20)
    assert (await call) is bench.opened[-1]
    assert bench.pool.error is None
    assert all(session.is_closed for session in bench.opened[:-1])


async def test_open_failing_stops_when_no_caller_waits(make_bench: MakeBench) -> None:
    bench = make_bench()
    bench.connect_error = OSError("away")
    call = bench.asks()
    await turns()
    call.cancel()
    await turns()
    attempts = bench.attempts
    await turns(20)
    assert bench.attempts == attempts
    # The next call does not read the old error before its own attempt has failed.
    bench.may_connect.clear()
    call = bench.asks()
    await turns()
    assert bench.pool.error is None
    call.cancel()
    await bench.pool.close()


async def test_session_idle_for_max_idle_is_closed_and_not_before(make_bench: MakeBench) -> None:
    """Each use begins the time again."""
    bench = make_bench()
    first, second = await bench.get(), await bench.get()
    bench.give_back(first)
    bench.give_back(second)
    bench.passes(6)
    assert bench.take() is second
    bench.give_back(second)
    bench.passes(4)
    assert (first.is_closed, second.is_closed) == (True, False)
    bench.passes(5.9)
    assert not second.is_closed
    bench.passes(0.1)
    assert second.is_closed
    assert bench.timers == []
    assert bench.take() is None


async def test_session_that_the_server_has_closed_is_replaced(make_bench: MakeBench) -> None:
    bench = make_bench(max_size=1)
    session = await bench.get()
    bench.give_back(session)
    session.has_hung_up = True
    assert bench.take() is None
    assert session.is_closed
    assert await bench.get() is bench.opened[1]


async def test_session_closed_by_its_caller_is_replaced_for_a_waiting_caller(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(max_size=1)
    session = await bench.get()
    call = bench.asks()
    await turns()
    session.close()
    bench.give_back(session)
    assert await call is bench.opened[1]


async def test_session_older_than_its_lifetime_is_replaced(make_bench: MakeBench) -> None:
    bench = make_bench(max_size=1)
    session = await bench.get()
    bench.passes(3600)
    bench.give_back(session)
    assert session.is_closed
    assert await bench.get() is bench.opened[1]


async def test_session_of_a_cancelled_statement_is_settled_before_its_next_use(
    make_bench: MakeBench,
) -> None:
    bench = make_bench(max_size=1)
    session = await bench.get()
    session.is_reusable = False
    call = bench.asks()
    bench.give_back(session)
    await turns()
    assert not call.done()
    assert bench.attempts == 1  # it counts as one of the connections meanwhile
    bench.may_settle.set()
    assert await call is session


async def test_close_ends_waiting_callers_and_attempts_to_connect(make_bench: MakeBench) -> None:
    bench = make_bench()
    idle, busy = await bench.get(), await bench.get()
    bench.give_back(idle)
    assert bench.take() is idle
    bench.may_connect.clear()
    bench.give_back(idle)
    idle.has_hung_up = True  # so that the next call opens another one
    call = bench.asks()
    await turns()
    await bench.pool.close()
    assert await call is None
    assert idle.is_closed
    assert busy.is_closed
    assert len(bench.opened) == 2
    assert await bench.pool.get(10.0) is None
    bench.give_back(busy)
    assert bench.take() is None
    assert not bench.timers


async def test_abandon_closes_a_session_that_is_given_back_later(make_bench: MakeBench) -> None:
    bench = make_bench()
    session = await bench.get()
    bench.pool.abandon()
    assert session.is_closed
    bench.give_back(session)
    assert bench.take() is None


def test_session_of_a_coroutine_that_outlives_its_loop_is_closed(make_bench: MakeBench) -> None:
    """The coroutine is deleted after the loop was closed, in the middle of a statement."""

    async def begin() -> tuple[Bench, FakeSession]:
        bench = make_bench()
        return bench, await bench.get()

    loop = asyncio.new_event_loop()
    bench, session = loop.run_until_complete(begin())
    bench.pool._loop = loop
    loop.close()
    session.is_reusable = False
    bench.give_back(session)
    assert session.is_closed


async def test_session_being_prepared_counts_once(make_bench: MakeBench) -> None:
    bench = make_bench(max_size=2)
    may_prepare = asyncio.Event()

    async def prepare(session: Session) -> None:
        await may_prepare.wait()

    bench.pool._prepare = prepare
    first = bench.asks()
    await turns()
    second, third = bench.asks(), bench.asks()
    await turns()
    assert bench.attempts == 2
    may_prepare.set()
    await turns()
    assert [call.done() for call in (first, second, third)] == [True, True, False]
    third.cancel()


async def test_abandon_closes_a_session_being_prepared(make_bench: MakeBench) -> None:
    bench = make_bench()
    may_prepare = asyncio.Event()

    async def prepare(session: Session) -> None:
        await may_prepare.wait()

    bench.pool._prepare = prepare
    call = bench.asks()
    await turns()
    bench.pool.abandon()
    assert bench.opened[0].is_closed
    call.cancel()
    may_prepare.set()
    await turns()
    assert bench.take() is None
