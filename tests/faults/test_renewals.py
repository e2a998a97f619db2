"""Leases are renewed all the time, while messages are sent as fast as possible."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import pytest

from tests.conftest import MakeLayer
from tests.faults.proxy import Proxy
from tests.faults.readers import numbered, readers_of, wait_for_members
from tests.processes import Link, Processes, listen, open_layer, receive

# Many renewals are in flight while messages flow. No lease ends.
OPTIONS: dict[str, object] = {
    "lease": 3600,
    "heartbeat": 0.1,
    "sweep_interval": 0,
    "send_timeout": 30,
    "expiry": 3600,
    "capacity": 100_000,
}
SENDERS = 2  # sending processes
MESSAGES = 4000  # messages of each to each receiving channel
PART = 200  # messages of each after which the test hears from it
LARGE = 9000  # bytes; more than a notification can carry
CHANGES = 500


class Arrived(NamedTuple):
    """The numbers that arrived at the own channel and at the member of "room"."""

    own: list[int]
    member: list[int]
    memberships: int


async def read_streams(link: Link, dsn: str, options: dict[str, object]) -> Arrived:
    """Report two channels, and receive up to the numbers from the test. Runs in a process."""
    async with open_layer(dsn, **{**OPTIONS, **options}) as layer:
        own, member = [await layer.new_channel() for _ in range(2)]
        await listen(layer)
        await layer.group_add("room", member)
        async with readers_of(layer, own, member) as readers:
            link.say((own, member))
            while (last := await link.hear()) is not None:
                if last:
                    await readers.reached(last)
                link.say(last)
            memberships = layer.stats()["memberships"]
            return Arrived(readers.numbers[own], readers.numbers[member], memberships)


async def send_stream(link: Link, dsn: str, channels: list[str], first: int) -> None:
    """Send numbers from ``first`` on to each channel and to "room". Runs in a process."""
    async with open_layer(dsn, **OPTIONS) as layer:
        for start in range(first, first + MESSAGES, 20):
            numbers = range(start, start + 20)
            size = LARGE if start % 400 == 0 else 0
            await asyncio.gather(
                *(layer.send(c, numbered(number, size)) for number in numbers for c in channels),
                *(layer.group_send("room", numbered(number, size)) for number in numbers),
            )
            if start % PART == 0:
                link.say(start)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["listening", "polling"])
async def test_renewals_during_many_sends_lose_and_double_nothing(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, mode: str
) -> None:
    """Nothing is restarted and nothing fails, so every message arrives once.

    All memberships are listed whenever the test looks.
    """
    options: dict[str, object] = {"poll_interval": 0.05} if mode == "polling" else {}
    layer = make_layer(**OPTIONS)
    reader_processes = [processes.start(read_streams, migrated_dsn, options) for _ in range(2)]
    channels = [await process.hear() for process in reader_processes]
    own = [channel for channel, _ in channels]
    members = sorted(member for _, member in channels)
    await wait_for_members(layer, "room", *members)
    firsts = [1_000_000 * (stream + 1) for stream in range(SENDERS)]
    sender_processes = [processes.start(send_stream, migrated_dsn, own, first) for first in firsts]
    for step in range(0, MESSAGES, PART):
        for first, sender in zip(firsts, sender_processes, strict=True):
            assert await sender.hear() == first + step
            assert sorted(await layer.group_channels("room")) == members
            # The readers answer, because their wait for the test would time out otherwise.
            for reader in reader_processes:
                reader.say(0)
                assert await reader.hear() == 0
    for sender in sender_processes:
        await sender.result()
    expected = [number for first in firsts for number in range(first, first + MESSAGES)]
    for reader in reader_processes:
        for first in firsts:
            reader.say(first + MESSAGES - 1)
            assert await reader.hear() == first + MESSAGES - 1
    assert sorted(await layer.group_channels("room")) == members
    for reader in reader_processes:
        reader.say(None)
    for reader in reader_processes:
        arrived = await reader.result()
        for numbers in (arrived.own, arrived.member):
            assert len(numbers) == len(set(numbers))
            assert sorted(numbers) == expected
        assert arrived.memberships == 1


async def test_renewals_during_membership_changes_keep_their_order(
    make_layer: MakeLayer,
) -> None:
    """Another process discards a channel, and the owner adds it again, many times.

    A message that is sent in between does not arrive, and one that is sent afterwards does.
    The process always has much to read. So it often has not read the last changes and messages
    when the next change is made.
    """
    layer = make_layer(**{**OPTIONS, "heartbeat": 0.02})
    other, busy = make_layer(**OPTIONS), make_layer(**OPTIONS)
    await listen(layer)
    drain, member = [await layer.new_channel() for _ in range(2)]
    await layer.group_add("busy", drain)
    await layer.group_add("room", member)
    stop = asyncio.Event()

    async with readers_of(layer, drain, member) as readers:

        async def load() -> None:
            number = 0
            while not stop.is_set():
                number += 1
                await busy.group_send_many([("busy", numbered(number, LARGE))] * 50)
                await readers.reached(number, drain)

        loading = asyncio.create_task(load())
        for number in range(0, 2 * CHANGES, 2):
            await other.group_discard("room", member)
            await other.group_send("room", numbered(number))
            await layer.group_add("room", member)
            await other.group_send("room", numbered(number + 1))
        stop.set()
        await loading
        await readers.reached(2 * CHANGES - 1, member)
        assert readers.numbers[member] == list(range(1, 2 * CHANGES, 2))


async def test_message_after_a_slow_renewal_is_not_treated_as_expired(
    migrated_dsn: str, make_layer: MakeLayer
) -> None:
    """The renewal reaches the server seconds after it was sent.

    So its answer does not bound the server's clock well.
    """
    delay = 2.5
    with Proxy(migrated_dsn) as proxy:
        layer = make_layer(dsn=proxy.dsn(), heartbeat=20)
        sender = make_layer()
        channel = await layer.new_channel()
        await listen(layer)
        engine = layer._loops.main_engine
        assert engine is not None
        assert engine.owner is not None
        proxy.swallow()
        renewal = asyncio.create_task(engine.owner.lease.renew(None, 30))
        await asyncio.sleep(delay)
        proxy.let_go()
        await renewal
        await sender.send(channel, numbered(1), expiry=delay - 0.5)
        assert (await receive(layer, channel))["number"] == 1
