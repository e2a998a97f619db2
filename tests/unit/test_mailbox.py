"""Mailboxes: bounds and order, who is woken, and that no cancellation, thread or dead loop costs a letter."""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pg_layer.inbox import Key
from pg_layer.mailbox import Letter, Mailbox

CAPACITY = 3


def letter(id: int, *, expires_at: float = math.inf, key: Key | None = None) -> Letter:
    return Letter(id, str(id).encode(), expires_at, key)


def filled(*ids: int) -> Mailbox:
    mailbox = Mailbox("channel", CAPACITY)
    for id in ids:
        mailbox.put(letter(id))
    return mailbox


def ids(letters: Iterable[Letter]) -> list[int]:
    return [each.id for each in letters]


async def receive(mailbox: Mailbox) -> int:
    """As the layer does it: look, and wait if there is nothing."""
    waiter = None
    while (found := mailbox.pop(waiter=waiter)) is None:
        waiter = await mailbox.wait()
    return found.id


async def begin(work: Coroutine[Any, Any, int]) -> asyncio.Task[int]:
    """Start a task and let it come to where it waits."""
    task = asyncio.create_task(work)
    await asyncio.sleep(0)
    return task


@pytest.fixture
def other_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """A loop that nobody runs, with what it takes to wait on it."""
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def wait_on(loop: asyncio.AbstractEventLoop, mailbox: Mailbox) -> Coroutine[Any, Any, object]:
    """Begin to wait on a loop that stops at once. Close the coroutine when done."""
    waiting = mailbox.wait()

    async def first_step() -> None:
        waiting.send(None)

    loop.run_until_complete(first_step())
    return waiting


# --- The queue


def test_letters_come_out_in_the_order_they_went_in() -> None:
    mailbox = filled(1, 2, 3)
    assert len(mailbox) == 3
    assert [mailbox.pop(), mailbox.pop()] == [letter(1), letter(2)]
    mailbox.put(letter(4))
    assert ids(mailbox.pop_all()) == [3, 4]
    assert mailbox.pop() is None
    assert len(mailbox) == 0


def test_a_letter_that_is_pushed_back_is_the_oldest_again() -> None:
    mailbox = filled(1, 2, 3)
    first = mailbox.pop()
    assert first is not None
    mailbox.push_front(first)
    assert ids(mailbox.pop_all()) == [1, 2, 3]


def test_what_is_popped_is_doomed_in_the_same_step() -> None:
    mailbox = Mailbox("channel", CAPACITY)
    mailbox.put(letter(1, key=(1, 10)))
    mailbox.put(letter(2))
    doomed: dict[Key, Mailbox | None] = {}
    assert [mailbox.pop(doomed), mailbox.pop(doomed)] == [letter(1, key=(1, 10)), letter(2)]
    assert mailbox.pop(doomed) is None
    assert doomed == {(1, 10): mailbox}


def test_a_full_mailbox_refuses_the_newest() -> None:
    mailbox = filled()
    assert ids(mailbox.put_if_room([letter(id) for id in range(5)])) == [3, 4]
    mailbox.pop()
    assert not mailbox.put_if_room([letter(5)])
    assert ids(mailbox.put_if_room([letter(6)])) == [6]
    assert ids(mailbox.pop_all()) == [1, 2, 5]


def test_what_senders_were_counted_for_is_put_whatever_waits() -> None:
    mailbox = filled(1, 2, 3, 4)
    assert len(mailbox) == 4
    assert ids(mailbox.put_if_room([letter(5)])) == [5]


@pytest.mark.parametrize(("undeleted", "is_pressed"), [(0, False), (16, False), (17, True), (100, True)])
def test_it_is_pressed_from_about_a_quarter_of_its_capacity_on(undeleted: int, is_pressed: bool) -> None:
    mailbox = Mailbox("channel", 100)
    mailbox.undeleted = undeleted
    assert mailbox.is_pressed is is_pressed


@pytest.mark.parametrize(("undeleted", "is_filling"), [(0, False), (1, False), (2, True), (16, True)])
def test_it_is_filling_from_an_eighth_of_its_capacity_on(undeleted: int, is_filling: bool) -> None:
    mailbox = Mailbox("channel", 16)
    mailbox.undeleted = undeleted
    assert mailbox.is_filling is is_filling


def test_expired_letters_are_taken_out_and_the_others_stay_in_order() -> None:
    mailbox = filled()
    for id, expires_at in enumerate([10.0, 30.0, 20.0, 20.1, 5.0]):
        mailbox.put(letter(id, expires_at=expires_at))
    assert ids(mailbox.pop_expired(20.0)) == [0, 2, 4]
    assert mailbox.pop_expired(20.0) == []
    assert ids(mailbox.pop_all()) == [1, 3]


def test_letters_up_to_an_id_are_taken_out() -> None:
    mailbox = filled(1, 5, 3, 6)
    assert ids(mailbox.pop_up_to(5)) == [1, 5, 3]
    assert ids(mailbox.pop_all()) == [6]


async def test_idle_letters_are_those_that_nobody_waits_for() -> None:
    mailbox = filled()
    receiver = await begin(receive(mailbox))
    mailbox.put(letter(1))
    mailbox.put(letter(2))
    other = await begin(receive(mailbox))
    assert await receiver == 1
    assert await other == 2
    waiting = await begin(receive(mailbox))
    assert mailbox.pop_idle() == []
    mailbox.put(letter(3))
    assert await waiting == 3
    mailbox.put(letter(4))
    mailbox.put(letter(5))
    assert ids(mailbox.pop_idle()) == [4, 5]
    assert len(mailbox) == 0


async def test_what_somebody_waits_for_is_not_idle() -> None:
    mailbox = filled()
    first, second = await begin(receive(mailbox)), await begin(receive(mailbox))
    mailbox.put(letter(1))  # wakes the first; the second still waits
    assert mailbox.pop_idle() == []
    assert await first == 1
    second.cancel()
    await asyncio.wait([second])
    mailbox.put(letter(2))
    assert ids(mailbox.pop_idle()) == [2]


# --- Waiting


async def test_waiting_ends_at_once_if_there_is_a_letter() -> None:
    mailbox = filled(1)
    calls: list[int] = []
    await mailbox.wait(on_wait=lambda: calls.append(mailbox.waiting))
    assert calls == []
    assert mailbox.waiting == 0


async def test_waiting_ends_after_its_timeout() -> None:
    mailbox = filled()
    waiter = await asyncio.wait_for(mailbox.wait(timeout=0.001), 10)
    assert mailbox.pop(waiter=waiter) is None
    assert mailbox.waiting == 0
    mailbox.put(letter(1))
    assert await receive(mailbox) == 1


async def test_whoever_waits_is_counted_and_says_so_once() -> None:
    mailbox = filled()
    counts: list[int] = []
    tasks = [
        asyncio.create_task(mailbox.wait(on_wait=lambda: counts.append(mailbox.waiting))) for _ in range(3)
    ]
    await asyncio.sleep(0)
    assert counts == [1, 2, 3]
    assert mailbox.waiting == 3
    mailbox.close()
    await asyncio.gather(*tasks)
    assert counts == [1, 2, 3]
    assert mailbox.waiting == 0


async def test_a_letter_that_comes_while_the_waiter_says_so_wakes_it() -> None:
    mailbox = filled()
    await asyncio.wait_for(mailbox.wait(on_wait=lambda: mailbox.put(letter(1))), 10)
    assert mailbox.waiting == 0


async def test_a_waiter_that_cannot_say_so_does_not_wait() -> None:
    mailbox = filled()

    def refuse() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await mailbox.wait(on_wait=refuse)
    assert mailbox.waiting == 0
    mailbox.put(letter(1))
    assert await receive(mailbox) == 1


async def test_each_letter_wakes_one_waiter_in_turn() -> None:
    mailbox = filled()
    order: list[str] = []

    async def named(name: str) -> int:
        id = await receive(mailbox)
        order.append(name)
        return id

    first, second, third = [await begin(named(name)) for name in "abc"]
    mailbox.put(letter(1))
    await asyncio.wait([first])
    assert mailbox.waiting == 2
    assert not mailbox.put_if_room([letter(2)])
    mailbox.push_front(letter(3))
    assert [*await asyncio.gather(first, second, third)] == [1, 3, 2]
    assert order == ["a", "b", "c"]


async def test_missing_is_what_receivers_could_have_at_once() -> None:
    mailbox = filled()
    assert mailbox.missing == 0
    first, second = await begin(receive(mailbox)), await begin(receive(mailbox))
    assert mailbox.missing == 2
    mailbox.put(letter(1))  # the first is told to look, and has not yet
    assert (mailbox.waiting, mailbox.missing) == (1, 1)
    assert await first == 1
    assert (mailbox.waiting, mailbox.missing) == (1, 1)
    mailbox.put(letter(2))
    mailbox.put(letter(3))
    assert (mailbox.waiting, mailbox.missing) == (0, -1)
    assert await second == 2
    assert mailbox.missing == -1
    mailbox.pop_all()
    assert mailbox.missing == 0


async def test_who_was_woken_is_missing_a_letter_until_he_has_taken_it() -> None:
    """Else nobody would fetch one for who waits behind him: the letter that lies here is not for that one."""
    mailbox = filled()
    first = asyncio.create_task(mailbox.wait())
    second = await begin(receive(mailbox))
    mailbox.put(letter(1))
    waiter = await first
    assert mailbox.missing == 1
    assert mailbox.pop(waiter=waiter) is not None
    assert mailbox.missing == 1
    mailbox.put(letter(2))
    assert await second == 2
    assert mailbox.missing == 0


# --- Closing


async def test_closing_drops_what_waits_and_has_everybody_look() -> None:
    mailbox = filled()
    waiters = [asyncio.create_task(mailbox.wait()) for _ in range(3)]
    await asyncio.sleep(0)
    mailbox.close()
    for waiter in await asyncio.wait_for(asyncio.gather(*waiters), 5):
        assert mailbox.pop(waiter=waiter) is None
    assert mailbox.is_closed
    assert (mailbox.waiting, mailbox.missing) == (0, 0)
    full = filled(1, 2)
    full.close()
    assert full.pop() is None


def test_nothing_comes_into_a_closed_mailbox() -> None:
    mailbox = filled()
    mailbox.close()
    mailbox.put(letter(1))
    assert not mailbox.put_if_room([letter(2)])  # nothing is said to be full
    assert len(mailbox) == 0


async def test_nobody_waits_on_a_closed_mailbox() -> None:
    mailbox = filled()
    mailbox.close()
    await asyncio.wait_for(mailbox.wait(), 5)
    assert mailbox.waiting == 0


# --- Cancellation


async def test_a_cancelled_waiter_takes_nothing() -> None:
    mailbox = filled()
    cancelled, other = await begin(receive(mailbox)), await begin(receive(mailbox))
    cancelled.cancel()
    await asyncio.wait([cancelled])
    assert mailbox.waiting == 1
    mailbox.put(letter(1))
    assert await asyncio.wait_for(other, 10) == 1


@pytest.mark.parametrize("order", ["cancelled, then put", "put, then cancelled"])
async def test_a_waiter_cancelled_in_the_moment_of_its_letter_leaves_it_to_the_next(order: str) -> None:
    mailbox = filled()
    cancelled, other = await begin(receive(mailbox)), await begin(receive(mailbox))
    steps: list[Callable[[], object]] = [cancelled.cancel, lambda: mailbox.put(letter(1))]
    for step in steps if order == "cancelled, then put" else reversed(steps):
        step()
    assert await asyncio.wait_for(other, 10) == 1
    assert cancelled.cancelled()
    assert mailbox.waiting == 0


async def test_a_letter_whose_only_waiter_was_cancelled_stays() -> None:
    mailbox = filled()
    cancelled = await begin(receive(mailbox))
    mailbox.put(letter(1))
    cancelled.cancel()
    await asyncio.wait([cancelled])
    assert cancelled.cancelled()
    assert await receive(mailbox) == 1


async def test_a_waiter_of_another_loop_cancelled_in_the_moment_of_its_letter_leaves_it_to_the_next() -> None:
    mailbox = filled()

    def elsewhere() -> int:
        async def main() -> int:
            cancelled, other = await begin(receive(mailbox)), await begin(receive(mailbox))
            # Put from another thread, so that the wake is on its way when the waiter is cancelled.
            thread = threading.Thread(target=mailbox.put, args=(letter(1),))
            thread.start()
            thread.join()
            cancelled.cancel()
            try:
                return await asyncio.wait_for(other, 10)
            finally:
                assert cancelled.cancelled()

        return asyncio.run(main())

    assert await asyncio.to_thread(elsewhere) == 1
    assert mailbox.waiting == 0


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["receive", "receive", "put", "put", "put_if_room", "cancel", "give back", "go on"]),
        st.integers(0, 7),
    ),
    max_size=40,
)


@settings(max_examples=150, deadline=None)
@given(ACTIONS)
def test_no_order_of_receiving_putting_and_cancelling_loses_or_doubles_a_letter(
    actions: list[tuple[str, int]],
) -> None:
    async def main() -> None:
        mailbox = filled()
        tasks: list[asyncio.Task[int]] = []
        put: list[int] = []
        for action, argument in actions:
            if action == "receive":
                tasks.append(asyncio.create_task(receive(mailbox)))
            elif action == "put":
                put.append(len(put))
                mailbox.put(letter(put[-1]))
            elif action == "put_if_room":
                some = [letter(len(put) + i) for i in range(argument % 4)]
                left = mailbox.put_if_room(some)
                put += ids(some)[: len(some) - len(left)]
            elif action == "cancel" and tasks:
                tasks[argument % len(tasks)].cancel()
            elif action == "give back":
                if (found := mailbox.pop()) is not None:
                    mailbox.push_front(found)
            elif action == "go on":
                for _ in range(argument % 3):
                    await asyncio.sleep(0)
        for _ in range(5):
            await asyncio.sleep(0)
        pending = [task for task in tasks if not task.done()]
        # Nobody waits beside a letter, and whoever waits is counted.
        assert not (pending and len(mailbox))
        assert mailbox.waiting == len(pending)
        assert mailbox.missing == len(pending) - len(mailbox)
        received = [task.result() for task in tasks if task.done() and not task.cancelled()]
        assert sorted(received + ids(mailbox.pop_all())) == put
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        assert (mailbox.waiting, mailbox.missing) == (0, 0)

    asyncio.run(main())


# --- Other loops and threads


def test_receivers_on_several_loops_share_the_letters() -> None:
    mailbox = Mailbox("channel", 10_000)
    count, receivers = 400, 6
    received: list[list[int]] = [[] for _ in range(receivers)]
    begun = threading.Barrier(4)

    async def collect(into: list[int]) -> None:
        while (id := await receive(mailbox)) >= 0:
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
        mailbox.put(letter(id))
    for _ in range(receivers):
        mailbox.put(letter(-1))
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert sorted(id for mine in received for id in mine) == list(range(count))
    assert all(mine == sorted(mine) for mine in received)


def test_a_waiter_of_a_running_loop_is_woken_from_a_thread_without_one() -> None:
    mailbox = filled()
    waiting = threading.Event()

    async def main() -> int:
        while (found := mailbox.pop()) is None:
            await mailbox.wait(on_wait=waiting.set)
        return found.id

    result: list[int] = []
    thread = threading.Thread(target=lambda: result.append(asyncio.run(main())))
    thread.start()
    assert waiting.wait(10)
    mailbox.put(letter(1))
    thread.join(10)
    assert result == [1]


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "stopped"])
async def test_a_waiter_whose_loop_is_gone_does_not_keep_letters_from_others(
    other_loop: asyncio.AbstractEventLoop, is_closed: bool
) -> None:
    mailbox = filled()
    gone = await asyncio.to_thread(wait_on, other_loop, mailbox)
    assert mailbox.waiting == 1
    receiver = await begin(receive(mailbox))
    if is_closed:
        other_loop.close()
    mailbox.put(letter(1))
    try:
        assert await asyncio.wait_for(receiver, 5) == 1
    finally:
        gone.close()
    assert mailbox.waiting == 0


@pytest.mark.parametrize("is_closed", [True, False], ids=["closed", "stopped"])
def test_a_waiter_whose_loop_is_gone_is_given_nothing(
    other_loop: asyncio.AbstractEventLoop, is_closed: bool
) -> None:
    mailbox = filled()
    gone = wait_on(other_loop, mailbox)
    if is_closed:
        other_loop.close()
    mailbox.put(letter(1))
    assert mailbox.pop() is not None
    assert mailbox.missing == 0
    gone.close()
    assert (mailbox.waiting, mailbox.missing) == (0, 0)


def test_a_waiter_whose_loop_stopped_looks_when_it_runs_again(other_loop: asyncio.AbstractEventLoop) -> None:
    mailbox = filled()
    task = other_loop.create_task(receive(mailbox))
    other_loop.run_until_complete(asyncio.sleep(0))
    assert mailbox.waiting == 1
    mailbox.put(letter(1))
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


def test_a_receiver_in_another_thread_does_not_meet_the_cleaning() -> None:
    mailbox = filled()
    got: list[Letter | None] = []
    expiry = Meanwhile(5.0)
    expiry.threads = []
    expiry.do = lambda: got.append(mailbox.pop())
    mailbox.put(letter(1))
    mailbox.put(letter(2, expires_at=expiry))
    mailbox.put(letter(3))
    mailbox.put(letter(4, expires_at=0.0))
    expired = mailbox.pop_expired(1.0)
    for thread in expiry.threads:
        thread.join(10)
    assert got
    received = [found.id for found in got if found is not None]
    assert ids(expired) == [4]
    assert received + ids(mailbox.pop_all()) == [1, 2, 3]


def test_forgetting_a_waiter_that_was_closed_leaves_nothing(other_loop: asyncio.AbstractEventLoop) -> None:
    mailbox = filled()
    waiting = wait_on(other_loop, mailbox)
    assert mailbox.waiting == 1
    waiting.close()
    assert mailbox.waiting == 0


async def test_a_retired_mailbox_takes_no_receiver() -> None:
    mailbox = filled()
    assert not mailbox.retire()  # it was new
    assert mailbox.retire()
    assert await mailbox.wait() is None
    assert mailbox.waiting == 0


async def test_a_mailbox_in_use_does_not_retire() -> None:
    mailbox = filled()
    mailbox.is_used = False
    receiver = await begin(receive(mailbox))
    assert not mailbox.retire()
    mailbox.put(letter(1))
    assert not mailbox.retire()
    assert await receiver == 1
