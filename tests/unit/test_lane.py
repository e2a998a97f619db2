"""Natural batching: what goes together, who is told what, and that nobody waits for ever."""

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
from pg_layer._send.batcher import MAX_BYTES, MAX_OPS, Batcher, Outcome
from pg_layer.exceptions import LayerUnavailable, NotBegun, OutcomeUnknown

Task = asyncio.Task[None]
T = TypeVar("T")


class Refused(Exception):
    """The outcome of a single operation."""


class Writes:
    """The other end of a batcher: notes batches, and ends each when it is told to."""

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

    def submit(self, operation: object, may_write: bool = False) -> Task:
        return asyncio.create_task(self.batcher.submit(operation, may_write=may_write))

    async def submit_all(self, operations: Sequence[object], may_write: bool = False) -> list[Task]:
        tasks = [self.submit(operation, may_write) for operation in operations]
        await turns()
        return tasks


async def turns(count: int = 4) -> None:
    """Let everything come to where it waits."""
    for _ in range(count):
        await asyncio.sleep(0)


async def outcomes(tasks: Sequence[Task]) -> list[object]:
    """What each caller got."""
    return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 10)


# --- Batches


async def test_on_an_idle_lane_an_operation_goes_at_once_in_its_callers_task() -> None:
    bench = Bench()
    for operation in "ab":
        task = bench.submit(operation)
        await asyncio.sleep(0)
        assert bench.writes.by[-1] is task
        bench.writes.end()
        await task
    assert bench.writes.batches == [["a"], ["b"]]
    assert bench.tasks == []


async def test_what_comes_while_a_write_is_in_flight_goes_together_in_the_next() -> None:
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


async def test_who_sends_again_and_again_goes_together_too() -> None:
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
    # Those of a batch who send again are in time for the next: none of them goes ahead on its own.
    assert [len(batch) for batch in bench.writes.batches] == [1, 4, 4, 4, 4, 3]


async def test_a_batch_has_a_most_of_operations() -> None:
    bench = Bench()
    tasks = await bench.submit_all(range(2 * MAX_OPS + 3))
    bench.writes.open()
    assert await outcomes(tasks) == [None] * len(tasks)
    assert [len(batch) for batch in bench.writes.batches] == [1, MAX_OPS, MAX_OPS, 2]
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
async def test_a_batch_has_a_most_of_bytes(weights: list[int], batches: list[int]) -> None:
    bench = Bench(weigh=lambda operation: operation[1])
    tasks = await bench.submit_all([(-1, 1), *enumerate(weights)])
    bench.writes.open()
    await outcomes(tasks)
    assert [len(batch) for batch in bench.writes.batches[1:]] == batches
    assert [operation for operation, _ in bench.writes.written] == list(range(-1, len(weights)))


# --- Outcomes


async def test_each_caller_gets_its_own_outcome() -> None:
    bench = Bench()
    refused = {operation: Refused(operation) for operation in "ab"}
    bench.writes.outcomes.update(refused)
    tasks = await bench.submit_all("abcd")
    bench.writes.open()
    assert await outcomes(tasks) == [refused["a"], refused["b"], None, None]


async def test_a_write_that_fails_fails_its_batch_and_no_other() -> None:
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


async def test_the_lanes_own_caller_is_told_that_its_write_could_not_begin() -> None:
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


async def test_a_caller_cancelled_while_it_waits_is_not_written() -> None:
    bench = Bench()
    tasks = await bench.submit_all("abcd")
    tasks[2].cancel()
    bench.writes.open()
    results = await outcomes(tasks)
    assert isinstance(results.pop(2), asyncio.CancelledError)
    assert results == [None] * 3
    assert bench.writes.written == ["a", "b", "d"]


async def test_when_all_who_waited_are_cancelled_the_lane_is_idle_again() -> None:
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


async def test_a_caller_cancelled_while_it_is_written_costs_the_others_nothing() -> None:
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


async def test_the_first_caller_cancelled_in_its_own_write_does_not_take_others_along() -> None:
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
def test_whatever_comes_in_is_written_once_in_its_order(schedule: list[tuple[str, int]]) -> None:
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


async def test_closing_fails_who_waits_and_lets_the_write_in_flight_end() -> None:
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


async def test_closing_in_the_middle_of_a_batch() -> None:
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


async def test_a_closed_lane_takes_nothing() -> None:
    bench = Bench()
    bench.batcher.close()
    with pytest.raises(NotBegun):
        await bench.batcher.submit("a")
    with pytest.raises(NotBegun):
        await asyncio.to_thread(asyncio.run, bench.batcher.submit("b"))
    assert bench.writes.batches == []


async def test_when_the_writing_task_is_cancelled_its_callers_are_told() -> None:
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


async def test_finishing_waits_for_the_write_in_flight_and_fails_who_waits() -> None:
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


async def test_finishing_waits_for_the_first_callers_own_write() -> None:
    bench = Bench()
    tasks = await bench.submit_all("a")
    finished = asyncio.create_task(bench.batcher.finish())
    await turns()
    assert not finished.done()
    tasks[0].cancel()
    await asyncio.wait_for(finished, 10)


async def test_an_idle_lane_is_finished_at_once() -> None:
    bench = Bench()
    await asyncio.wait_for(bench.batcher.finish(), 10)
    tasks = await bench.submit_all("a")
    assert isinstance((await outcomes(tasks))[0], NotBegun)


# --- Time


class Clock:
    """In place of the module `time`."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("pg_layer._send.batcher.time", clock)
    return clock


async def test_a_write_is_given_the_time_that_its_callers_have_left(clock: Clock) -> None:
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


async def test_who_has_waited_too_long_is_told_so_and_not_written(clock: Clock) -> None:
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


# --- Other loops


async def test_callers_on_other_loops_are_written_and_told_their_outcomes() -> None:
    bench = Bench()
    bench.writes.outcomes["b"] = Refused("b")
    threads = [
        asyncio.create_task(asyncio.to_thread(asyncio.run, bench.batcher.submit(operation)))
        for operation in "abc"
    ]
    bench.writes.open()
    assert await outcomes(threads) == [None, bench.writes.outcomes["b"], None]
    assert sorted(bench.writes.written) == ["a", "b", "c"]


async def test_callers_on_other_loops_join_the_batch() -> None:
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


async def test_a_caller_on_another_loop_cancelled_while_it_waits_is_not_written() -> None:
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


async def test_a_caller_whose_loop_is_gone_costs_the_others_nothing() -> None:
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
    """A loop that exists and does not run."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Callers on other loops wait no longer than the write may take."""
    monkeypatch.setattr("pg_layer._send.batcher.GRACE", 0.0)


async def make_bench(timeout: float) -> Bench:
    return Bench(timeout=timeout)


async def test_a_lane_whose_loop_was_closed_says_so_at_once(
    still_loop: asyncio.AbstractEventLoop,
) -> None:
    bench = await asyncio.to_thread(still_loop.run_until_complete, make_bench(timeout=60))
    still_loop.close()
    with pytest.raises(NotBegun):
        await asyncio.wait_for(bench.batcher.submit("a"), 10)


async def test_a_lane_whose_loop_has_stopped_says_so_after_its_timeout(
    still_loop: asyncio.AbstractEventLoop,
) -> None:
    bench = await asyncio.to_thread(still_loop.run_until_complete, make_bench(timeout=0.02))
    with pytest.raises(LayerUnavailable) as caught:
        await asyncio.wait_for(bench.batcher.submit("a"), 10)
    assert type(caught.value) is LayerUnavailable
    # Its caller was told that it failed: it must not be written when the loop runs again.
    bench.writes.open()
    await asyncio.to_thread(still_loop.run_until_complete, turns())
    assert bench.writes.written == []


async def test_a_lane_whose_loop_stops_in_a_write_says_that_the_outcome_is_unknown(
    still_loop: asyncio.AbstractEventLoop,
) -> None:
    """What is written may be committed, also if nobody is there to hear of it."""
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


# --- Guests: callers on other loops that may write themselves


async def on(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
    """Let a loop that stands still run for as long as this takes."""
    return await asyncio.to_thread(loop.run_until_complete, asyncio.wait_for(work, 10))


@pytest.fixture
def other_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """One more loop that does not run."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def loop_of(task: asyncio.Task[Any] | None) -> asyncio.AbstractEventLoop:
    assert task is not None
    return task.get_loop()


async def test_a_guest_writes_in_its_own_task_while_the_lanes_loop_stands_still(
    still_loop: asyncio.AbstractEventLoop,
) -> None:
    bench = await on(still_loop, make_bench(timeout=60))
    for operation in "ab":
        task = bench.submit(operation, may_write=True)
        await turns()
        assert bench.writes.by[-1] is task
        bench.writes.end()
        assert await outcomes([task]) == [None]
    assert bench.writes.batches == [["a"], ["b"]]
    assert bench.writes.timeouts == [60, 60]
    assert bench.tasks == []


async def test_a_guest_that_may_not_write_is_written_on_the_lanes_loop(
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


async def test_what_comes_while_a_guest_writes_goes_together_next_on_the_lanes_loop(
    still_loop: asyncio.AbstractEventLoop, other_loop: asyncio.AbstractEventLoop
) -> None:
    bench = await on(still_loop, make_bench(timeout=60))
    guests = [bench.submit("a", may_write=True)]
    await turns()
    others = await on(other_loop, bench.submit_all("b", may_write=True))
    await on(still_loop, turns())
    mine = await on(still_loop, bench.submit_all("cd"))
    guests.append(bench.submit("e", may_write=True))
    await turns()
    await on(still_loop, turns())
    assert bench.writes.batches == [["a"]]
    bench.writes.end()
    assert await outcomes(guests[:1]) == [None]
    # The others' turn has come, though nothing happens before their loop runs: nobody goes ahead of them.
    guests.append(bench.submit("f", may_write=True))
    await turns()
    assert bench.writes.batches == [["a"]]
    bench.writes.open()
    assert await on(still_loop, outcomes(mine)) == [None, None]
    assert await outcomes(guests) == [None] * 3
    assert await on(other_loop, outcomes(others)) == [None]
    assert bench.writes.batches == [["a"], ["b", "c", "d", "e", "f"]]
    assert loop_of(bench.writes.by[1]) is still_loop


@pytest.mark.parametrize("may_write", [False, True])
async def test_a_guest_waits_while_the_lanes_own_loop_writes(
    still_loop: asyncio.AbstractEventLoop, may_write: bool
) -> None:
    bench = await on(still_loop, make_bench(timeout=60))
    mine = await on(still_loop, bench.submit_all("ab"))
    guest = bench.submit("c", may_write=may_write)
    await turns()
    assert bench.writes.batches == [["a"]]

    async def end() -> None:
        bench.writes.end()
        await turns()

    await on(still_loop, end())
    assert bench.writes.batches == [["a"], ["b", "c"]]
    await on(still_loop, end())
    assert await on(still_loop, outcomes(mine)) + await outcomes([guest]) == [None] * 3
    # All is done, and the batcher is free for guests again.
    later = bench.submit("d", may_write=True)
    await turns()
    assert bench.writes.by[-1] is later
    bench.writes.end()
    assert await outcomes([later]) == [None]


async def test_a_guest_that_cannot_write_is_written_on_the_lanes_loop(
    still_loop: asyncio.AbstractEventLoop,
) -> None:
    bench = await on(still_loop, make_bench(timeout=60))
    bench.writes.outcomes["a"] = Refused("a")
    for number, waiting in enumerate(["", "bc"], 1):
        guest = bench.submit("a", may_write=True)
        await turns()
        mine = await on(still_loop, bench.submit_all(waiting))
        bench.writes.end(NotBegun())
        await turns()
        assert not guest.done()
        await on(still_loop, turns())
        # Who waited comes first.
        assert bench.writes.batches[-1] == [*waiting, "a"]
        assert loop_of(bench.writes.by[-1]) is still_loop

        async def end() -> None:
            bench.writes.end()
            await turns()

        await on(still_loop, end())
        assert await outcomes([guest]) == [bench.writes.outcomes["a"]]
        assert await on(still_loop, outcomes(mine)) == [None] * len(waiting)
        assert len(bench.writes.batches) == 2 * number


@pytest.mark.parametrize(
    ("second", "expected"),
    [(None, None), (LayerUnavailable("away"), OutcomeUnknown), ("closed", OutcomeUnknown)],
    ids=["written", "away", "closed"],
)
async def test_a_guest_whose_first_attempt_may_have_taken_effect_is_not_told_that_nothing_has(
    still_loop: asyncio.AbstractEventLoop,
    second: LayerUnavailable | str | None,
    expected: type | None,
) -> None:
    bench = await on(still_loop, make_bench(timeout=60))
    guest = bench.submit("a", may_write=True)
    await turns()
    bench.writes.end(NotBegun(may_have_begun=True))
    await turns()
    if second == "closed":
        bench.batcher.close()
        await on(still_loop, turns())
    else:
        await on(still_loop, turns())

        async def end() -> None:
            bench.writes.end(second if isinstance(second, Exception) else None)
            await turns()

        await on(still_loop, end())
    (result,) = await outcomes([guest])
    assert result is None if expected is None else type(result) is expected


@pytest.mark.parametrize("waiting", ["", "bc"])
async def test_a_guest_cancelled_in_its_write_takes_nobody_along(
    still_loop: asyncio.AbstractEventLoop, waiting: str
) -> None:
    bench = await on(still_loop, make_bench(timeout=60))
    guest = bench.submit("a", may_write=True)
    await turns()
    mine = await on(still_loop, bench.submit_all(waiting))
    guest.cancel()
    await asyncio.wait([guest])
    assert guest.cancelled()
    later = bench.submit("d", may_write=True)
    await turns()
    if waiting:
        bench.writes.open()
        assert await on(still_loop, outcomes(mine)) == [None] * len(waiting)
        assert await outcomes([later]) == [None]
        assert bench.writes.batches == [["a"], [*waiting, "d"]]
    else:
        assert bench.writes.by[-1] is later
        bench.writes.end()
        assert await outcomes([later]) == [None]


@pytest.mark.parametrize("is_raised", [False, True])
async def test_a_guest_and_nobody_else_gets_its_outcome(
    still_loop: asyncio.AbstractEventLoop, is_raised: bool
) -> None:
    bench = await on(still_loop, make_bench(timeout=60))
    refused = Refused("a")
    if not is_raised:
        bench.writes.outcomes["a"] = refused
    guests = [bench.submit("a", may_write=True)]
    await turns()
    mine = await on(still_loop, bench.submit_all("b"))
    guests.append(bench.submit("c", may_write=True))
    await turns()
    bench.writes.end(refused if is_raised else None)
    assert await outcomes(guests[:1]) == [refused]
    bench.writes.open()
    assert await on(still_loop, outcomes(mine)) == [None]
    assert await outcomes(guests) == [refused, None]
    assert bench.writes.written == ["a", "b", "c"]


@pytest.mark.parametrize("is_cancelled", [False, True])
async def test_finishing_waits_for_a_guests_write(
    still_loop: asyncio.AbstractEventLoop, is_cancelled: bool
) -> None:
    bench = await on(still_loop, make_bench(timeout=60))
    guest = bench.submit("a", may_write=True)
    await turns()

    async def begin_to_finish() -> tuple[list[Task], Task]:
        waiting = await bench.submit_all("b")
        finished = asyncio.create_task(bench.batcher.finish())
        await turns()
        assert not finished.done()
        return waiting, finished

    waiting, finished = await on(still_loop, begin_to_finish())
    assert type((await on(still_loop, outcomes(waiting)))[0]) is NotBegun
    if is_cancelled:
        guest.cancel()
    else:
        bench.writes.end()
    (result,) = await outcomes([guest])
    assert isinstance(result, asyncio.CancelledError) if is_cancelled else result is None
    assert await on(still_loop, outcomes([finished])) == [None]
    assert bench.writes.batches == [["a"]]


@pytest.mark.parametrize("may_write", [False, True])
async def test_a_closed_lane_takes_nothing_of_a_guest(
    still_loop: asyncio.AbstractEventLoop, may_write: bool
) -> None:
    bench = await on(still_loop, make_bench(timeout=60))
    bench.batcher.close()
    guest = bench.submit("a", may_write=may_write)
    await turns()
    await on(still_loop, turns())
    assert type((await outcomes([guest]))[0]) is NotBegun
    assert bench.writes.batches == []


async def test_who_waits_for_a_guest_that_is_held_up_is_told_so_after_the_timeout(
    still_loop: asyncio.AbstractEventLoop,
) -> None:
    bench = await on(still_loop, make_bench(timeout=0.02))
    guest = bench.submit("a", may_write=True)
    await turns()
    mine = await on(still_loop, bench.submit_all("bc"))
    # The guest's write does not end, as a loop's does not that somebody holds up.
    results = await on(still_loop, outcomes(mine))
    assert [type(result) for result in results] == [LayerUnavailable, LayerUnavailable]
    bench.writes.end()
    assert await outcomes([guest]) == [None]
    later = bench.submit("d", may_write=True)
    await turns()
    assert bench.writes.by[-1] is later
    bench.writes.end()
    assert await outcomes([later]) == [None]
    assert bench.writes.written == ["a", "d"]


async def test_a_guest_whose_write_the_lanes_loop_does_not_outlive(
    still_loop: asyncio.AbstractEventLoop,
) -> None:
    bench = await on(still_loop, make_bench(timeout=60))
    guest = bench.submit("a", may_write=True)
    await turns()
    bench.batcher.close()
    still_loop.close()
    bench.writes.end()
    assert await outcomes([guest]) == [None]
    assert type((await outcomes([bench.submit("b", may_write=True)]))[0]) is NotBegun


async def test_guests_of_many_threads_and_the_lanes_own_callers() -> None:
    """Whoever writes: never two at a time, each operation once, in its caller's order, and nobody hangs."""
    callers, rounds = 4, 25
    guard = threading.Lock()
    written: list[tuple[str, int, int]] = []
    names = ["first", "second", "third", "modest", "here"]
    every = [
        (name, number, turn)
        for name in names
        for number in range(callers)
        for turn in range(rounds)
    ]
    refused = {operation: Refused(operation) for operation in every if operation[2] % 5 == 4}
    here = asyncio.get_running_loop()

    async def write(operations: list[tuple[str, int, int]], _: float) -> Sequence[Outcome]:
        assert guard.acquire(blocking=False), "two at a time"
        try:
            for _ in range(len(written) % 3):
                await asyncio.sleep(0)
            if asyncio.get_running_loop() is not here and operations[0][2] % 4 == 3:
                raise NotBegun
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
            (outcome,) = await asyncio.gather(
                batcher.submit(operation, may_write=name != "modest"), return_exceptions=True
            )
            assert outcome is refused.get(operation)
            if (number + turn) % 3 == 0:  # others, too, are to find the batcher idle
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
