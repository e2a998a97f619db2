"""Channel queues: bounds, order, which receiver is woken. No cancellation, thread or loop costs a message."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pg_layer._messages.rows import Key
from pg_layer._state.channel_queue import ChannelQueue, QueuedMessage

CAPACITY = 3


def queued(id: int, *, expires_at: float = math.inf, key: Key | None = None) -> QueuedMessage:
    return QueuedMessage(str(id).encode(), expires_at, key)


def filled(*ids: int) -> ChannelQueue:
    queue = ChannelQueue("channel", CAPACITY)
    for id in ids:
        queue.put(queued(id))
    return queue


def ids(messages: Iterable[QueuedMessage]) -> list[int]:
    return [number(each) for each in messages]


def number(message: QueuedMessage) -> int:
    assert isinstance(message.payload, bytes)
    return int(message.payload)


async def receive(queue: ChannelQueue) -> int:
    """As the layer does it: look, and wait if there is nothing."""
    waiter = None
    while (found := queue.pop(waiter=waiter)) is None:
        waiter = await queue.wait()
    return number(found)


async def begin(work: Coroutine[Any, Any, int]) -> asyncio.Task[int]:
    """Start a task and let it come to where it waits."""
    task = asyncio.create_task(work)
    await asyncio.sleep(0)
    return task


@pytest.fixture
def other_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that does not run."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def wait_on(loop: asyncio.AbstractEventLoop, queue: ChannelQueue) -> Coroutine[Any, Any, object]:
    """Begin to wait on a loop that stops at once. Close the coroutine when done."""
    waiting = queue.wait()

    async def first_step() -> None:
        waiting.send(None)

    loop.run_until_complete(first_step())
    return waiting


# --- The queue


def test_channel_queue_messages_put_come_out_in_order() -> None:
    queue = filled(1, 2, 3)
    assert len(queue) == 3
    assert [queue.pop(), queue.pop()] == [queued(1), queued(2)]
    queue.put(queued(4))
    assert ids(queue.pop_all()) == [3, 4]
    assert queue.pop() is None
    assert len(queue) == 0


def test_push_front_popped_message_is_the_oldest_again() -> None:
    queue = filled(1, 2, 3)
    first = queue.pop()
    assert first is not None
    queue.push_front(first)
    assert ids(queue.pop_all()) == [1, 2, 3]


def test_pop_message_with_key_notes_its_row_for_deletion() -> None:
    queue = ChannelQueue("channel", CAPACITY)
    queue.put(queued(1, key=Key(1, 10, 1)))
    queue.put(queued(2))
    deletes: dict[Key, ChannelQueue | None] = {}
    assert [queue.pop(deletes), queue.pop(deletes)] == [queued(1, key=Key(1, 10, 1)), queued(2)]
    assert queue.pop(deletes) is None
    assert deletes == {Key(1, 10, 1): queue}


def test_put_if_room_full_queue_returns_the_newest() -> None:
    queue = filled()
    assert ids(queue.put_fitting([queued(id) for id in range(5)])) == [3, 4]
    queue.pop()
    assert not queue.put_fitting([queued(5)])
    assert ids(queue.put_fitting([queued(6)])) == [6]
    assert ids(queue.pop_all()) == [1, 2, 5]


def test_put_full_queue_appends_what_the_sender_counted() -> None:
    queue = filled(1, 2, 3, 4)
    assert len(queue) == 4
    assert ids(queue.put_fitting([queued(5)])) == [5]


@pytest.mark.parametrize(
    ("undeleted", "is_pressed"), [(0, False), (16, False), (17, True), (100, True)]
)
def test_is_pressed_quarter_of_capacity_undeleted_is_true(undeleted: int, is_pressed: bool) -> None:
    queue = ChannelQueue("channel", 100)
    queue.undeleted = undeleted
    assert queue.is_pressed is is_pressed


@pytest.mark.parametrize(
    ("undeleted", "is_filling"), [(0, False), (1, False), (2, True), (16, True)]
)
def test_is_filling_eighth_of_capacity_undeleted_is_true(undeleted: int, is_filling: bool) -> None:
    queue = ChannelQueue("channel", 16)
    queue.undeleted = undeleted
    assert queue.is_filling is is_filling


def test_pop_expired_some_expired_keeps_the_others_in_order() -> None:
    queue = filled()
    for id, expires_at in enumerate([10.0, 30.0, 20.0, 20.1, 5.0]):
        queue.put(queued(id, expires_at=expires_at))
    assert ids(queue.pop_expired(20.0)) == [0, 2, 4]
    assert queue.pop_expired(20.0) == []
    assert ids(queue.pop_all()) == [1, 3]


async def test_pop_idle_nobody_waits_empties_the_queue() -> None:
    queue = filled()
    receiver = await begin(receive(queue))
    queue.put(queued(1))
    queue.put(queued(2))
    other = await begin(receive(queue))
    assert await receiver == 1
    assert await other == 2
    waiting = await begin(receive(queue))
    assert queue.pop_idle() == []
    queue.put(queued(3))
    assert await waiting == 3
    queue.put(queued(4))
    queue.put(queued(5))
    assert ids(queue.pop_idle()) == [4, 5]
    assert len(queue) == 0


async def test_pop_idle_receiver_waits_returns_nothing() -> None:
    queue = filled()
    first, second = await begin(receive(queue)), await begin(receive(queue))
    queue.put(queued(1))  # wakes the first; the second still waits
    assert queue.pop_idle() == []
    assert await first == 1
    second.cancel()
    await asyncio.wait([second])
    queue.put(queued(2))
    assert ids(queue.pop_idle()) == [2]


# --- Waiting


async def test_wait_message_here_returns_at_once() -> None:
    queue = filled(1)
    calls: list[int] = []
    await queue.wait(on_wait=lambda: calls.append(queue.waiting))
    assert calls == []
    assert queue.waiting == 0


async def test_wait_timeout_returns_without_a_message() -> None:
    queue = filled()
    waiter = await asyncio.wait_for(queue.wait(timeout=0.001), 10)
    assert queue.pop(waiter=waiter) is None
    assert queue.waiting == 0
    queue.put(queued(1))
    assert await receive(queue) == 1


async def test_wait_several_receivers_counts_each_once() -> None:
    queue = filled()
    counts: list[int] = []
    tasks = [
        asyncio.create_task(queue.wait(on_wait=lambda: counts.append(queue.waiting)))
        for _ in range(3)
    ]
    await asyncio.sleep(0)
    assert counts == [1, 2, 3]
    assert queue.waiting == 3
    queue.close()
    await asyncio.gather(*tasks)
    assert counts == [1, 2, 3]
    assert queue.waiting == 0


async def test_wait_message_put_by_on_wait_returns() -> None:
    queue = filled()
    await asyncio.wait_for(queue.wait(on_wait=lambda: queue.put(queued(1))), 10)
    assert queue.waiting == 0


async def test_wait_on_wait_raises_leaves_no_waiter() -> None:
    queue = filled()

    def refuse() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await queue.wait(on_wait=refuse)
    assert queue.waiting == 0
    queue.put(queued(1))
    assert await receive(queue) == 1


async def test_put_several_receivers_wakes_one_in_turn() -> None:
    queue = filled()
    order: list[str] = []

    async def named(name: str) -> int:
        id = await receive(queue)
        order.append(name)
        return id

    first, second, third = [await begin(named(name)) for name in "abc"]
    queue.put(queued(1))
    await asyncio.wait([first])
    assert queue.waiting == 2
    assert not queue.put_fitting([queued(2)])
    queue.push_front(queued(3))
    assert [*await asyncio.gather(first, second, third)] == [1, 3, 2]
    assert order == ["a", "b", "c"]


async def test_missing_receivers_wait_counts_what_they_could_have() -> None:
    queue = filled()
    assert queue.demand == 0
    first, second = await begin(receive(queue)), await begin(receive(queue))
    assert queue.demand == 2
    queue.put(queued(1))  # the first is told to look, and has not yet
    assert (queue.waiting, queue.demand) == (1, 1)
    assert await first == 1
    assert (queue.waiting, queue.demand) == (1, 1)
    queue.put(queued(2))
    queue.put(queued(3))
    assert (queue.waiting, queue.demand) == (0, -1)
    assert await second == 2
    assert queue.demand == -1
    queue.pop_all()
    assert queue.demand == 0


async def test_missing_woken_receiver_counts_until_it_pops() -> None:
    """Otherwise no job would be claimed for the next receiver: the message that is here is for the first."""
    queue = filled()
    first = asyncio.create_task(queue.wait())
    second = await begin(receive(queue))
    queue.put(queued(1))
    waiter = await first
    assert queue.demand == 1
    assert queue.pop(waiter=waiter) is not None
    assert queue.demand == 1
    queue.put(queued(2))
    assert await second == 2
    assert queue.demand == 0


# --- Closing


async def test_close_receivers_wait_drops_messages_and_wakes_all() -> None:
    queue = filled()
    waiters = [asyncio.create_task(queue.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    queue.close()
    for waiter in await asyncio.wait_for(asyncio.gather(*waiters), 5):
        assert queue.pop(waiter=waiter) is None
    assert queue.is_closed
    assert (queue.waiting, queue.demand) == (0, 0)
    full = filled(1, 2)
    full.close()
    assert full.pop() is None


def test_put_closed_queue_drops_the_message() -> None:
    queue = filled()
    queue.close()
    queue.put(queued(1))
    assert not queue.put_fitting([queued(2)])  # nothing is said to be full
    assert len(queue) == 0


async def test_wait_closed_queue_returns_at_once() -> None:
    queue = filled()
    queue.close()
    await asyncio.wait_for(queue.wait(), 5)
    assert queue.waiting == 0


# --- Cancellation


async def test_wait_cancelled_takes_no_message() -> None:
    queue = filled()
    cancelled, other = await begin(receive(queue)), await begin(receive(queue))
    cancelled.cancel()
    await asyncio.wait([cancelled])
    assert queue.waiting == 1
    queue.put(queued(1))
    assert await asyncio.wait_for(other, 10) == 1


@pytest.mark.parametrize("order", ["cancelled, then put", "put, then cancelled"])
async def test_wait_cancelled_at_the_put_leaves_the_message_to_the_next(order: str) -> None:
    queue = filled()
    cancelled, other = await begin(receive(queue)), await begin(receive(queue))
    steps: list[Callable[[], object]] = [cancelled.cancel, lambda: queue.put(queued(1))]
    for step in steps if order == "cancelled, then put" else reversed(steps):
        step()
    assert await asyncio.wait_for(other, 10) == 1
    assert cancelled.cancelled()
    assert queue.waiting == 0


async def test_wait_only_receiver_cancelled_keeps_the_message() -> None:
    queue = filled()
    cancelled = await begin(receive(queue))
    queue.put(queued(1))
    cancelled.cancel()
    await asyncio.wait([cancelled])
    assert cancelled.cancelled()
    assert await receive(queue) == 1


async def test_wait_on_another_loop_cancelled_at_the_put_leaves_the_message_to_the_next() -> None:
    queue = filled()

    def elsewhere() -> int:
        async def main() -> int:
            cancelled, other = await begin(receive(queue)), await begin(receive(queue))
            # Put from another thread, so that the wake is on its way when the waiter is cancelled.
            thread = threading.Thread(target=queue.put, args=(queued(1),))
            thread.start()
            thread.join()
            cancelled.cancel()
            try:
                return await asyncio.wait_for(other, 10)
            finally:
                assert cancelled.cancelled()

        return asyncio.run(main())

    assert await asyncio.to_thread(elsewhere) == 1
    assert queue.waiting == 0


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(
            ["receive", "receive", "put", "put", "put_fitting", "cancel", "give back", "go on"]
        ),
        st.integers(0, 7),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(ACTIONS)
def test_channel_queue_any_order_of_steps_loses_and_doubles_nothing(
    actions: list[tuple[str, int]],
) -> None:
    async def main() -> None:
        queue = filled()
        tasks: list[asyncio.Task[int]] = []
        put: list[int] = []
        for action, argument in actions:
            if action == "receive":
                tasks.append(asyncio.create_task(receive(queue)))
            elif action == "put":
                put.append(len(put))
                queue.put(queued(put[-1]))
            elif action == "put_fitting":
                some = [queued(len(put) + i) for i in range(argument % 4)]
                left = queue.put_fitting(some)
                put += ids(some)[: len(some) - len(left)]
            elif action == "cancel" and tasks:
                tasks[argument % len(tasks)].cancel()
            elif action == "give back":
                if (found := queue.pop()) is not None:
                    queue.push_front(found)
            elif action == "go on":
                for _ in range(argument % 3):
                    await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)
        pending = [task for task in tasks if not task.done()]
        # No receiver waits beside a message, and each that waits is counted.
        assert not (pending and len(queue))
        assert queue.waiting == len(pending)
        assert queue.demand == len(pending) - len(queue)
        received = [task.result() for task in tasks if task.done() and not task.cancelled()]
        assert sorted(received + ids(queue.pop_all())) == put
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        assert (queue.waiting, queue.demand) == (0, 0)

    asyncio.run(main())


# --- Other loops and threads


def test_wait_receivers_on_several_loops_share_the_messages() -> None:
    queue = ChannelQueue("channel", 10_000)
    count, receivers = 400, 6
    received: list[list[int]] = [[] for _ in range(receivers)]
    begun = threading.Barrier(4)

    async def collect(into: list[int]) -> None:
        while (id := await receive(queue)) >= 0:
            into.append(id)

    async def main(mine: list[list[int]]) -> None:
        work = [asyncio.create_task(collect(into)) for into in mine]
        begun.wait()
        await asyncio.gather(*work)

    threads = [
        threading.Thread(target=lambda mine: asyncio.run(main(mine)), args=(received[i : i + 2],))
        for i in range(0, receivers, 2)
    ]
    for thread in threads:
        thread.start()
    begun.wait()
    for id in range(count):
        queue.put(queued(id))
    for _ in range(receivers):
        queue.put(queued(-1))
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert sorted(id for mine in received for id in mine) == list(range(count))
    assert all(mine == sorted(mine) for mine in received)


def test_put_thread_without_a_loop_wakes_the_receiver() -> None:
    queue = filled()
    waiting = threading.Event()

    async def main() -> int:
        while (found := queue.pop()) is None:
            await queue.wait(on_wait=waiting.set)
        return number(found)

    result: list[int] = []
    thread = threading.Thread(target=lambda: result.append(asyncio.run(main())))
    thread.start()
    assert waiting.wait(10)
    queue.put(queued(1))
    thread.join(10)
    assert result == [1]


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "stopped"])
async def test_put_loop_of_a_receiver_is_gone_wakes_the_next(
    other_loop: asyncio.AbstractEventLoop, is_closed: bool
) -> None:
    queue = filled()
    gone = await asyncio.to_thread(wait_on, other_loop, queue)
    assert queue.waiting == 1
    receiver = await begin(receive(queue))
    if is_closed:
        other_loop.close()
    queue.put(queued(1))
    try:
        assert await asyncio.wait_for(receiver, 5) == 1
    finally:
        gone.close()
    assert queue.waiting == 0


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "stopped"])
def test_put_loop_of_the_only_receiver_is_gone_keeps_the_message(
    other_loop: asyncio.AbstractEventLoop, is_closed: bool
) -> None:
    queue = filled()
    gone = wait_on(other_loop, queue)
    if is_closed:
        other_loop.close()
    queue.put(queued(1))
    assert queue.pop() is not None
    assert queue.demand == 0
    gone.close()
    assert (queue.waiting, queue.demand) == (0, 0)


def test_put_loop_of_the_receiver_stopped_is_received_when_it_runs_again(
    other_loop: asyncio.AbstractEventLoop,
) -> None:
    queue = filled()
    task = other_loop.create_task(receive(queue))
    other_loop.run_until_complete(asyncio.sleep(0))
    assert queue.waiting == 1
    queue.put(queued(1))
    assert other_loop.run_until_complete(asyncio.wait_for(task, 10)) == 1


class Meanwhile(float):
    """An expiry; comparing it lets another thread do something first, or at least begin to."""

    do: Callable[[], object] = staticmethod(lambda: None)

    def _meanwhile(self) -> None:
        thread = threading.Thread(target=self.do)
        thread.start()
        thread.join(0.05)  # it may have to wait until this one is done
        self.threads.append(thread)

    threads: list[threading.Thread]

    def __le__(self, other: float) -> bool:
        self._meanwhile()
        return float(self) <= other

    def __gt__(self, other: float) -> bool:
        self._meanwhile()
        return float(self) > other


def test_pop_expired_receiver_in_another_thread_loses_and_doubles_nothing() -> None:
    queue = filled()
    got: list[QueuedMessage | None] = []
    expiry = Meanwhile(5.0)
    expiry.threads = []
    expiry.do = lambda: got.append(queue.pop())
    queue.put(queued(1))
    queue.put(queued(2, expires_at=expiry))
    queue.put(queued(3))
    queue.put(queued(4, expires_at=0.0))
    expired = queue.pop_expired(1.0)
    for thread in expiry.threads:
        thread.join(10)
    assert got
    received = [number(found) for found in got if found is not None]
    assert ids(expired) == [4]
    assert received + ids(queue.pop_all()) == [1, 2, 3]


def test_wait_closed_coroutine_leaves_no_waiter(other_loop: asyncio.AbstractEventLoop) -> None:
    queue = filled()
    waiting = wait_on(other_loop, queue)
    assert queue.waiting == 1
    waiting.close()
    assert queue.waiting == 0


async def test_retire_unused_queue_takes_no_receiver() -> None:
    queue = filled()
    assert not queue.retire()  # it was new
    assert queue.retire()
    assert await queue.wait() is None
    assert queue.waiting == 0


async def test_retire_used_queue_stays() -> None:
    queue = filled()
    queue.is_used = False
    receiver = await begin(receive(queue))
    assert not queue.retire()
    queue.put(queued(1))
    assert not queue.retire()
    assert await receiver == 1
