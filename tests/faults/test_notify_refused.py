"""A server without NOTIFY: its queue is full, or the server does not support it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import psycopg
import pytest

from devtools.postgres import PostgresServer
from pg_layer import PostgresChannelLayer
from pg_layer._state import log_events
from tests.conftest import Observer
from tests.faults.conftest import migrate
from tests.logs import events, records
from tests.processes import listen, open_layer, receive, until
from tests.stand_ins import find_first

Recovery = Callable[[str], AbstractContextManager[None]]

# Heartbeats detect that notifications do not arrive, and that they arrive again.
BEATING: dict[str, object] = {"heartbeat": 1, "lease": 60, "capacity": 1000}


@pytest.fixture(scope="module")
def small_queue() -> Iterator[PostgresServer]:
    """Start a server with the smallest queue. Before version 17 it cannot be set, and has 8 GB."""
    settings = {"max_notify_queue_pages": 64}
    with PostgresServer(fsync=False, version="18", settings=settings) as server:
        yield server


@pytest.fixture
def dsn(small_queue: PostgresServer) -> Iterator[str]:
    """Return the DSN of a migrated database of that server, with an empty queue.

    Reading the queue's usage makes PostgreSQL free it.
    """
    small_queue.execute("SELECT pg_notification_queue_usage()")
    dsn = small_queue.create_database("layer")
    migrate(dsn)
    yield dsn
    small_queue.execute("DROP DATABASE layer WITH (FORCE)")


def fill(connection: psycopg.Connection) -> None:
    """Notify until the queue is full.

    In parts, because the notifications of one transaction must fit into the free part.
    """
    said = "n || repeat('x', 7900)"
    while True:
        try:
            connection.execute(
                f"SELECT pg_notify('filled', {said}) FROM generate_series(1, 10) AS n".encode()
            )
        except psycopg.errors.ProgramLimitExceeded:
            return


@contextmanager
def full_queue(dsn: str) -> Iterator[None]:
    """Fill NOTIFY's queue: a session that listens stays idle in a transaction."""
    with (
        psycopg.connect(dsn, autocommit=True) as pin,
        psycopg.connect(dsn, autocommit=True) as filler,
    ):
        pin.execute("LISTEN filled")
        pin.execute("BEGIN")
        pin.execute("SELECT 1")
        fill(filler)
        with pytest.raises(psycopg.errors.ProgramLimitExceeded):
            filler.execute("NOTIFY filled")
        yield


def falling_back(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    return records(caplog, log_events.POLLING_STARTED)


async def numbers(layer: PostgresChannelLayer, channel: str, count: int) -> list[int]:
    return [(await receive(layer, channel))["number"] for _ in range(count)]


async def exchange(layer: PostgresChannelLayer, sender: PostgresChannelLayer, count: int) -> None:
    """Check that messages, group messages and jobs arrive once and in order, single and batched."""
    own, member, added = [await layer.new_channel() for _ in range(3)]
    await layer.group_add("room", member)
    await sender.group_add("room", added)
    channels = own, member, added, "jobs"
    reading = asyncio.gather(*(numbers(layer, channel, 2 * count) for channel in channels))
    for number in range(count):
        message = {"number": number, "blob": bytes(500 * number)}
        await sender.send(own, message)
        await sender.group_send("room", message)
        await sender.send("jobs", message)
    calls = [
        call
        for number in range(count, 2 * count)
        for call in (
            sender.send(own, {"number": number}),
            sender.group_send("room", {"number": number}),
            sender.send("jobs", {"number": number}),
        )
    ]
    await asyncio.gather(*calls)
    assert await reading == [list(range(2 * count))] * 4
    await sender.group_discard("room", added)
    await layer.group_discard("room", member)
    await sender.group_send("room", {"number": -1})
    for channel in (member, added):
        await sender.send(channel, {"number": -2})
        assert await numbers(layer, channel, 1) == [-2]


async def hears_again(layer: PostgresChannelLayer) -> None:
    """Wait until the layer listens and reports no problems."""

    async def look() -> bool:
        health = await layer.health()
        return health["listener"] == "listening" and not health["problems"]

    deadline = asyncio.get_running_loop().time() + 30
    while not await look():
        assert asyncio.get_running_loop().time() < deadline, await layer.health()
        await asyncio.sleep(0.05)


# ---------------------------------------------------------------------- a queue that is full


async def test_messages_while_the_queue_is_full_are_received(
    dsn: str, caplog: pytest.LogCaptureFixture, recovery: Recovery
) -> None:
    async with open_layer(dsn, **BEATING) as layer, open_layer(dsn, **BEATING) as sender:
        await listen(layer)
        await exchange(layer, sender, 5)
        assert events(caplog) == []
        with full_queue(dsn):
            with recovery("NOTIFY's queue is full: until messages are found without it"):
                await exchange(layer, sender, 20)
            health = await layer.health()
            assert health["listener"] == "polling"
            assert any("NOTIFY" in problem for problem in health["problems"])
            await exchange(layer, sender, 20)
        with recovery("NOTIFY's queue is free: until it is used again"):
            await hears_again(layer)
        await exchange(layer, sender, 20)
        assert (await layer.health())["listener"] == "listening"
    assert len(falling_back(caplog)) == 1
    # The sender logs it once as well, and the layer logs the end.
    assert len(events(caplog)) <= 3


async def test_close_with_full_queue_releases_jobs(dsn: str) -> None:
    async with open_layer(dsn, **BEATING) as other:
        async with open_layer(dsn, **BEATING) as worker:
            await listen(worker)
            for number in range(50):
                await other.send("jobs", {"number": number})
            done = await numbers(worker, "jobs", 10)
            with full_queue(dsn):
                await worker.close()
                done += await numbers(other, "jobs", 40)
        assert done == list(range(50))


async def test_flush_with_full_queue_removes_everything(dsn: str) -> None:
    async with open_layer(dsn, **BEATING) as layer, open_layer(dsn, **BEATING) as sender:
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        await listen(layer)
        with full_queue(dsn):
            await sender.send("jobs", {"number": 1})
            await sender.flush()
            await sender.group_send("room", {"number": 2})
            await sender.send("jobs", {"number": 3})
            await sender.send(channel, {"number": 4})
            assert await numbers(layer, "jobs", 1) == [3]
            assert await numbers(layer, channel, 1) == [4]


async def test_layer_that_begins_with_full_queue_receives(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    with full_queue(dsn):
        async with open_layer(dsn, **BEATING) as layer, open_layer(dsn, **BEATING) as sender:
            await exchange(layer, sender, 20)
            assert (await layer.health())["listener"] == "polling"
    assert len(falling_back(caplog)) == 1


# ---------------------------------------------------------------------- a server that knows none

# Stand-ins for servers that speak PostgreSQL's protocol, found before the real functions.
NO_NOTIFY = """
    CREATE FUNCTION refusing.pg_notify(text, text) RETURNS void LANGUAGE plpgsql AS $$
    BEGIN RAISE feature_not_supported USING MESSAGE = 'NOTIFY is not supported'; END $$;
"""
NO_LISTEN = """
    CREATE FUNCTION refusing.pg_layer_listen(_channels text[]) RETURNS void LANGUAGE plpgsql AS $$
    BEGIN RAISE feature_not_supported USING MESSAGE = 'LISTEN is not supported'; END $$;
"""
NOTHING_HEARD = """
    CREATE FUNCTION refusing.pg_notify(text, text) RETURNS void LANGUAGE sql AS '';
"""


@pytest.mark.parametrize(
    "refuses",
    [
        pytest.param(NO_NOTIFY, id="NOTIFY"),
        pytest.param(NO_LISTEN, id="LISTEN"),
        pytest.param(NO_NOTIFY + NO_LISTEN, id="both"),
        pytest.param(NOTHING_HEARD, id="silently"),
    ],
)
async def test_server_without_notify_is_polled_until_it_has_it(
    migrated_dsn: str,
    observer: Observer,
    refuses: str,
    caplog: pytest.LogCaptureFixture,
    recovery: Recovery,
) -> None:
    observer.execute("CREATE SCHEMA refusing")
    observer.execute(refuses.encode())
    find_first(observer, "refusing")
    async with (
        open_layer(migrated_dsn, **BEATING) as layer,
        open_layer(migrated_dsn, **BEATING) as sender,
    ):
        await exchange(layer, sender, 20)
        await until(lambda: falling_back(caplog))
        await exchange(layer, sender, 20)
        health = await layer.health()
        assert health["listener"] == "polling"
        assert health["problems"]
        assert len(falling_back(caplog)) == 1
        before = events(caplog)
        observer.execute("DROP SCHEMA refusing CASCADE")
        with recovery("a server that has notifications now: until they are used"):
            await hears_again(layer)
        await exchange(layer, sender, 20)
        assert len(events(caplog)) <= len(before) + 1
