"""A ``receive()`` that is cancelled at any moment takes no message."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from pg_layer import PostgresChannelLayer
from tests.conftest import MakeLayer
from tests.processes import TIMEOUT, Link, Process, Processes, listen, open_layer, receive

LARGE_CAPACITY: dict[str, object] = {"capacity": 100_000}


async def send_numbers(
    link: Link, /, dsn: str, channels: list[str], count: int, seed: int, **options: object
) -> None:
    """Send numbers to each channel and to the room. Runs in a process.

    The calls run one by one or several at once. Messages are small and large.
    """
    rng = random.Random(seed)
    async with open_layer(dsn, **options) as layer:
        await listen(layer)
        link.say("ready")
        await link.hear()
        number = 0
        while number < count:
            burst = range(number, min(number + rng.choice((1, 1, 2, 7)), count))
            for channel in channels:
                await asyncio.gather(*(layer.send(channel, _numbered(n, rng)) for n in burst))
            await asyncio.gather(*(layer.group_send("room", _numbered(n, rng)) for n in burst))
            number = burst.stop
            await asyncio.sleep(rng.choice((0, 0, 0.001, 0.003)))


def _numbered(number: int, rng: random.Random) -> dict[str, object]:
    return {"number": number, "blob": bytes(rng.choice((10, 10, 10, 7000)))}


async def cancel_after(
    receiving: asyncio.Task[dict[str, object]], steps: int | None, wait: float
) -> None:
    """Cancel the task after ``steps`` steps of the loop, or after ``wait`` seconds."""
    if steps is None:
        await asyncio.wait((receiving,), timeout=wait)
    else:
        for _ in range(steps):
            await asyncio.sleep(0)
    receiving.cancel()
    await asyncio.wait((receiving,), timeout=TIMEOUT)


async def receive_with_cancellations(
    layer: PostgresChannelLayer, channel: str, count: int, rng: random.Random
) -> tuple[list[object], int]:
    """Return the numbers that were received, and how many calls were cancelled."""
    found: list[object] = []
    cancelled = 0
    while len(found) < count:
        receiving = asyncio.create_task(layer.receive(channel))
        kind = rng.random()
        if kind < 0.6:
            await cancel_after(receiving, rng.randrange(12), 0)
        elif kind < 0.9:
            await cancel_after(receiving, None, rng.random() * 0.004)
        else:
            await asyncio.wait((receiving,), timeout=1)
            await cancel_after(receiving, 0, 0)
        assert receiving.done(), "a cancelled receive() does not end"
        if receiving.cancelled():
            cancelled += 1
        else:
            found.append(receiving.result()["number"])
    return found, cancelled


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("capacity", [100_000, 40], ids=["roomy", "pressed"])
async def test_receive_cancelled_at_random_moments_under_traffic_loses_nothing(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, seed: int, capacity: int
) -> None:
    # If the capacity is small, receive() waits for the deletion of its message. A cancellation may
    # hit this wait too.
    count = 120
    # The member has a large capacity, because a full member misses group messages.
    layer = make_layer(capacity=capacity, channel_capacity={"roomy.*": 100_000})
    channels = [await layer.new_channel() for _ in range(2)]
    member = await layer.new_channel("roomy")
    await layer.group_add("room", member)
    await listen(layer)
    sender = processes.start(
        send_numbers, migrated_dsn, [*channels, "jobs"], count, seed, **LARGE_CAPACITY
    )
    assert await sender.hear() == "ready"
    sender.say("go")
    results = await asyncio.wait_for(
        asyncio.gather(
            *(
                receive_with_cancellations(layer, channel, count, random.Random(f"{seed} {place}"))
                for place, channel in enumerate([*channels, member, "jobs"])
            )
        ),
        TIMEOUT,
    )
    await sender.result()
    for found, cancelled in results[:2]:
        assert found == list(range(count))
        assert cancelled > 20
    found, _ = results[2]
    assert found == list(range(count))
    found, _ = results[3]
    assert found == list(range(count))
    # No message arrives a second time.
    for channel in (*channels, member, "jobs"):
        await make_layer(**LARGE_CAPACITY).send(channel, {"number": "end"})
        assert (await receive(layer, channel))["number"] == "end"


@pytest.mark.parametrize("capacity", [100_000, 40], ids=["roomy", "pressed"])
@pytest.mark.parametrize("kind", ["specific", "member", "normal"])
async def test_receive_cancelled_after_each_number_of_steps_loses_nothing(
    make_layer: MakeLayer, kind: str, capacity: int
) -> None:
    layer, sender = make_layer(capacity=capacity), make_layer(capacity=100_000)
    channel = "jobs" if kind == "normal" else await layer.new_channel()
    if kind == "member":
        await layer.group_add("room", channel)
    await listen(layer)
    await listen(sender)
    for steps in range(40):
        found: list[object] = []
        sending: set[asyncio.Task[None]] = set()
        for number in range(3):
            message = {"number": number, "blob": bytes((10, 7000)[steps % 2])}
            send = (
                sender.group_send("room", message)
                if kind == "member"
                else sender.send(channel, message)
            )
            # Receive the first message while it is in flight, and the others after they arrived.
            sending.add(task := asyncio.create_task(send))
            if number:
                await task
            receiving = asyncio.create_task(layer.receive(channel))
            await cancel_after(receiving, steps, 0)
            assert receiving.done()
            if not receiving.cancelled():
                found.append(receiving.result()["number"])
        await asyncio.gather(*sending)
        while len(found) < 3:
            found.append((await receive(layer, channel))["number"])
        assert found == [0, 1, 2], f"cancelled after {steps} steps"


async def test_receive_cancelled_when_woken_wakes_the_next_receiver(
    make_layer: MakeLayer,
) -> None:
    """A message arrives, and its receiver is woken and cancelled in the same step.

    Another receiver waits, and must get the message.
    """
    layer, sender = make_layer(**LARGE_CAPACITY), make_layer(**LARGE_CAPACITY)
    channels = [await layer.new_channel(), "jobs"]
    await listen(layer)
    rng = random.Random(3)
    for number in range(60):
        for channel in channels:
            first, *others = (asyncio.create_task(layer.receive(channel)) for _ in range(3))
            await asyncio.sleep(0)
            sending = asyncio.create_task(sender.send(channel, {"number": number}))
            await cancel_after(first, None, rng.random() * 0.006)
            await sending
            if first.cancelled():
                await asyncio.wait(others, timeout=TIMEOUT, return_when=asyncio.FIRST_COMPLETED)
            [got] = [task for task in (first, *others) if task.done() and not task.cancelled()]
            assert got.result() == {"number": number}
            for task in others:
                task.cancel()
            await asyncio.wait(others)


async def work_with_cancellations(link: Link, dsn: str, seed: int) -> None:
    """Report each job of several concurrent calls, most of them cancelled. Runs in a process."""
    rng = random.Random(seed)
    async with open_layer(dsn, **LARGE_CAPACITY) as layer:
        is_over = asyncio.Event()

        async def work() -> None:
            while not is_over.is_set():
                receiving = asyncio.create_task(layer.receive("jobs"))
                steps = rng.randrange(30) if rng.random() < 0.5 else None
                await cancel_after(receiving, steps, rng.random() * 0.02)
                if not receiving.cancelled():
                    link.say(receiving.result()["number"])

        await listen(layer)
        link.say("ready")
        working = [asyncio.create_task(work()) for _ in range(3)]
        await link.hear()
        is_over.set()
        await asyncio.gather(*working)
        link.say(None)


async def test_competing_workers_cancelling_receives_lose_and_double_nothing(
    migrated_dsn: str, processes: Processes
) -> None:
    count = 400
    workers = [processes.start(work_with_cancellations, migrated_dsn, seed) for seed in (1, 2)]
    for worker in workers:
        assert await worker.hear() == "ready"
    sender = processes.start(send_numbers, migrated_dsn, ["jobs"], count, 5, **LARGE_CAPACITY)
    assert await sender.hear() == "ready"
    sender.say("go")
    found: list[int] = []
    is_complete = asyncio.Event()

    async def hear(worker: Process[None]) -> None:
        while isinstance(number := await worker.hear(), int):
            found.append(number)
            if len(found) >= count:
                is_complete.set()

    hearing = [asyncio.create_task(hear(worker)) for worker in workers]
    await asyncio.wait_for(is_complete.wait(), TIMEOUT)
    await sender.result()
    for worker in workers:
        worker.say("end")
    await asyncio.gather(*hearing)
    assert Counter(found) == Counter(range(count))


async def test_receive_cancelled_on_a_foreign_loop_loses_nothing(make_layer: MakeLayer) -> None:
    """This loop is the owner loop of the layer. The receiver runs in another thread."""
    layer, sender = make_layer(capacity=40), make_layer(**LARGE_CAPACITY)
    channel = await layer.new_channel()
    await listen(layer)
    count = 100

    async def send() -> None:
        for number in range(count):
            await sender.send(channel, {"number": number})

    sending = asyncio.create_task(send())
    elsewhere = asyncio.to_thread(
        lambda: asyncio.run(receive_with_cancellations(layer, channel, count, random.Random(7)))
    )
    found, _ = await asyncio.wait_for(elsewhere, TIMEOUT)
    await sending
    assert found == list(range(count))
