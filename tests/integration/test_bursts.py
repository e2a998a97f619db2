"""Bursts of more messages than the capacity: a member that reads receives all of them."""

from __future__ import annotations

import asyncio
import threading
import tracemalloc
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from channels.utils import await_many_dispatch

from pg_layer import PostgresChannelLayer
from tests.conftest import MakeLayer
from tests.processes import TIMEOUT, Link, Process, Processes, listen, open_layer, receive

CAPACITY = 100  # the default
COUNT = 1000
LAST = -1  # the number of the message that ends a burst
BURSTS = ["group_send_many", "gathered group_send"]

Receive = Callable[[PostgresChannelLayer, str], Awaitable[list[int]]]


async def send_all(layer: PostgresChannelLayer, how: str, size: int = 0) -> None:
    """Send ten times the capacity to the group at once."""
    messages = [{"type": "number", "number": n, "blob": bytes(size)} for n in range(COUNT)]
    if how == "group_send_many":
        await layer.group_send_many(("room", message) for message in messages)
    else:
        await asyncio.gather(*(layer.group_send("room", message) for message in messages))


async def burst(link: Link, dsn: str, size: int) -> None:
    """Send bursts for the test until it sends None."""
    async with open_layer(dsn) as layer:
        link.say("ready")
        while (order := await link.hear()) is not None:
            how, last_to = order
            await send_all(layer, how, size)
            for channel in last_to:
                await layer.send(channel, {"type": "number", "number": LAST})
            link.say("sent")


async def start_burst(processes: Processes, dsn: str, size: int = 0) -> Process[None]:
    process = processes.start(burst, dsn, size)
    assert await process.hear() == "ready"
    return process


async def member(layer: PostgresChannelLayer) -> str:
    """Return a new channel in the group."""
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    return channel


async def read_directly(
    layer: PostgresChannelLayer, channel: str, seconds: float = 0.0
) -> list[int]:
    """Receive messages one by one up to the last. Return their numbers.

    ``seconds``: how long the reader is busy with each.
    """
    numbers: list[int] = []
    while (number := (await receive(layer, channel))["number"]) != LAST:
        numbers.append(number)
        if seconds:
            await asyncio.sleep(seconds)
    return numbers


async def read_as_a_consumer(layer: PostgresChannelLayer, channel: str) -> list[int]:
    """Receive as the loop that runs Channels' consumers does."""
    numbers: list[int] = []
    is_over = asyncio.Event()

    async def dispatch(message: dict[str, Any]) -> None:
        await asyncio.sleep(0)  # as a handler that awaits
        if message["number"] == LAST:
            is_over.set()
        else:
            numbers.append(message["number"])

    receive_next: Any = partial(layer.receive, channel)
    reading = asyncio.create_task(await_many_dispatch([receive_next], dispatch))
    try:
        await asyncio.wait_for(is_over.wait(), TIMEOUT)
    finally:
        reading.cancel()
        await asyncio.wait([reading])
    return numbers


async def send_burst(sender: Process[None], how: str, last_to: Iterable[str]) -> None:
    """Make the other process send a burst, and then the last message to each channel."""
    sender.say((how, list(last_to)))
    assert await sender.hear() == "sent"


@contextmanager
def other_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """Run an event loop in a thread of its own."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


# ---------------------------------------------------------------------- members that read


@pytest.mark.parametrize("how", BURSTS)
@pytest.mark.parametrize("members", [1, 20])
@pytest.mark.parametrize("read", [read_directly, read_as_a_consumer])
async def test_group_burst_members_that_read_receive_all(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    how: str,
    members: int,
    read: Receive,
) -> None:
    """Another process sends ten times the capacity at once. Members that read receive all of it."""
    layer = make_layer()
    await listen(layer)
    channels = [await member(layer) for _ in range(members)]
    sender = await start_burst(processes, migrated_dsn)
    reading = asyncio.gather(*(read(layer, channel) for channel in channels))
    await send_burst(sender, how, channels)
    numbers = await reading
    assert [len(one) for one in numbers] == [COUNT] * members
    assert numbers == [list(range(COUNT))] * members


@pytest.mark.parametrize("how", BURSTS)
async def test_group_burst_of_the_same_process_reaches_its_member(
    make_layer: MakeLayer, how: str
) -> None:
    """The sending process has the member that reads."""
    layer = make_layer()
    await listen(layer)
    channel = await member(layer)
    reading = asyncio.create_task(read_directly(layer, channel))
    await send_all(layer, how)
    await layer.send(channel, {"number": LAST})
    assert await reading == list(range(COUNT))


@pytest.mark.parametrize("how", BURSTS)
async def test_group_burst_member_on_another_loop_receives_all(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, how: str
) -> None:
    """One member reads on the loop that listens, another on the loop of another thread."""
    layer = make_layer()
    await listen(layer)
    here, there = await member(layer), await member(layer)
    sender = await start_burst(processes, migrated_dsn)
    with other_loop() as loop:
        reading = asyncio.create_task(read_directly(layer, here))
        reading_there = asyncio.run_coroutine_threadsafe(read_directly(layer, there), loop)
        await send_burst(sender, how, [here, there])
        assert await reading == list(range(COUNT))
        assert await asyncio.wrap_future(reading_there) == list(range(COUNT))


async def test_group_burst_only_member_on_another_loop_receives_all(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    """The only member reads on the loop of another thread, while the first loop only listens."""
    layer = make_layer()
    await listen(layer)
    channel = await member(layer)
    sender = await start_burst(processes, migrated_dsn)
    with other_loop() as loop:
        reading = asyncio.run_coroutine_threadsafe(read_as_a_consumer(layer, channel), loop)
        await send_burst(sender, "group_send_many", [channel])
        assert await asyncio.wrap_future(reading) == list(range(COUNT))


async def test_group_burst_member_that_reads_half_in_time_receives_all(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    """It takes less than half of its capacity in 0.1 s, and more than half in 0.5 s."""
    layer = make_layer()
    await listen(layer)
    channel = await member(layer)
    sender = await start_burst(processes, migrated_dsn)
    reading = asyncio.create_task(read_directly(layer, channel, seconds=0.003))
    await send_burst(sender, "group_send_many", [channel])
    assert await reading == list(range(COUNT))


# ---------------------------------------------------------------------- a member that does not read


@pytest.mark.parametrize("how", BURSTS)
async def test_group_burst_member_that_never_reads_costs_others_no_message(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, how: str
) -> None:
    """Of two bursts, the idle member keeps as many messages as its capacity. Others miss none."""
    layer = make_layer()
    await listen(layer)
    idle, *channels = [await member(layer) for _ in range(4)]
    sender = await start_burst(processes, migrated_dsn)
    for _ in range(2):
        reading = asyncio.gather(*(read_directly(layer, channel) for channel in channels))
        await send_burst(sender, how, channels)
        assert await reading == [list(range(COUNT))] * 3
    await layer.send(idle, {"number": LAST})
    assert await read_directly(layer, idle) == list(range(CAPACITY))


async def test_group_burst_member_that_hangs_costs_others_only_its_own_turn(
    make_layer: MakeLayer,
) -> None:
    """All channels are full at once.

    If each member lengthened the turn of the member that hangs, the others would wait far too long
    for the rest of the burst.
    """
    capacity, count, neighbours = 10, 15, 1500
    layer, sender = make_layer(capacity=capacity), make_layer()
    await listen(layer)
    idle, *channels = [await layer.new_channel() for _ in range(1 + neighbours)]
    await asyncio.gather(*(layer.group_add("room", channel) for channel in (idle, *channels)))

    async def read(channel: str) -> list[int]:
        return [(await receive(layer, channel))["number"] for _ in range(count)]

    await sender.send(idle, {"number": -1})
    assert (await receive(layer, idle))["number"] == -1  # it has received everything so far
    reading = asyncio.gather(*map(read, channels))
    await sender.group_send_many(("room", {"number": number}) for number in range(count))
    assert await reading == [list(range(count))] * neighbours
    assert [(await receive(layer, idle))["number"] for _ in range(capacity)] == list(
        range(capacity)
    )


async def hold(link: Link, dsn: str) -> tuple[int, int, int]:
    """Send to two members, of which only one reads.

    Returns how many messages the first received, how many bytes the process then holds more
    than before, and how many messages the other has.
    """
    async with open_layer(dsn) as layer:
        await listen(layer)
        idle, busy = await member(layer), await member(layer)
        tracemalloc.start()
        link.say(busy)
        received = len(await read_directly(layer, busy))
        grown, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        await layer.send(idle, {"number": LAST})
        return received, grown, len(await read_directly(layer, idle))


async def test_group_burst_member_that_never_reads_keeps_only_its_capacity(
    migrated_dsn: str, processes: Processes
) -> None:
    """One member does not read 20 MB. The process keeps only its capacity in memory."""
    size = 20_000
    reader = processes.start(hold, migrated_dsn)
    channel = await reader.hear()
    sender = await start_burst(processes, migrated_dsn, size)
    await send_burst(sender, "group_send_many", [channel])
    received, grown, held = await reader.result()
    assert (received, held) == (COUNT, CAPACITY)
    assert grown < 4 * CAPACITY * size
