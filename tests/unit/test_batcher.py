"""The batcher: which operations are written together, and the outcome of each call."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pg_layer._process.tasks import Work
from pg_layer._send.batcher import MAX_BYTES, MAX_OPERATIONS, Batcher, Outcome
from pg_layer.exceptions import LayerUnavailable, NotBegun, OutcomeUnknown

Task = asyncio.Task[None]
T = TypeVar("T")


class Refused(Exception):
    """The outcome of a single operation."""


class Writes:
    """The write function of a batcher. Records batches, and ends each on request."""

    def __init__(self) -> None:
        self.batches: list[list[Any]] = []
        self.timeouts: list[float] = []
        self.by: list[asyncio.Task[Any] | None] = []
        self.outcomes: dict[Any, Exception] = {}
        self._ends: list[asyncio.Future[None]] = []
        self._is_open = False

    async def write(self, operations: list[Any], timeout: float) -> Sequence[Outcome]:
        self.batches.append(list(operations))
        self.timeouts.append(timeout)
        self.by.append(asyncio.current_task())
        if not self._is_open:
            end: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._ends.append(end)
            await end
        return [self.outcomes.get(operation) for operation in operations]

    @property
    def in_flight(self) -> int:
        return sum(not end.done() for end in self._ends)

    def end(self, error: Exception | None = None) -> None:
        """End the write in flight."""
        (end,) = (end for end in self._ends if not end.done())
        if error is None:
            end.set_result(None)
        else:
            end.set_exception(error)

    def open(self) -> None:
        """From now on every write ends at once."""
        self._is_open = True
        for end in self._ends:
            if not end.done():
                end.set_result(None)

    @property
    def written(self) -> list[Any]:
        return [operation for batch in self.batches for operation in batch]


class Bench:
    """A batcher on the running loop."""

    def __init__(
        self, weigh: Callable[[Any], int] = lambda operation: 1, timeout: float = 30.0
    ) -> None:
        self.writes = Writes()
        self.tasks: list[Task] = []
        loop = asyncio.get_running_loop()
        self.batcher: Batcher[Any] = Batcher(loop, self.writes.write, self._spawn, weigh, timeout)

    def _spawn(self, what: str, work: Work) -> None:
        self.tasks.append(asyncio.create_task(work()))

    def submit(self, operation: object) -> Task:
        return asyncio.create_task(self.batcher.submit(operation))

    async def submit_all(self, operations: Sequence[object]) -> list[Task]:
        tasks = [self.submit(operation) for operation in operations]
        await turns()
        return tasks


async def turns(count: int = 4) -> None:
    """Let all tasks run until they wait."""
    for _ in range(count):
        await asyncio.sleep(0)


async def outcomes(tasks: Sequence[Task]) -> list[object]:
    """Return the outcome of each call."""
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)


# --- Batches


async def test_submit_on_idle_batcher_writes_at_once_in_the_callers_task() -> None:
    bench = Bench()
    for operation in "ab":
        task = bench.submit(operation)
        await asyncio.sleep(0)
        assert bench.writes.by[-1] is task
        bench.writes.end()
        await task
    assert bench.writes.batches == [["a"], ["b"]]
    assert bench.tasks == []


async def test_submit_during_a_write_joins_the_next_batch() -> None:
    bench = Bench()
    tasks = await bench.submit_all("abcd")
    assert bench.writes.batches == [["a"]]
    bench.writes.end()
    await turns()
    assert bench.writes.batches == [["a"], ["b", "c", "d"]]
    tasks += await bench.submit_all("ef")
    assert bench.writes.in_flight == 1
    bench.writes.open()
    assert await outcomes(tasks) == [None] * 6
    assert bench.writes.batches == [["a"], ["b", "c", "d"], ["e", "f"]]


async def test_submit_again_by_woken_callers_joins_one_batch() -> None:
    bench = Bench()

    async def sender(name: str) -> None:
        for number in range(5):
            await bench.batcher.submit(f"{name}{number}")

    tasks = [asyncio.create_task(sender(name)) for name in "abcd"]
    for _ in range(100):
        await asyncio.sleep(0)
        if bench.writes.in_flight:
            bench.writes.end()
    assert await outcomes(tasks) == [None] * 4
    # Callers of a batch that send again are in time for the next one: none is written alone.
    assert [len(batch) for batch in bench.writes.batches] == [1, 4, 4, 4, 4, 3]


async def test_batch_holds_at_most_max_operations() -> None:
    bench = Bench()
    tasks = await bench.submit_all(range(2 * MAX_OPERATIONS + 3))
    bench.writes.open()
    assert await outcomes(tasks) == [None] * len(tasks)
    assert [len(batch) for batch in bench.writes.batches] == [1, MAX_OPERATIONS, MAX_OPERATIONS, 2]
    assert bench.writes.written == list(range(len(tasks)))


@pytest.mark.parametrize(
    ("weights", "batches"),
    [
        ([MAX_BYTES // 4] * 5, [4, 1]),
        ([MAX_BYTES // 4] * 3 + [MAX_BYTES // 4 + 1], [3, 1]),
        ([1, 2 * MAX_BYTES, 1, 1], [1, 1, 2]),
        ([3 * MAX_BYTES, 3 * MAX_BYTES], [1, 1]),
        ([MAX_BYTES, 0, 1], [2, 1]),
    ],
)
async def test_batch_holds_at_most_max_bytes(weights: list[int], batches: list[int]) -> None:
    bench = Bench(weigh=lambda operation: operation[1])
    tasks = await bench.submit_all([(-1, 1), *enumerate(weights)])
    bench.writes.open()
    await outcomes(tasks)
    assert [len(batch) for batch in bench.writes.batches[1:]] == batches
    assert [operation for operation, _ in bench.writes.written] == list(range(-1, len(weights)))


# --- Outcomes


async def test_submit_returns_or_raises_its_own_outcome() -> None:
    bench = Bench()
    refused = {operation: Refused(operation) for operation in "ab"}
    bench.writes.outcomes.update(refused)
    tasks = await bench.submit_all("abcd")
    bench.writes.open()
    assert await outcomes(tasks) == [refused["a"], refused["b"], None, None]


async def test_write_failing_fails_its_batch_only() -> None:
    bench = Bench()
    tasks = await bench.submit_all("abc")
    first, second = Refused("first"), Refused("second")
    bench.writes.end(first)
    await turns()
    tasks += await bench.submit_all("de")
    bench.writes.end(second)
    await turns()
    bench.writes.open()
    assert await outcomes(tasks) == [first, second, second, None, None]


async def test_write_raising_not_begun_in_the_callers_task_fails_that_call_only() -> None:
    bench = Bench()
    tasks = await bench.submit_all("ab")
    bench.writes.end(NotBegun())
    bench.writes.open()
    results = await outcomes(tasks)
    assert type(results[0]) is NotBegun
    assert results[1] is None
    await turns()
    assert bench.writes.batches == [["a"], ["b"]]


# --- Cancellation


async def test_finish_does_not_wait_for_a_write_cancelled_before_it_began() -> None:
    """The engine is closed in the step in which the first write ends, while another stops it."""
    bench = Bench()

    def spawn(what: str, work: Work) -> None:
        bench.tasks.append(asyncio.create_task(work()))
        bench.tasks[-1].cancel()

    bench.batcher._spawn = spawn
    tasks = await bench.submit_all("ab")
    bench.writes.end()
    await tasks[0]
    await asyncio.wait_for(bench.batcher.finish(), 10)
    assert isinstance((await outcomes(tasks[1:]))[0], NotBegun)
    assert bench.writes.batches == [["a"]]


async def test_submit_cancelled_while_waiting_is_not_written() -> None:
    bench = Bench()
    tasks = await bench.submit_all("abcd")
    tasks[2].cancel()
    bench.writes.open()
    results = await outcomes(tasks)
    assert isinstance(results.pop(2), asyncio.CancelledError)
    assert results == [None] * 3
    assert bench.writes.written == ["a", "b", "d"]


async def test_batcher_is_idle_after_all_waiting_callers_are_cancelled() -> None:
    bench = Bench()
    tasks = await bench.submit_all("abc")
    tasks[1].cancel()
    tasks[2].cancel()
    bench.writes.end()
    await turns()
    later = bench.submit("d")
    await turns()
    assert bench.writes.by[-1] is later
    bench.writes.open()
    await later
    assert bench.writes.batches == [["a"], ["d"]]


async def test_submit_cancelled_during_its_write_leaves_the_batch_alone() -> None:
    bench = Bench()
    tasks = await bench.submit_all("abc")
    bench.writes.end()
    await turns()
    assert bench.writes.batches[-1] == ["b", "c"]
    tasks[1].cancel()
    await turns()
    bench.writes.open()
    results = await outcomes(tasks)
    assert isinstance(results[1], asyncio.CancelledError)
    assert [results[0], results[2]] == [None, None]


async def test_submit_cancelled_in_its_own_write_leaves_waiting_callers_alone() -> None:
    bench = Bench()
    tasks = await bench.submit_all("abc")
    tasks[0].cancel()
    await turns()
    assert bench.writes.batches == [["a"], ["b", "c"]]
    bench.writes.open()
    results = await outcomes(tasks)
    assert isinstance(results[0], asyncio.CancelledError)
    assert results[1:] == [None, None]


SCHEDULES = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "submit", "cancel", "end", "fail", "turn"]),
        st.integers(0, 9),
    ),
    max_size=40,
)


@settings(max_examples=100, deadline=None)
@given(SCHEDULES)
def test_operations_are_written_once_in_order_in_any_schedule(
    schedule: list[tuple[str, int]],
) -> None:
    async def main() -> None:
        bench = Bench()
        tasks: list[Task] = []
        for action, argument in schedule:
            if action == "submit":
                tasks.append(bench.submit(len(tasks)))
            elif action == "cancel" and tasks:
                tasks[argument % len(tasks)].cancel()
            elif action == "end" and bench.writes.in_flight:
                bench.writes.end()
            elif action == "fail" and bench.writes.in_flight:
                bench.writes.end(Refused())
            elif action == "turn":
                await turns(argument)
            assert bench.writes.in_flight <= 1
        bench.writes.open()
        await outcomes(tasks)
        written = bench.writes.written
        assert written == sorted(set(written))
        assert {operation for operation, task in enumerate(tasks) if not task.cancelled()} <= set(
            written
        )
        later = bench.submit("later")
        await outcomes([later])
        assert bench.writes.batches[-1] == ["later"]

    asyncio.run(main())


# --- The end


async def test_close_fails_waiting_callers_and_lets_the_write_in_flight_end() -> None:
    bench = Bench()
    bench.writes.outcomes["a"] = Refused("a")
    tasks = await bench.submit_all("abc")
    bench.batcher.close()
    await turns()
    assert not tasks[0].done()
    bench.writes.end()
    results = await outcomes(tasks)
    assert results[0] is bench.writes.outcomes["a"]
    assert [type(result) for result in results[1:]] == [NotBegun, NotBegun]
    assert bench.writes.written == ["a"]


async def test_close_during_a_batch_lets_the_batch_end() -> None:
    bench = Bench()
    tasks = await bench.submit_all("ab")
    bench.writes.end()
    await turns()
    tasks += await bench.submit_all("c")
    bench.batcher.close()
    bench.writes.end()
    results = await outcomes(tasks)
    assert results[:2] == [None, None]
    assert isinstance(results[2], NotBegun)


async def test_submit_on_closed_batcher_raises_not_begun() -> None:
    bench = Bench()
    bench.batcher.close()
    with pytest.raises(NotBegun):
        await bench.batcher.submit("a")
    with pytest.raises(NotBegun):
        await asyncio.to_thread(asyncio.run, bench.batcher.submit("b"))
    assert bench.writes.batches == []


async def test_writing_task_cancelled_raises_outcome_unknown_for_its_batch() -> None:
    bench = Bench()
    tasks = await bench.submit_all("abc")
    bench.writes.end()
    await turns()
    bench.batcher.close()
    (work,) = bench.tasks
    work.cancel()
    results = await outcomes(tasks)
    assert results[0] is None
    assert [type(result) for result in results[1:]] == [OutcomeUnknown, OutcomeUnknown]


async def test_finish_waits_for_the_write_in_flight_and_fails_waiting_callers() -> None:
    bench = Bench()
    tasks = await bench.submit_all("ab")
    bench.writes.end()
    await turns()
    tasks += await bench.submit_all("c")
    finished = asyncio.create_task(bench.batcher.finish())
    await turns()
    assert not finished.done()
    assert tasks[2].done()
    bench.writes.end()
    await asyncio.wait_for(finished, 10)
    results = await outcomes(tasks)
    assert results[:2] == [None, None]
    assert isinstance(results[2], NotBegun)
    with pytest.raises(NotBegun):
        await bench.batcher.submit("d")
    assert bench.writes.written == ["a", "b"]


async def test_finish_waits_for_a_write_in_the_callers_task() -> None:
    bench = Bench()
    tasks = await bench.submit_all("a")
    finished = asyncio.create_task(bench.batcher.finish())
    await turns()
    assert not finished.done()
    tasks[0].cancel()
    await asyncio.wait_for(finished, 10)


async def test_finish_on_idle_batcher_returns_at_once() -> None:
    bench = Bench()
    await asyncio.wait_for(bench.batcher.finish(), 10)
    tasks = await bench.submit_all("a")
    assert isinstance((await outcomes(tasks))[0], NotBegun)


# --- Time


class Clock:
    """A replacement of the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("pg_layer._send.batcher.time", clock)
    return clock


async def test_write_gets_the_time_that_the_oldest_caller_has_left(clock: Clock) -> None:
    bench = Bench(timeout=10.0)
    tasks = await bench.submit_all("ab")
    clock.now += 4
    tasks += await bench.submit_all("c")
    clock.now += 1
    bench.writes.end()
    await turns()
    assert bench.writes.batches == [["a"], ["b", "c"]]
    assert bench.writes.timeouts == [10.0, 5.0]
    bench.writes.open()
    assert await outcomes(tasks) == [None] * 3


async def test_submit_waiting_longer_than_its_timeout_is_not_written(clock: Clock) -> None:
    bench = Bench(timeout=10.0)
    tasks = await bench.submit_all("ab")
    clock.now += 6
    tasks += await bench.submit_all("c")
    clock.now += 4
    bench.writes.open()
    results = await outcomes(tasks)
    assert results[0] is None
    assert type(results[1]) is LayerUnavailable
    assert results[2] is None
    assert bench.writes.written == ["a", "c"]


# --- Callers on foreign loops


async def test_submit_from_foreign_loops_returns_or_raises_its_own_outcome() -> None:
    bench = Bench()
    bench.writes.outcomes["b"] = Refused("b")
    threads = [
        asyncio.create_task(asyncio.to_thread(asyncio.run, bench.batcher.submit(operation)))
        for operation in "abc"
    ]
    bench.writes.open()
    assert await outcomes(threads) == [None, bench.writes.outcomes["b"], None]
    assert sorted(bench.writes.written) == ["a", "b", "c"]


async def test_submit_from_foreign_loops_joins_the_batch() -> None:
    bench = Bench()
    mine = await bench.submit_all("a")
    begun = threading.Semaphore(0)

    def caller(operation: str) -> None:
        async def main() -> None:
            task = asyncio.create_task(bench.batcher.submit(operation))
            await asyncio.sleep(0)
            begun.release()
            await task

        asyncio.run(main())

    others = [asyncio.create_task(asyncio.to_thread(caller, operation)) for operation in "bcd"]
    for _ in others:
        await asyncio.to_thread(begun.acquire)
    mine += await bench.submit_all("e")
    bench.writes.open()
    assert await outcomes(mine + others) == [None] * 5
    assert [sorted(batch) for batch in bench.writes.batches] == [["a"], ["b", "c", "d", "e"]]


async def test_submit_from_foreign_loop_cancelled_while_waiting_is_not_written() -> None:
    bench = Bench()
    mine = await bench.submit_all("a")

    def caller() -> bool:
        async def main() -> bool:
            task = asyncio.create_task(bench.batcher.submit("b"))
            await asyncio.sleep(0)
            task.cancel()
            await asyncio.wait([task])
            return task.cancelled()

        return asyncio.run(main())

    assert await asyncio.to_thread(caller)
    mine += await bench.submit_all("c")
    bench.writes.open()
    assert await outcomes(mine) == [None, None]
    assert bench.writes.batches == [["a"], ["c"]]


async def test_submit_from_a_loop_closed_meanwhile_leaves_other_callers_alone() -> None:
    bench = Bench()
    mine = await bench.submit_all("a")
    loop = asyncio.new_event_loop()
    gone = bench.batcher.submit("b")

    async def first_step() -> None:
        gone.send(None)

    await asyncio.to_thread(loop.run_until_complete, first_step())
    await turns()
    loop.close()
    mine += await bench.submit_all("c")
    bench.writes.open()
    assert await outcomes(mine) == [None, None]
    assert bench.writes.batches == [["a"], ["b", "c"]]
    gone.close()


@pytest.fixture
def still_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop that does not run."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers on foreign loops wait no longer than the write may take."""
    monkeypatch.setattr("pg_layer._send.batcher.GRACE", 0.0)


async def make_bench(timeout: float) -> Bench:
    return Bench(timeout=timeout)


async def test_submit_to_a_closed_loop_raises_not_begun_at_once(
    still_loop: asyncio.AbstractEventLoop,
) -> None:
    bench = await asyncio.to_thread(still_loop.run_until_complete, make_bench(timeout=60))
    still_loop.close()
    with pytest.raises(NotBegun):
        await asyncio.wait_for(bench.batcher.submit("a"), 10)


async def test_submit_to_a_stopped_loop_raises_layer_unavailable_after_its_timeout(
    still_loop: asyncio.AbstractEventLoop,
) -> None:
    bench = await asyncio.to_thread(still_loop.run_until_complete, make_bench(timeout=0.02))
    with pytest.raises(LayerUnavailable) as caught:
        await asyncio.wait_for(bench.batcher.submit("a"), 10)
    assert type(caught.value) is LayerUnavailable
    # The call has failed: its operation must not be written when the loop runs again.
    bench.writes.open()
    await asyncio.to_thread(still_loop.run_until_complete, turns())
    assert bench.writes.written == []


async def test_submit_to_a_loop_stopped_during_the_write_raises_outcome_unknown(
    still_loop: asyncio.AbstractEventLoop,
) -> None:
    """The write may be committed, although the loop does not run to report it."""
    bench = await asyncio.to_thread(still_loop.run_until_complete, make_bench(timeout=0.3))
    task = asyncio.create_task(bench.batcher.submit("a"))
    await turns()
    await asyncio.to_thread(still_loop.run_until_complete, turns())
    assert bench.writes.batches == [["a"]]
    (result,) = await outcomes([task])
    assert type(result) is OutcomeUnknown
    await asyncio.to_thread(still_loop.run_until_complete, asyncio.sleep(0))
    bench.writes.open()
    await asyncio.to_thread(still_loop.run_until_complete, turns())


async def on(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    """Run a loop that makes no progress until ``work`` has ended."""
    return await asyncio.to_thread(loop.run_until_complete, asyncio.wait_for(work, 10))


def loop_of(task: asyncio.Task[Any] | None) -> asyncio.AbstractEventLoop:
    assert task is not None
    return task.get_loop()


async def test_submit_from_foreign_loop_writes_on_the_batchers_loop(
    still_loop: asyncio.AbstractEventLoop,
) -> None:
    bench = await on(still_loop, make_bench(timeout=60))
    task = bench.submit("a")
    await turns()
    assert bench.writes.batches == []
    bench.writes.open()
    await on(still_loop, turns())
    assert await outcomes([task]) == [None]
    assert bench.writes.batches == [["a"]]
    assert loop_of(bench.writes.by[0]) is still_loop


async def test_submit_from_foreign_loop_during_a_write_joins_the_next_batch(
    still_loop: asyncio.AbstractEventLoop,
) -> None:
    bench = await on(still_loop, make_bench(timeout=60))
    own = await on(still_loop, bench.submit_all("ab"))
    foreign = bench.submit("c")
    await turns()
    assert bench.writes.batches == [["a"]]

    async def end() -> None:
        bench.writes.end()
        await turns()

    await on(still_loop, end())
    assert bench.writes.batches == [["a"], ["b", "c"]]
    await on(still_loop, end())
    assert await on(still_loop, outcomes(own)) + await outcomes([foreign]) == [None] * 3
    # The batcher is idle again.
    later = await on(still_loop, bench.submit_all("d"))
    assert bench.writes.by[-1] is later[0]
    bench.writes.open()
    assert await on(still_loop, outcomes(later)) == [None]


@pytest.mark.parametrize("waiting", ["", "bc"])
async def test_submit_from_foreign_loop_cancelled_during_its_write_leaves_others_alone(
    still_loop: asyncio.AbstractEventLoop, waiting: str
) -> None:
    bench = await on(still_loop, make_bench(timeout=60))
    foreign = bench.submit("a")
    await turns()
    own = await on(still_loop, bench.submit_all(waiting))
    await on(still_loop, turns())
    assert bench.writes.batches == [["a"]]
    foreign.cancel()
    await asyncio.wait([foreign])
    assert foreign.cancelled()
    later = bench.submit("d")
    await turns()
    bench.writes.open()
    await on(still_loop, turns(8))
    assert await on(still_loop, outcomes(own)) == [None] * len(waiting)
    assert await outcomes([later]) == [None]
    assert bench.writes.batches == [["a"], [*waiting, "d"]]


@pytest.mark.parametrize("is_raised", [False, True])
async def test_submit_from_foreign_loop_alone_gets_its_failure(
    still_loop: asyncio.AbstractEventLoop, is_raised: bool
) -> None:
    bench = await on(still_loop, make_bench(timeout=60))
    refused = Refused("a")
    if not is_raised:
        bench.writes.outcomes["a"] = refused
    foreign = [bench.submit("a")]
    await turns()
    await on(still_loop, turns())
    own = await on(still_loop, bench.submit_all("b"))
    foreign.append(bench.submit("c"))
    await turns()

    async def end() -> None:
        bench.writes.end(refused if is_raised else None)
        await turns()

    await on(still_loop, end())
    assert await outcomes(foreign[:1]) == [refused]
    bench.writes.open()
    assert await on(still_loop, outcomes(own)) == [None]
    assert await outcomes(foreign) == [refused, None]
    assert bench.writes.written == ["a", "b", "c"]


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_finish_waits_for_the_write_of_a_foreign_caller(
    still_loop: asyncio.AbstractEventLoop, is_cancelled: bool
) -> None:
    bench = await on(still_loop, make_bench(timeout=60))
    foreign = bench.submit("a")
    await turns()
    await on(still_loop, turns())

    async def begin_to_finish() -> tuple[list[Task], Task]:
        waiting = await bench.submit_all("b")
        finished = asyncio.create_task(bench.batcher.finish())
        await turns()
        assert not finished.done()
        return waiting, finished

    waiting, finished = await on(still_loop, begin_to_finish())
    assert type((await on(still_loop, outcomes(waiting)))[0]) is NotBegun
    if is_cancelled:
        foreign.cancel()
        await turns()
    bench.writes.open()
    assert await on(still_loop, outcomes([finished])) == [None]
    (result,) = await outcomes([foreign])
    assert isinstance(result, asyncio.CancelledError) if is_cancelled else result is None
    assert bench.writes.batches == [["a"]]


async def test_submit_from_foreign_loop_to_closed_batcher_raises_not_begun(
    still_loop: asyncio.AbstractEventLoop,
) -> None:
    bench = await on(still_loop, make_bench(timeout=60))
    bench.batcher.close()
    foreign = bench.submit("a")
    await turns()
    await on(still_loop, turns())
    assert type((await outcomes([foreign]))[0]) is NotBegun
    assert bench.writes.batches == []


async def test_batcher_used_by_many_threads_writes_each_operation_once_in_order() -> None:
    """There are never two writes at a time, and no caller hangs."""
    callers, rounds = 4, 25
    guard = threading.Lock()
    written: list[tuple[str, int, int]] = []
    names = ["first", "second", "third", "here"]
    every = [
        (name, number, turn)
        for name in names
        for number in range(callers)
        for turn in range(rounds)
    ]
    refused = {operation: Refused(operation) for operation in every if operation[2] % 5 == 4}
    here = asyncio.get_running_loop()

    async def write(operations: list[tuple[str, int, int]], _: float) -> Sequence[Outcome]:
        assert asyncio.get_running_loop() is here
        assert guard.acquire(blocking=False), "two at a time"
        try:
            for _ in range(len(written) % 3):
                await asyncio.sleep(0)
            written.extend(operations)
            return [refused.get(operation) for operation in operations]
        finally:
            guard.release()

    spawned: list[Task] = []

    def spawn(what: str, work: Work) -> None:
        spawned.append(asyncio.create_task(work()))

    batcher: Batcher[Any] = Batcher(here, write, spawn, lambda operation: 1, 30)

    async def caller(name: str, number: int) -> None:
        for turn in range(rounds):
            operation = (name, number, turn)
            outcome: object
            (outcome,) = await asyncio.gather(batcher.submit(operation), return_exceptions=True)
            assert outcome is refused.get(operation)
            if (number + turn) % 3 == 0:  # let other callers find the batcher idle
                await asyncio.sleep(0)

    async def all_of(name: str) -> None:
        await asyncio.wait_for(
            asyncio.gather(*(caller(name, number) for number in range(callers))), 20
        )

    def thread(name: str) -> None:
        asyncio.run(all_of(name))

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        await asyncio.gather(
            *(asyncio.to_thread(thread, name) for name in names[:-1]), all_of("here")
        )
        await asyncio.wait_for(batcher.finish(), 10)
    finally:
        sys.setswitchinterval(interval)
    await outcomes(spawned)
    assert sorted(written) == sorted(every)
    for name in names:
        for number in range(callers):
            assert [t for n, c, t in written if (n, c) == (name, number)] == list(range(rounds))
