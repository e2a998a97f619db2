"""Where NOTIFY cannot be had: its queue is full, or the server knows none."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import psycopg
import pytest
from psycopg import sql

from devtools.postgres import PostgresServer
from pg_layer import PostgresChannelLayer
from pg_layer._state import log_events
from tests.conftest import Observer
from tests.faults.conftest import migrate
from tests.logs import events, records
from tests.processes import listen, open_layer, receive, until

Recovery = Callable[[str], AbstractContextManager[None]]

# Heartbeats find out that nothing is heard, and that it is again.
BEATING: dict[str, object] = {"heartbeat": 1, "lease": 60, "capacity": 1000}


@pytest.fixture(scope="module")
def small_queue() -> Iterator[PostgresServer]:
    """A server with the smallest queue there is; before version 17 it cannot be set, and is 8 GB."""
    settings = {"max_notify_queue_pages": 64}
    with PostgresServer(fsync=False, version="18", settings=settings) as server:
        yield server


@pytest.fixture
def dsn(small_queue: PostgresServer) -> Iterator[str]:
    """A migrated database of that server. Asking how full its queue is has PostgreSQL tidy that up."""
    small_queue.execute("SELECT pg_notification_queue_usage()")
    dsn = small_queue.create_database("layer")
    migrate(dsn)
    yield dsn
    small_queue.execute("DROP DATABASE layer WITH (FORCE)")


def fill(connection: psycopg.Connection) -> None:
    """Notify until the queue is full; in parts, as what one transaction says must fit into what is left."""
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
    """NOTIFY's queue is full, as somebody who listens sits in a transaction."""
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
    """Messages, groups and jobs of the sender reach the layer once and in order, singly and in batches."""
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
    """Wait until the layer listens, and finds nothing amiss."""

    async def look() -> bool:
        health = await layer.health()
        return health["listener"] == "listening" and not health["problems"]

    deadline = asyncio.get_running_loop().time() + 30
    while not await look():
        assert asyncio.get_running_loop().time() < deadline, await layer.health()
        await asyncio.sleep(0.05)


# ---------------------------------------------------------------------- a queue that is full


async def test_while_the_queue_is_full_messages_are_found_and_afterwards_heard(
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
    # The sender, which hears nothing anyway, says it once as well, and the layer when it was over.
    assert len(events(caplog)) <= 3


async def test_with_a_full_queue_a_layer_closes_in_order(dsn: str) -> None:
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


async def test_flush_works_with_a_full_queue(dsn: str) -> None:
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


async def test_a_layer_that_begins_while_the_queue_is_full(
    dsn: str, caplog: pytest.LogCaptureFixture
) -> None:
    with full_queue(dsn):
        async with open_layer(dsn, **BEATING) as layer, open_layer(dsn, **BEATING) as sender:
            await exchange(layer, sender, 20)
            assert (await layer.health())["listener"] == "polling"
    assert len(falling_back(caplog)) == 1


# ---------------------------------------------------------------------- a server that knows none

# Stand-ins for what servers that speak PostgreSQL's protocol do; found before the real functions.
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
async def test_a_server_without_notifications_is_polled_until_it_has_them(
    migrated_dsn: str,
    observer: Observer,
    refuses: str,
    caplog: pytest.LogCaptureFixture,
    recovery: Recovery,
) -> None:
    observer.execute("CREATE SCHEMA refusing")
    observer.execute(refuses.encode())
    database = sql.Identifier(observer.info.dbname)
    observer.execute(
        sql.SQL("ALTER DATABASE {} SET search_path = refusing, pg_catalog, public").format(database)
    )
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
