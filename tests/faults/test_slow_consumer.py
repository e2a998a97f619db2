"""A consumer that no longer receives: what waits for it is bounded, and its neighbours do not notice."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import pytest

from pg_layer import ChannelFull
from tests.conftest import MakeLayer, Observer
from tests.processes import Link, Processes, listen, open_layer, receive, until

CAPACITY = 20
EXPIRY = 1.5


class Served(NamedTuple):
    """What the process has found: of the two that read, and of the one that stopped."""

    first: list[int]
    second: list[int]
    longest: int  # that the queue of the stuck channel was
    dropped: int  # group messages that it missed
    late: list[int]  # what it received when it was read again


async def serve(link: Link, dsn: str, task_hangs: bool) -> Served:
    """Three members of the room, one of which stops receiving after the first message.

    Says their channels, and reads the stuck one again when the test says so, up to the number it says.
    """
    options: dict[str, object] = {
        "capacity": CAPACITY,
        "heartbeat": 0.2,
        "lease": 60,
        "expiry": EXPIRY,
    }
    async with open_layer(dsn, **options) as layer:
        channels = [await layer.new_channel() for _ in range(3)]
        for channel in channels:
            await layer.group_add("room", channel)
        await listen(layer)
        longest = 0

        async def numbers(channel: str) -> list[int]:
            nonlocal longest
            found = []
            while (number := (await receive(layer, channel))["number"]) is not None:
                found.append(number)
                queue = layer._loops.client.find_queue(channels[2])
                longest = max(longest, len(queue) if queue is not None else 0)
            return found

        never = asyncio.Event()

        async def stuck() -> None:
            await receive(layer, channels[2])
            await never.wait()

        reading = [asyncio.create_task(numbers(channel)) for channel in channels[:2]]
        hanging = asyncio.create_task(stuck())
        link.say(channels)
        assert await link.hear() == "read again"
        if not task_hangs:
            hanging.cancel()
        dropped = layer.stats()["dropped_full"]
        late = [(await receive(layer, channels[2]))["number"]]
        link.say("reading")
        while late[-1] is not None:
            late.append((await receive(layer, channels[2]))["number"])
        first, second = await asyncio.gather(*reading)
        hanging.cancel()
        await asyncio.wait((hanging,))
        return Served(first, second, longest, dropped, late[:-1])


@pytest.mark.parametrize("task_hangs", [True, False], ids=["hangs", "was cancelled"])
async def test_a_consumer_that_stops_receiving_costs_its_neighbours_nothing(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    observer: Observer,
    task_hangs: bool,
) -> None:
    """It is full, and misses what is sent; the others receive all, in order and without delay.

    When it is read again, it receives what has not expired, and all that follows.
    """
    layer = make_layer(capacity=CAPACITY, expiry=EXPIRY)
    process = processes.start(serve, migrated_dsn, task_hangs)
    good, other, stuck = await process.hear()
    sent, refused, most = 0, 0, 0

    def rows(channel: str) -> int:
        row = observer.execute(
            "SELECT count(*) FROM pg_layer_message WHERE channel = %s AND expires_at > clock_timestamp()",
            (channel,),
        ).fetchone()
        assert row is not None
        return int(row[0])

    async def one() -> None:
        nonlocal sent, refused
        await layer.group_send("room", {"number": sent})
        sent += 1
        for channel in (good, other):
            await layer.send(channel, {"number": sent})
        sent += 1
        try:
            await layer.send(stuck, {"number": -1})
        except ChannelFull:
            refused += 1
        # At the neighbours' pace: these have little room as well.
        await until(lambda: rows(good) + rows(other) <= CAPACITY // 4)

    deadline = asyncio.get_running_loop().time() + 3 * EXPIRY
    while asyncio.get_running_loop().time() < deadline:
        await one()
        most = max(most, rows(stuck))
    assert refused > 0
    assert CAPACITY - 1 <= most <= CAPACITY
    # All that had waited there is over.
    await until(lambda: rows(stuck) == 0)
    await layer.group_send("room", {"number": sent})
    sent += 1
    process.say("read again")
    assert await process.hear() == "reading"
    back = sent
    for _ in range(CAPACITY // 2):
        await layer.group_send("room", {"number": sent})
        sent += 1
    for channel in (good, other, stuck):
        await layer.send(channel, {"number": None})
    served = await process.result()
    assert served.first == served.second == list(range(sent))
    # As many of its own as it may hold, and as many of its groups.
    assert CAPACITY <= served.longest <= 2 * CAPACITY
    assert served.dropped > 0
    assert served.late[-1 - CAPACITY // 2 :] == list(range(back - 1, sent))
    assert [number for number in served.late if number >= 0] == sorted(set(served.late) - {-1})


async def test_a_worker_that_stops_receiving_leaves_its_jobs_to_others(
    make_layer: MakeLayer, observer: Observer
) -> None:
    stuck, other, sender = (make_layer(capacity=100) for _ in range(3))
    for layer in (stuck, other):
        await listen(layer)
    # So quick that it is given jobs ahead, and then no more of it.
    for number in range(60):
        await sender.send("jobs", {"number": number})
    done = [(await receive(stuck, "jobs"))["number"] for _ in range(30)]
    rest = [(await receive(other, "jobs"))["number"] for _ in range(30)]
    assert done == list(range(30))
    assert sorted(rest) == list(range(30, 60))
    await until(
        lambda: observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (0,)
    )


async def test_a_blocked_event_loop_gets_everything_when_it_goes_on(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    # Nothing of the process runs meanwhile, neither its listener nor its heartbeat.
    layer = make_layer(capacity=1000)
    process = processes.start(block, migrated_dsn)
    channel, _ = await process.hear()
    process.say("block")
    assert await process.hear() == "blocking"
    for number in range(200):
        await layer.send(channel, {"number": number, "blob": bytes(10 if number % 10 else 9000)})
        await layer.group_send("room", {"number": number})
    process.say("go on")
    assert await process.result() == (list(range(200)), list(range(200)))


async def block(link: Link, dsn: str) -> tuple[list[int], list[int]]:
    """Receive, but let the loop stand still first, for some heartbeats, until the test says otherwise."""
    async with open_layer(dsn, capacity=1000, lease=60, heartbeat=0.2) as layer:
        channel, member = await layer.new_channel(), await layer.new_channel()
        await layer.group_add("room", member)
        await listen(layer)
        link.say((channel, member))
        await link.hear()
        link.say("blocking")
        # Its end of the line is readable once the test speaks: nothing else is looked at.
        link._connection.poll(30)
        return (
            [(await receive(layer, channel))["number"] for _ in range(200)],
            [(await receive(layer, member))["number"] for _ in range(200)],
        )
