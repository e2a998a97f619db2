"""Messages between processes: each one arrives once, unchanged and in order."""

from __future__ import annotations

import asyncio
import hashlib
import random
import socket
from collections import Counter
from contextlib import suppress

import psycopg
import pytest

from pg_layer import MessageTooLarge, PostgresChannelLayer
from pg_layer.layer import MAX_PREFIX
from tests.conftest import MakeLayer, Observer
from tests.processes import (
    Link,
    Message,
    Processes,
    listen,
    open_layer,
    read,
    receive,
    write,
)

MEBIBYTE = 1024 * 1024

EVERYTHING: Message = {
    "type": "all.types",
    "text": "Grüße, 世界 \U0001f600 \x00 \n",
    "empty text": "",
    "smallest": -(2**63),
    "largest": 2**64 - 1,
    "zero": 0,
    "float": 0.1,
    "tiny": 5e-324,
    "yes": True,
    "no": False,
    "nothing": None,
    "list": [1, "two", [3.0, None, [[]]], {}],
    "dict": {"": {"deep": {"deeper": [{"deepest": -1}]}}, "ü": 1},
}
BYTES: Message = {"bytes": bytes(range(256)), "no bytes": b"", "infinite": float("inf")}


def representation(message: object) -> str:
    """Return a text that is equal only for equal messages with values of the same types.

    ``1 == 1.0 == True``, but their representations differ.
    """
    return repr(message)


def digest(message: Message) -> tuple[int, int, str]:
    """Return the number of a message, and the length and hash of its blob."""
    blob = message["blob"]
    return message["number"], len(blob), hashlib.sha256(blob).hexdigest()


# ---------------------------------------------------------------------- types and sizes


@pytest.mark.parametrize(
    ("serializer_format", "message"),
    [("msgpack", EVERYTHING | BYTES), ("json", EVERYTHING)],
    ids=["msgpack", "json"],
)
async def test_message_with_every_type_arrives_unchanged(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    serializer_format: str,
    message: Message,
) -> None:
    layer = make_layer(serializer_format=serializer_format)
    reader = processes.start(read, migrated_dsn, 2)
    channel = await reader.hear()
    await layer.send(channel, message)
    await layer.send(channel, {"tuple": (1, ("two",))})
    assert list(map(representation, await reader.result())) == [
        representation(message),
        representation({"tuple": [1, ["two"]]}),
    ]


async def read_digests(link: Link, dsn: str, count: int) -> list[tuple[int, int, str]]:
    async with open_layer(dsn) as layer:
        channel = await layer.new_channel()
        await listen(layer)
        link.say(channel)
        return [digest(await receive(layer, channel)) for _ in range(count)]


async def test_message_of_any_size_arrives_and_one_above_the_maximum_is_refused(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    layer = make_layer()
    largest = 8 * MEBIBYTE - len(b"\x82\xa6number\x00\xa4blob\xc6....")
    sizes = [0, 1, 100, 10_000, MEBIBYTE - 1, MEBIBYTE, MEBIBYTE + 1, 4 * MEBIBYTE, largest, 2]
    messages = [{"number": n, "blob": random.randbytes(size)} for n, size in enumerate(sizes)]
    reader = processes.start(read_digests, migrated_dsn, len(sizes))
    channel = await reader.hear()
    for message in messages:
        await layer.send(channel, message)
    with pytest.raises(MessageTooLarge):
        await layer.send(channel, {"number": 0, "blob": bytes(largest + 1)})
    assert await reader.result() == list(map(digest, messages))


async def read_until_last(
    link: Link, dsn: str, prefix: str, group: str | None
) -> list[tuple[int, int, str]]:
    async with open_layer(dsn, capacity=1000) as layer:
        channel = await layer.new_channel(prefix)
        if group is not None:
            await layer.group_add(group, channel)
        await listen(layer)
        link.say(channel)
        found = []
        while (message := await receive(layer, channel))["number"] != -1:
            found.append(digest(message))
        # A message that is delivered twice arrives at once, or with the next poll.
        with suppress(asyncio.TimeoutError):
            found.append(digest(await asyncio.wait_for(layer.receive(channel), 0.3)))
        return found


@pytest.mark.parametrize("method", ["send", "group_send"])
@pytest.mark.parametrize("names", ["short", "long"])
async def test_message_sizes_around_the_limit_of_notify_arrive_once(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    observer: Observer,
    method: str,
    names: str,
) -> None:
    layer = make_layer(capacity=1000)
    prefix, group = ("c", "g") if names == "short" else ("c" * MAX_PREFIX, "g" * 99)
    sizes = [*range(5550, 5650), *range(5850, 5970), *range(7980, 8020)]
    reader = processes.start(
        read_until_last, migrated_dsn, prefix, group if method == "group_send" else None
    )
    channel = await reader.hear()
    observer.execute(
        """
        SELECT pg_layer_listen(ARRAY[pg_layer_notification_channel(
            CASE WHEN %s THEN pg_layer_address('asgi', %s)
                 ELSE pg_layer_group_address('asgi', %s) END)])
        """,
        (method == "send", channel, group),
    )
    messages: list[Message] = []
    for number, size in enumerate(sizes):
        message: Message = {"number": number, "blob": b""}
        overhead = len(b"\x82\xa6number\xa4blob\xc5..") + (
            1 if number < 128 else 2 if number < 256 else 3
        )
        message["blob"] = random.randbytes(size - overhead)
        messages.append(message)
    for message in [*messages, {"number": -1}]:
        if method == "send":
            await layer.send(channel, message)
        else:
            await layer.group_send(group, message)
    assert await reader.result() == list(map(digest, messages))

    payloads = [notify.payload for notify in observer.notifies(timeout=5, stop_after=len(sizes))]
    assert max(map(len, payloads)) < 8000
    kinds = [payload[0] for payload in payloads]
    # The limit is among the sizes: smaller messages are in the notification, larger ones are read.
    boundary = kinds.index("R")
    assert 0 < boundary < len(kinds) - 1
    assert set(kinds[:boundary]) == {"M"}
    assert set(kinds[boundary : len(sizes)]) == {"R"}


# ---------------------------------------------------------------------- order and duplicates


def mixed(count: int, writer: int = 0) -> list[Message]:
    """Return messages of many sizes: some travel in the notification, others must be read."""
    sizes = (10, 10, 10, 100, 5000, 6000, 20_000, 300_000)
    return [
        {"writer": writer, "number": n, "blob": bytes(random.choice(sizes))} for n in range(count)
    ]


async def read_numbers(link: Link, dsn: str, count: int, capacity: int) -> list[tuple[int, int]]:
    async with open_layer(dsn, capacity=capacity) as layer:
        channel = await layer.new_channel()
        await listen(layer)
        link.say(channel)
        found = []
        for _ in range(count):
            message = await receive(layer, channel)
            found.append((message["writer"], message["number"]))
        with suppress(asyncio.TimeoutError):
            message = await asyncio.wait_for(layer.receive(channel), 0.3)
            found.append((message["writer"], message["number"]))
        return found


@pytest.mark.parametrize("pace", ["one by one", "at once"])
async def test_small_messages_do_not_overtake_large_ones(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, pace: str
) -> None:
    layer = make_layer(capacity=1000)
    reader = processes.start(read_numbers, migrated_dsn, 300, 1000)
    channel = await reader.hear()
    await listen(layer)
    messages = mixed(300)
    if pace == "one by one":
        for message in messages:
            await layer.send(channel, message)
    else:
        await asyncio.gather(*(layer.send(channel, message) for message in messages))
    assert await reader.result() == [(0, n) for n in range(300)]


async def write_together(link: Link, dsn: str, channel: str, messages: list[Message]) -> None:
    async with open_layer(dsn, capacity=1000) as layer:
        await asyncio.gather(*(layer.send(channel, message) for message in messages))


async def test_concurrent_sends_of_a_new_process_keep_their_order(
    migrated_dsn: str, processes: Processes
) -> None:
    reader = processes.start(read_numbers, migrated_dsn, 200, 1000)
    channel = await reader.hear()
    messages = [{"writer": 0, "number": number} for number in range(200)]
    await processes.start(write_together, migrated_dsn, channel, messages).result()
    assert await reader.result() == [(0, n) for n in range(200)]


async def test_messages_of_two_processes_keep_the_order_of_each(
    migrated_dsn: str, processes: Processes
) -> None:
    reader = processes.start(read_numbers, migrated_dsn, 500, 1000)
    channel = await reader.hear()
    writers = [
        processes.start(write, migrated_dsn, channel, mixed(250, writer), capacity=1000)
        for writer in (1, 2)
    ]
    for process in writers:
        await process.result()
    found = await reader.result()
    assert [n for writer, n in found if writer == 1] == list(range(250))
    assert [n for writer, n in found if writer == 2] == list(range(250))


async def write_at_once(link: Link, dsn: str, channel: str, writer: int, count: int) -> None:
    async with open_layer(dsn, capacity=10_000) as layer:
        numbers = iter(range(count))

        async def work() -> None:
            for number in numbers:
                size = random.choice((10, 10, 10, 10, 100, 6000))
                await layer.send(channel, {"writer": writer, "number": number, "blob": bytes(size)})

        await asyncio.gather(*(work() for _ in range(10)))


async def test_concurrent_messages_of_three_processes_arrive_once(
    migrated_dsn: str, processes: Processes
) -> None:
    reader = processes.start(read_numbers, migrated_dsn, 3000, 10_000)
    channel = await reader.hear()
    writers = [
        processes.start(write_at_once, migrated_dsn, channel, writer, 1000) for writer in range(3)
    ]
    for process in writers:
        await process.result()
    found = Counter(await reader.result())
    assert found == Counter((writer, n) for writer in range(3) for n in range(1000))


async def test_concurrent_receives_on_one_channel_share_its_messages(
    make_layer: MakeLayer,
) -> None:
    layer, sender = make_layer(), make_layer()
    channel = await layer.new_channel()
    receivers = [asyncio.create_task(receive(layer, channel)) for _ in range(20)]
    await asyncio.gather(*(sender.send(channel, {"number": n}) for n in range(20)))
    assert sorted([(await task)["number"] for task in receivers]) == list(range(20))


# ---------------------------------------------------------------------- names, and early messages


async def test_names_of_the_maximum_length_deliver_messages(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    layer = make_layer()
    reader = processes.start(
        read_from_long_names, migrated_dsn, "p" * MAX_PREFIX, "n" * 99, "g" * 99
    )
    channel = await reader.hear()
    assert channel.startswith("p" * MAX_PREFIX)
    await layer.send(channel, {"to": "specific"})
    await layer.send("n" * 99, {"to": "normal"})
    await layer.group_send("g" * 99, {"to": "group"})
    assert await reader.result() == [{"to": "specific"}, {"to": "normal"}, {"to": "group"}]


async def read_from_long_names(
    link: Link, dsn: str, prefix: str, normal: str, group: str
) -> list[Message]:
    async with open_layer(dsn) as layer:
        channel = await layer.new_channel(prefix)
        await layer.group_add(group, channel)
        link.say(channel)
        return [await receive(layer, name) for name in (channel, normal, channel)]


async def test_messages_sent_before_the_owner_listens_arrive(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    reader = processes.start(read_on_request, migrated_dsn, 5)
    channel = await reader.hear()
    layer = make_layer()
    for number in range(5):
        await layer.send(channel, {"number": number, "blob": bytes(number * 5000)})
    reader.say("now")
    assert [message["number"] for message in await reader.result()] == list(range(5))


async def read_on_request(link: Link, dsn: str, count: int) -> list[Message]:
    async with open_layer(dsn) as layer:
        channel = await layer.new_channel()
        link.say(channel)
        await link.hear()
        return [await receive(layer, channel) for _ in range(count)]


async def test_new_channel_opens_no_connection() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        layer = PostgresChannelLayer(dsn=f"postgresql://u@127.0.0.1:{server.getsockname()[1]}/d")
        names = {await layer.new_channel() for _ in range(1000)}
        prefixed = await layer.new_channel("chat")
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    assert len(names) == 1000
    assert all(
        layer.require_valid_channel_name(name) and name.startswith("specific.") for name in names
    )
    assert prefixed.startswith("chat.")


async def test_new_channel_in_two_processes_returns_different_names(
    migrated_dsn: str, processes: Processes
) -> None:
    first, second = (processes.start(read, migrated_dsn, 0) for _ in range(2))
    assert await first.hear() != await second.hear()


# ---------------------------------------------------------------------- cancellation


async def receive_and_cancel(
    layer: PostgresChannelLayer, channel: str, times: int, seed: int, *, pauses: bool = False
) -> list[int]:
    """Cancel ``times`` receives, each at a random moment. Return the received messages."""
    moments = random.Random(seed)
    found: list[int] = []
    while times:
        task = asyncio.create_task(layer.receive(channel))
        for _ in range(moments.choice((0, 1, 2, 3, 5, 8, 13))):
            await asyncio.sleep(0)
        if moments.random() < 0.3:
            await asyncio.wait({task}, timeout=moments.random() * 0.003)
        times -= task.cancel()
        with suppress(asyncio.CancelledError):
            found.append((await task)["number"])
        if pauses and moments.random() < 0.05:
            await asyncio.sleep(moments.random() * 0.1)  # some are long enough for a release
    return found


async def receive_rest(layer: PostgresChannelLayer, channel: str, missing: int) -> list[int]:
    """Receive the missing messages, and any unexpected ones."""
    found: list[int] = []
    with suppress(asyncio.TimeoutError):
        while True:
            timeout = 10 if len(found) < missing else 0.3
            found.append((await asyncio.wait_for(layer.receive(channel), timeout))["number"])
    return found


async def read_with_cancellations(
    link: Link, dsn: str, channel: str | None, seed: int, pauses: bool
) -> list[int]:
    async with open_layer(dsn, capacity=100_000) as layer:
        name = channel or await layer.new_channel()
        await listen(layer)
        link.say(name)
        found = await receive_and_cancel(layer, name, 200, seed, pauses=pauses)
        link.say("enough")
        return found + await receive_rest(layer, name, await link.hear() - len(found))


@pytest.mark.parametrize(
    ("channel", "pauses"),
    [(None, False), ("normal", False), ("normal", True)],
    ids=["specific", "normal", "normal with pauses"],
)
async def test_receive_cancelled_at_random_moments_loses_no_message(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    channel: str | None,
    pauses: bool,
) -> None:
    layer = make_layer(capacity=100_000)
    reader = processes.start(
        read_with_cancellations, migrated_dsn, channel, random.getrandbits(32), pauses
    )
    name = await reader.hear()
    enough = asyncio.create_task(reader.hear())
    sent = 0
    while not enough.done():
        await layer.send(name, {"number": sent, "blob": bytes(random.choice((10, 10, 10, 6000)))})
        sent += 1
        if random.random() < 0.2:  # sometimes the receivers must find the channel empty
            await asyncio.wait({enough}, timeout=random.random() * 0.01)
    reader.say(sent)
    assert await reader.result() == list(range(sent))


async def read_under_pressure(link: Link, dsn: str, count: int, seed: int) -> list[int]:
    async with open_layer(dsn, capacity=count) as layer:
        channel = await layer.new_channel()
        await listen(layer)
        link.say(channel)
        await link.hear()
        found = await receive_and_cancel(layer, channel, 150, seed)
        return found + await receive_rest(layer, channel, count - len(found))


async def test_receive_cancelled_while_it_waits_for_a_deletion_loses_no_message(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes
) -> None:
    # While many messages wait, receive() waits until the row of its message has been deleted.
    # A receive that is cancelled during this wait has already taken its message.
    layer = make_layer(capacity=400)
    reader = processes.start(read_under_pressure, migrated_dsn, 400, random.getrandbits(32))
    channel = await reader.hear()
    for number in range(400):
        await layer.send(channel, {"number": number})
    reader.say("now")
    assert await reader.result() == list(range(400))


# ---------------------------------------------------------------------- rows after a receive


async def test_messages_received_leave_no_row_after_close(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer, sender = make_layer(), make_layer()
    channel = await layer.new_channel()
    for number in range(20):
        await sender.send(channel, {"number": number, "blob": bytes(number * 500)})
        assert (await receive(layer, channel))["number"] == number
    await layer.close()
    assert observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (0,)


async def test_message_sent_by_sql_arrives(make_layer: MakeLayer, migrated_dsn: str) -> None:
    layer = make_layer()
    channel = await layer.new_channel("chat.room.7")
    with psycopg.connect(migrated_dsn, autocommit=True) as connection:
        connection.execute(
            "SELECT pg_layer_send_one('asgi', %s, %s, 60, 100, 0, false, false)",
            (channel, b'{"type": "from.sql"}'),
        )
    assert await receive(layer, channel) == {"type": "from.sql"}
