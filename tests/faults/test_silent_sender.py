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
SIZES = [0, 9000]  # bytes, of which the latter do not fit into a notification


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    """A server with the smallest queue of notifications, which can be set from version 17 on."""
    settings = {"max_notify_queue_pages": 64}
    with PostgresServer(fsync=False, version="18", settings=settings) as server:
        yield server


@pytest.fixture
def dsn(server: PostgresServer) -> Iterator[str]:
    """The DSN of a migrated database on that server."""
    make_room(server)
    dsn = server.create_database("layer")
    migrate(dsn)
    yield dsn
    server.execute("DROP DATABASE layer WITH (FORCE)")


def make_room(server: PostgresServer) -> None:
    """Have the server drop what everybody has read from its queue, as it does now and then."""
    server.execute("SELECT pg_notification_queue_usage()")


@contextmanager
def notify_refused(server: PostgresServer, dsn: str) -> Iterator[None]:
    """The queue is full within the block, and has room again after it."""
    with full_queue(dsn):
        yield
    make_room(server)


async def read_to_the_last(link: Link, dsn: str, heartbeat: float) -> None:
    """Say the channel of a new member of the group, then the number of each message."""
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


async def rest(reader: Process[None]) -> list[int]:
    """The numbers of the messages that the reader receives before the last."""
    numbers: list[int] = []
    while (number := await reader.hear()) != LAST:
        numbers.append(number)
    return numbers


async def write(
    layer: PostgresChannelLayer, how: str, channel: str, number: int, size: int = 0
) -> None:
    """Send one message: to the channel, to its group, or to both in turn."""
    message = {"number": number, "blob": bytes(size)}
    if how == "send" or (how == "both in turn" and number % 2):
        await layer.send(channel, message)
    else:
        await layer.group_send(GROUP, message)


WAYS = ["send", "group_send", "both in turn"]


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("size", SIZES)
async def test_messages_of_one_writer_while_notify_is_refused_arrive_in_order(
    server: PostgresServer, dsn: str, processes: Processes, how: str, size: int
) -> None:
    """One writer awaits each send. NOTIFY is refused for some of them, and accepted again.

    The reader, in another process, receives them in the order of the sends, several times.
    """
    reader, channel = await start_reader(processes, dsn)
    async with open_layer(dsn, capacity=1000) as writer:
        for start in range(0, 21, 7):
            await write(writer, how, channel, start, size)
            with notify_refused(server, dsn):
                for number in range(start + 1, start + 4):
                    await write(writer, how, channel, number, size)
            for number in range(start + 4, start + 7):
                await write(writer, how, channel, number, size)
        await write(writer, how, channel, LAST)
        assert await rest(reader) == list(range(21))


@pytest.mark.parametrize("how", WAYS)
async def test_messages_while_notify_is_refused_arrive_when_the_queue_has_room(
    server: PostgresServer, dsn: str, processes: Processes, how: str
) -> None:
    """The last messages of a writer are written while NOTIFY is refused. It sends no more.

    They arrive a moment after the queue has room. The next heartbeat of the reader, whose
    look would find them, is 20 minutes away.
    """
    reader, channel = await start_reader(processes, dsn)
    async with open_layer(dsn, capacity=1000) as writer:
        await write(writer, how, channel, 0)
        assert await reader.hear() == 0
        with notify_refused(server, dsn):
            for number in range(1, 5):
                await write(writer, how, channel, number)
        assert [await reader.hear() for _ in range(4)] == [1, 2, 3, 4]
        await write(writer, how, channel, 5)
        assert await reader.hear() == 5
        await write(writer, how, channel, LAST)
        assert await rest(reader) == []


@pytest.mark.parametrize("how", ["send", "group_send"])
async def test_gathered_messages_while_notify_is_refused_are_not_overtaken(
    server: PostgresServer, dsn: str, processes: Processes, how: str
) -> None:
    """Several sends at once are refused NOTIFY; awaited sends follow when the queue has room."""
    reader, channel = await start_reader(processes, dsn)
    async with open_layer(dsn, capacity=1000) as writer:
        await write(writer, how, channel, 0)
        with notify_refused(server, dsn):
            await asyncio.gather(*(write(writer, how, channel, number) for number in range(1, 30)))
        for number in range(30, 40):
            await write(writer, how, channel, number)
        await write(writer, how, channel, LAST)
        assert await rest(reader) == list(range(40))


# ---------------------------------------------------------------------- in a transaction


async def in_thread(function: Callable[[], T]) -> T:
    """Run a function in a thread whose connection to the database is closed in the end."""

    def run() -> T:
        try:
            return function()
        finally:
            connections.close_all()

    return await asyncio.to_thread(run)


async def test_transaction_that_sends_while_notify_is_refused_commits_and_its_messages_arrive(
    server: PostgresServer, dsn: str, processes: Processes
) -> None:
    """The queue is full when a transaction sends, commits and would announce its messages.

    Neither the call nor the commit fails, and the first such transaction fails no more than a
    later one. The messages arrive in order, once the queue has room, within two heartbeats.
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
        await in_thread(lambda: commit(0))
        assert await reader.hear() == 0
        with notify_refused(server, dsn):
            await in_thread(lambda: commit(1, 2))
            await in_thread(lambda: commit(3))
        assert [await reader.hear() for _ in range(3)] == [1, 2, 3]
        await in_thread(lambda: commit(4))
        assert await reader.hear() == 4
        await in_thread(lambda: commit(LAST))
        assert await rest(reader) == []
        await layer.close()
