"""A consumer that no longer receives: its queue is bounded, and others are not affected."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import pytest

from pg_layer import ChannelFull
from tests.conftest import MakeLayer, Observer
from tests.processes import Link, Processes, listen, open_layer, receive, until

CAPACITY = 20
EXPIRY = 1.5


class ServeResult(NamedTuple):
    """The messages of the two readers, and the observations at the channel that was not read."""

    first: list[int]
    second: list[int]
    longest: int  # the largest length of its queue
    dropped: int  # the group messages that it missed
    late: list[int]  # what it received when it was read again


async def serve(link: Link, dsn: str, task_hangs: bool) -> ServeResult:
    """Run three members of the room, of which one stops receiving after its first message.

    Report the channels. On request of the test, read the third channel again, up to None. Runs in a
    process.
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

        forever = asyncio.Event()

        async def receive_once_and_hang() -> None:
            await receive(layer, channels[2])
            await forever.wait()

        reading = [asyncio.create_task(numbers(channel)) for channel in channels[:2]]
        stuck_task = asyncio.create_task(receive_once_and_hang())
        link.say(channels)
        assert await link.hear() == "read again"
        if not task_hangs:
            stuck_task.cancel()
        dropped = layer.stats()["dropped_full"]
        late = [(await receive(layer, channels[2]))["number"]]
        link.say("reading")
        while late[-1] is not None:
            late.append((await receive(layer, channels[2]))["number"])
        first, second = await asyncio.gather(*reading)
        stuck_task.cancel()
        await asyncio.wait((stuck_task,))
        return ServeResult(first, second, longest, dropped, late[:-1])


@pytest.mark.parametrize("task_hangs", [True, False], ids=["hangs", "was cancelled"])
async def test_consumer_that_stops_receiving_harms_no_neighbour(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    observer: Observer,
    task_hangs: bool,
) -> None:
    """Its channel is full, and it misses messages.

    The others receive all, in order and without delay. When the consumer receives again, it gets
    all messages that have not expired, and all later ones.
    """
    layer = make_layer(capacity=CAPACITY, expiry=EXPIRY)
    process = processes.start(serve, migrated_dsn, task_hangs)
    first_reader, second_reader, stuck_channel = await process.hear()
    sent, refused, most_rows = 0, 0, 0

    def unexpired_rows(channel: str) -> int:
        row = observer.execute(
            "SELECT count(*) FROM pg_layer_message"
            " WHERE channel = %s AND expires_at > clock_timestamp()",
            (channel,),
        ).fetchone()
        assert row is not None
        return int(row[0])

    async def send_one() -> None:
        nonlocal sent, refused
        await layer.group_send("room", {"number": sent})
        sent += 1
        for channel in (first_reader, second_reader):
            await layer.send(channel, {"number": sent})
        sent += 1
        try:
            await layer.send(stuck_channel, {"number": -1})
        except ChannelFull:
            refused += 1
        # Wait for the other channels, because their capacity is small too.
        await until(
            lambda: unexpired_rows(first_reader) + unexpired_rows(second_reader) <= CAPACITY // 4
        )

    deadline = asyncio.get_running_loop().time() + 3 * EXPIRY
    while asyncio.get_running_loop().time() < deadline:
        await send_one()
        most_rows = max(most_rows, unexpired_rows(stuck_channel))
    assert refused > 0
    assert CAPACITY - 1 <= most_rows <= CAPACITY
    # All messages that waited for it have expired.
    await until(lambda: unexpired_rows(stuck_channel) == 0)
    await layer.group_send("room", {"number": sent})
    sent += 1
    process.say("read again")
    assert await process.hear() == "reading"
    number_at_return = sent
    for _ in range(CAPACITY // 2):
        await layer.group_send("room", {"number": sent})
        sent += 1
    for channel in (first_reader, second_reader, stuck_channel):
        await layer.send(channel, {"number": None})
    served = await process.result()
    assert served.first == served.second == list(range(sent))
    # The capacity bounds its direct messages, and also its group messages.
    assert CAPACITY <= served.longest <= 2 * CAPACITY
    assert served.dropped > 0
    assert served.late[-1 - CAPACITY // 2 :] == list(range(number_at_return - 1, sent))
    assert [number for number in served.late if number >= 0] == sorted(set(served.late) - {-1})


async def test_worker_that_stops_receiving_leaves_its_jobs_to_others(
    make_layer: MakeLayer, observer: Observer
) -> None:
    stuck_worker, other_worker, sender = (make_layer(capacity=100) for _ in range(3))
    for layer in (stuck_worker, other_worker):
        await listen(layer)
    # The first worker is so quick that it is given jobs ahead. Then it stops.
    for number in range(60):
        await sender.send("jobs", {"number": number})
    done = [(await receive(stuck_worker, "jobs"))["number"] for _ in range(30)]
    rest = [(await receive(other_worker, "jobs"))["number"] for _ in range(30)]
    assert done == list(range(30))
    assert sorted(rest) == list(range(30, 60))
    await until(
        lambda: observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (0,)
    )


async def test_event_loop_blocked_receives_everything_when_it_goes_on(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    """Nothing runs in the process meanwhile, neither its listener nor its heartbeat."""
    layer = make_layer(capacity=1000)
    process = processes.start(receive_after_blocking, migrated_dsn)
    channel, _ = await process.hear()
    process.say("block")
    assert await process.hear() == "blocking"
    for number in range(200):
        await layer.send(channel, {"number": number, "blob": bytes(10 if number % 10 else 9000)})
        await layer.group_send("room", {"number": number})
    process.say("go on")
    assert await process.result() == (list(range(200)), list(range(200)))


async def receive_after_blocking(link: Link, dsn: str) -> tuple[list[int], list[int]]:
    """Block the loop for some heartbeats, until the test requests the end, then receive."""
    async with open_layer(dsn, capacity=1000, lease=60, heartbeat=0.2) as layer:
        channel, member = await layer.new_channel(), await layer.new_channel()
        await layer.group_add("room", member)
        await listen(layer)
        link.say((channel, member))
        await link.hear()
        link.say("blocking")
        # Block the loop until the test writes to the pipe.
        link._connection.poll(30)
        return (
            [(await receive(layer, channel))["number"] for _ in range(200)],
            [(await receive(layer, member))["number"] for _ in range(200)],
        )
