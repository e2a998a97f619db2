"""A `receive()` that is cancelled at any moment takes no message, whatever comes in meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections import Counter

import pytest

from pg_layer import PostgresChannelLayer
from tests.conftest import MakeLayer
from tests.processes import PATIENCE, Link, Process, Processes, listen, open_layer, receive

ROOMY: dict[str, object] = {"capacity": 100_000}


async def writer(
    link: Link, /, dsn: str, channels: list[str], count: int, seed: int, **options: object
) -> None:
    """Send numbers to each channel and to the room, now one by one, now many at once, small and large."""
    chance = random.Random(seed)
    async with open_layer(dsn, **options) as layer:
        await listen(layer)
        link.say("ready")
        await link.hear()
        number = 0
        while number < count:
            burst = range(number, min(number + chance.choice((1, 1, 2, 7)), count))
            for channel in channels:
                await asyncio.gather(*(layer.send(channel, _message(n, chance)) for n in burst))
            await asyncio.gather(*(layer.group_send("room", _message(n, chance)) for n in burst))
            number = burst.stop
            await asyncio.sleep(chance.choice((0, 0, 0.001, 0.003)))


def _message(number: int, chance: random.Random) -> dict[str, object]:
    return {"number": number, "blob": bytes(chance.choice((10, 10, 10, 7000)))}


async def interrupted(
    receiving: asyncio.Task[dict[str, object]], steps: int | None, wait: float
) -> None:
    """Cancel after so many steps of the loop, or after so many seconds."""
    if steps is None:
        await asyncio.wait((receiving,), timeout=wait)
    else:
        for _ in range(steps):
            await asyncio.sleep(0)
    receiving.cancel()
    await asyncio.wait((receiving,), timeout=PATIENCE)


async def fickle(
    layer: PostgresChannelLayer, channel: str, count: int, chance: random.Random
) -> tuple[list[object], int]:
    """All numbers that came, and how many calls were cancelled."""
    found: list[object] = []
    cancelled = 0
    while len(found) < count:
        receiving = asyncio.create_task(layer.receive(channel))
        kind = chance.random()
        if kind < 0.6:
            await interrupted(receiving, chance.randrange(12), 0)
        elif kind < 0.9:
            await interrupted(receiving, None, chance.random() * 0.004)
        else:
            await asyncio.wait((receiving,), timeout=1)
            await interrupted(receiving, 0, 0)
        assert receiving.done(), "a cancelled receive() does not end"
        if receiving.cancelled():
            cancelled += 1
        else:
            found.append(receiving.result()["number"])
    return found, cancelled


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("capacity", [100_000, 40], ids=["roomy", "pressed"])
async def test_cancellations_at_random_moments_under_traffic(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, seed: int, capacity: int
) -> None:
    # Where little room is left, receive() waits for the deletion of what it took: one more place to be hit.
    count = 120
    # A member that is full misses what is new: that is not what this is about.
    layer = make_layer(capacity=capacity, channel_capacity={"roomy.*": 100_000})
    channels = [await layer.new_channel() for _ in range(2)]
    member = await layer.new_channel("roomy")
    await layer.group_add("room", member)
    await listen(layer)
    sender = processes.start(writer, migrated_dsn, [*channels, "jobs"], count, seed, **ROOMY)
    assert await sender.hear() == "ready"
    sender.say("go")
    results = await asyncio.wait_for(
        asyncio.gather(
            *(
                fickle(layer, channel, count, random.Random(f"{seed} {place}"))
                for place, channel in enumerate([*channels, member, "jobs"])
            )
        ),
        PATIENCE,
    )
    await sender.result()
    for found, cancelled in results[:2]:
        assert found == list(range(count))
        assert cancelled > 20
    found, _ = results[2]
    assert found == list(range(count))
    found, _ = results[3]
    assert found == list(range(count))
    # And nothing comes a second time.
    for channel in (*channels, member, "jobs"):
        await make_layer().send(channel, {"number": "end"})
        assert (await receive(layer, channel))["number"] == "end"


@pytest.mark.parametrize("capacity", [100_000, 40], ids=["roomy", "pressed"])
@pytest.mark.parametrize("kind", ["specific", "member", "normal"])
async def test_a_cancellation_at_each_step(make_layer: MakeLayer, kind: str, capacity: int) -> None:
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
            # Received while it is on its way, and when it is there.
            sending.add(task := asyncio.create_task(send))
            if number:
                await task
            receiving = asyncio.create_task(layer.receive(channel))
            await interrupted(receiving, steps, 0)
            assert receiving.done()
            if not receiving.cancelled():
                found.append(receiving.result()["number"])
        await asyncio.gather(*sending)
        while len(found) < 3:
            found.append((await receive(layer, channel))["number"])
        assert found == [0, 1, 2], f"cancelled after {steps} steps"


async def test_the_next_receiver_is_woken_when_the_first_is_cancelled(
    make_layer: MakeLayer,
) -> None:
    # A message comes, its receiver is woken, and cancelled in the same step: another waits.
    layer, sender = make_layer(**ROOMY), make_layer(**ROOMY)
    channels = [await layer.new_channel(), "jobs"]
    await listen(layer)
    chance = random.Random(3)
    for number in range(60):
        for channel in channels:
            first, *others = (asyncio.create_task(layer.receive(channel)) for _ in range(3))
            await asyncio.sleep(0)
            sending = asyncio.create_task(sender.send(channel, {"number": number}))
            await interrupted(first, None, chance.random() * 0.006)
            await sending
            if first.cancelled():
                await asyncio.wait(others, timeout=PATIENCE, return_when=asyncio.FIRST_COMPLETED)
            [got] = [task for task in (first, *others) if task.done() and not task.cancelled()]
            assert got.result() == {"number": number}
            for task in others:
                task.cancel()
            await asyncio.wait(others)


async def wavering(link: Link, dsn: str, seed: int) -> None:
    """A worker that says each job, and cancels most of its calls, with several at once."""
    chance = random.Random(seed)
    async with open_layer(dsn, **ROOMY) as layer:
        is_over = asyncio.Event()

        async def work() -> None:
            while not is_over.is_set():
                receiving = asyncio.create_task(layer.receive("jobs"))
                steps = chance.randrange(30) if chance.random() < 0.5 else None
                await interrupted(receiving, steps, chance.random() * 0.02)
                if not receiving.cancelled():
                    link.say(receiving.result()["number"])

        await listen(layer)
        link.say("ready")
        working = [asyncio.create_task(work()) for _ in range(3)]
        await link.hear()
        is_over.set()
        await asyncio.gather(*working)
        link.say(None)


async def test_competing_workers_that_cancel_lose_and_double_nothing(
    migrated_dsn: str, processes: Processes
) -> None:
    count = 400
    workers = [processes.start(wavering, migrated_dsn, seed) for seed in (1, 2)]
    for worker in workers:
        assert await worker.hear() == "ready"
    sender = processes.start(writer, migrated_dsn, ["jobs"], count, 5, **ROOMY)
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
    await asyncio.wait_for(is_complete.wait(), PATIENCE)
    await sender.result()
    for worker in workers:
        worker.say("end")
    await asyncio.gather(*hearing)
    assert Counter(found) == Counter(range(count))


async def test_a_cancelled_receive_on_another_loop(make_layer: MakeLayer) -> None:
    # This loop is the owner loop of the layer; the receiver runs in a thread of its own.
    layer, sender = make_layer(capacity=40), make_layer(**ROOMY)
    channel = await layer.new_channel()
    await listen(layer)
    count = 100

    async def send() -> None:
        for number in range(count):
            await sender.send(channel, {"number": number})

    sending = asyncio.create_task(send())
    elsewhere = asyncio.to_thread(
        lambda: asyncio.run(fickle(layer, channel, count, random.Random(7)))
    )
    found, _ = await asyncio.wait_for(elsewhere, PATIENCE)
    await sending
    assert found == list(range(count))
