"""A sender whose NOTIFY is refused: its messages are neither overtaken nor late.

The server refuses NOTIFY while its queue of notifications is full.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import pytest
from django.apps import apps
from django.db import connections, transaction

from devtools.postgres import PostgresServer
from pg_layer import PostgresChannelLayer
from tests.faults.conftest import migrate
from tests.faults.test_notify_refused import full_queue
from tests.integration.test_django import postgres
from tests.processes import UNHURRIED, Link, Process, Processes, listen, open_layer, receive
from tests.project.configured import configured

T = TypeVar("T")

GROUP = "room"
LAST = -1
SIZES = [0, 9000]  # bytes; the second size is too large for a notification


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """Yield a server with the smallest queue of notifications.

    The size can be set from version 17 on.
    """
    settings = {"max_notify_queue_pages": 64}
    with PostgresServer(fsync=False, version="18", settings=settings) as server:
        yield server


@pytest.fixture
def dsn(server: PostgresServer) -> Iterator[str]:
    """Yield the DSN of a migrated database on that server."""
    free_the_queue(server)
    dsn = server.create_database("layer")
    migrate(dsn)
    yield dsn
    server.execute("DROP DATABASE layer WITH (FORCE)")


def free_the_queue(server: PostgresServer) -> None:
    """Make the server drop notifications that every listener has read.

    The server does so without a request only from time to time.
    """
    server.execute("SELECT pg_notification_queue_usage()")


@contextmanager
def notify_refused(server: PostgresServer, dsn: str) -> Iterator[None]:
    """Keep the queue full while the block runs, and free it afterwards."""
    with full_queue(dsn):
        yield
    free_the_queue(server)


async def read_to_the_last(link: Link, dsn: str, heartbeat: float) -> None:
    """Report the channel of a new member, then the number of each message. Runs in a process."""
    async with open_layer(dsn, capacity=1000, heartbeat=heartbeat) as layer:
        await listen(layer)
        channel = await layer.new_channel()
        await layer.group_add(GROUP, channel)
        link.say(channel)
        number = None
        while number != LAST:
            number = (await receive(layer, channel))["number"]
            link.say(number)


async def start_reader(
    processes: Processes, dsn: str, heartbeat: float = 1200
) -> tuple[Process[None], str]:
    reader = processes.start(read_to_the_last, dsn, heartbeat)
    return reader, await reader.hear()


async def receive_rest(reader: Process[None]) -> list[int]:
    """Return the numbers that the reader receives before the last message."""
    numbers: list[int] = []
    while (number := await reader.hear()) != LAST:
        numbers.append(number)
    return numbers


async def send_one(
    layer: PostgresChannelLayer, method: str, channel: str, number: int, size: int = 0
) -> None:
    """Send one message: to the channel, to its group, or alternately to both."""
    message = {"number": number, "blob": bytes(size)}
    if method == "send" or (method == "both in turn" and number % 2):
        await layer.send(channel, message)
    else:
        await layer.group_send(GROUP, message)


METHODS = ["send", "group_send", "both in turn"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("size", SIZES)
async def test_messages_of_one_sender_while_notify_is_refused_arrive_in_order(
    server: PostgresServer, dsn: str, processes: Processes, method: str, size: int
) -> None:
    """One sender awaits each send. NOTIFY is refused for some of them, and accepted again.

    The reader, in another process, receives the messages in the order of the sends.
    """
    reader, channel = await start_reader(processes, dsn)
    async with open_layer(dsn, capacity=1000) as writer:
        for start in range(0, 21, 7):
            await send_one(writer, method, channel, start, size)
            with notify_refused(server, dsn):
                for number in range(start + 1, start + 4):
                    await send_one(writer, method, channel, number, size)
            for number in range(start + 4, start + 7):
                await send_one(writer, method, channel, number, size)
        await send_one(writer, method, channel, LAST)
        assert await receive_rest(reader) == list(range(21))


@pytest.mark.parametrize("method", METHODS)
async def test_last_messages_while_notify_is_refused_arrive_when_the_queue_is_free(
    server: PostgresServer, dsn: str, processes: Processes, method: str
) -> None:
    """A sender sends its last messages while NOTIFY is refused.

    They arrive a moment after the queue is free. The reader would find them with its next
    heartbeat, which is 20 minutes away.
    """
    reader, channel = await start_reader(processes, dsn)
    async with open_layer(dsn, capacity=1000) as writer:
        await send_one(writer, method, channel, 0)
        assert await reader.hear() == 0
        with notify_refused(server, dsn):
            for number in range(1, 5):
                await send_one(writer, method, channel, number)
        assert [await reader.hear() for _ in range(4)] == [1, 2, 3, 4]
        await send_one(writer, method, channel, 5)
        assert await reader.hear() == 5
        await send_one(writer, method, channel, LAST)
        assert await receive_rest(reader) == []


@pytest.mark.parametrize("method", ["send", "group_send"])
async def test_concurrent_messages_while_notify_is_refused_are_not_overtaken(
    server: PostgresServer, dsn: str, processes: Processes, method: str
) -> None:
    """Several sends at once are refused NOTIFY. Awaited sends follow when the queue is free."""
    reader, channel = await start_reader(processes, dsn)
    async with open_layer(dsn, capacity=1000) as writer:
        await send_one(writer, method, channel, 0)
        with notify_refused(server, dsn):
            await asyncio.gather(
                *(send_one(writer, method, channel, number) for number in range(1, 30))
            )
        for number in range(30, 40):
            await send_one(writer, method, channel, number)
        await send_one(writer, method, channel, LAST)
        assert await receive_rest(reader) == list(range(40))


# ---------------------------------------------------------------------- in a transaction


async def run_in_thread(function: Callable[[], T]) -> T:
    """Run a function in a thread. Close the thread's database connections afterwards."""

    def run() -> T:
        try:
            return function()
        finally:
            connections.close_all()

    return await asyncio.to_thread(run)


async def test_transaction_sending_while_notify_is_refused_commits_and_its_messages_arrive(
    server: PostgresServer, dsn: str, processes: Processes
) -> None:
    """The queue is full when a transaction sends, commits and would announce its messages.

    Neither the call nor the commit fails, not even in the first such transaction. When the
    queue is free, the messages arrive in order, within two heartbeats.
    """
    reader, _ = await start_reader(processes, dsn, heartbeat=1)
    layer = PostgresChannelLayer(**UNHURRIED)
    settings = {"DATABASES": {"default": postgres(dsn)}, "SECRET_KEY": "x"}

    def commit(*numbers: int) -> None:
        with transaction.atomic():
            for number in numbers:
                layer.sync.group_send(GROUP, {"number": number})

    with configured(layer, **settings):
        apps.populate([])
        await run_in_thread(lambda: commit(0))
        assert await reader.hear() == 0
        with notify_refused(server, dsn):
            await run_in_thread(lambda: commit(1, 2))
            await run_in_thread(lambda: commit(3))
        assert [await reader.hear() for _ in range(3)] == [1, 2, 3]
        await run_in_thread(lambda: commit(4))
        assert await reader.hear() == 4
        await run_in_thread(lambda: commit(LAST))
        assert await receive_rest(reader) == []
        await layer.close()
