"""The members of a group in all processes see its messages in one order."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack

import pytest

from tests.conftest import MakeLayer
from tests.processes import Link, Message, Processes, listen, open_layer, receive

GROUP = "room"
LARGE = bytes(9000)  # does not fit into a notification

Seen = tuple[int, int]  # the number of the writer and that of its message


async def read_group(link: Link, dsn: str, members: int) -> list[list[Seen]]:
    """Read a group with several members until the last message. Return what each has seen."""

    async def read(channel: str) -> list[Seen]:
        seen: list[Seen] = []
        while not (message := await receive(layer, channel)).get("last"):
            seen.append((message["writer"], message["number"]))
        return seen

    async with open_layer(dsn, capacity=100_000) as layer:
        await listen(layer)
        channels = [await layer.new_channel() for _ in range(members)]
        for channel in channels:
            await layer.group_add(GROUP, channel)
        link.say("joined")
        return list(await asyncio.gather(*map(read, channels)))


async def write_group(link: Link, dsn: str, writers: Sequence[int], count: int) -> None:
    """Write to the group with several layers at once. Each one awaits its own calls."""

    async def write(writer: int) -> None:
        layer = await stack.enter_async_context(open_layer(dsn))
        messages: list[Message] = [
            {"writer": writer, "number": number, "blob": LARGE if number % 3 == writer % 3 else b""}
            for number in range(count)
        ]
        for start in range(0, count, 6):
            for message in messages[start : start + 3]:
                await layer.group_send(GROUP, message)
            await layer.group_send_many((GROUP, m) for m in messages[start + 3 : start + 6])

    async with AsyncExitStack() as stack:
        link.say("ready")
        await link.hear()
        await asyncio.gather(*map(write, writers))


@pytest.mark.slow
@pytest.mark.parametrize(("writers", "count"), [(3, 300), (15, 120)])
async def test_group_send_members_in_three_processes_see_one_order(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, writers: int, count: int
) -> None:
    """Several writers in three processes send small and large messages to one group at once.

    Each member, in each of three other processes, receives all messages. All members receive
    them in the same order. The messages of each writer are in the order of its calls.
    """
    readers = [processes.start(read_group, migrated_dsn, 2) for _ in range(3)]
    for reader in readers:
        assert await reader.hear() == "joined"
    parts = [range(first, writers, 3) for first in range(3)]
    sources = [processes.start(write_group, migrated_dsn, part, count) for part in parts]
    for source in sources:
        assert await source.hear() == "ready"
    for source in sources:
        source.say("go")
    for source in sources:
        await source.result()
    await make_layer().group_send(GROUP, {"last": True})

    seen = [one for reader in readers for one in await reader.result()]
    first = seen[0]
    for writer in range(writers):
        assert [number for who, number in first if who == writer] == list(range(count))
    assert len(first) == writers * count
    for number, other in enumerate(seen[1:], start=1):
        places = [
            place
            for place in range(len(first))
            if other[place : place + 1] != first[place : place + 1]
        ]
        assert not places, f"member {number} sees {len(places)} messages in other places"
        assert len(other) == len(first)
