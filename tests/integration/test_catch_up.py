"""Catch-ups with more rows or announcements than they take at once, and joins."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from psycopg import AsyncConnection
from psycopg.conninfo import make_conninfo

from pg_layer import PostgresChannelLayer
from pg_layer._receive import receiver
from pg_layer._runtime.owner import Owner
from tests.conftest import MakeLayer, Observer
from tests.faults.proxy import Proxy
from tests.processes import listen, new_layer, receive, until

READ_ROWS = "pg_layer._db.queries.receive.READ_ROWS"
MAX_ASIDE = "pg_layer._state.announcement_queue.MAX_ASIDE"


@pytest.fixture
def pool_proxy(migrated_dsn: str) -> Iterator[Proxy]:
    """A proxy for all connections of a layer but the one that listens."""
    with Proxy(migrated_dsn) as proxy:
        yield proxy


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A catch-up appends 10 rows at a time, and waits for dispatch when 20 are in the queue."""
    monkeypatch.setattr(READ_ROWS, 10)
    monkeypatch.setattr(receiver, "CATCH_UP_ROWS", 20)


def number(n: int, size: int = 0) -> dict[str, Any]:
    return {"type": "test", "number": n, "padding": bytes(size)}


async def received(layer: PostgresChannelLayer, channel: str, count: int) -> list[int]:
    return [(await receive(layer, channel))["number"] for _ in range(count)]


def owner_of(layer: PostgresChannelLayer) -> Owner:
    engine = layer._loops.main_engine
    assert engine is not None
    assert engine.owner is not None
    return engine.owner


async def hear_all(layer: PostgresChannelLayer) -> None:
    """Wait until the layer listens and no catch-up is running."""
    await listen(layer)
    await until(lambda: not owner_of(layer).receiver.is_catch_up_pending)


async def silently(dsn: str, group: str, n: int) -> None:
    """Send to a group without an announcement."""
    async with await AsyncConnection.connect(dsn) as connection:
        await connection.execute("SET pg_layer.silent = on")
        message = json.dumps({"type": "test", "number": n})
        await connection.execute("SELECT pg_layer_group_send(%s, %s::jsonb)", (group, message))


def kill_listener(observer: Observer) -> None:
    """Kill the connection that listens, if there is one."""
    observer.execute(
        "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = 'listener'"
    )


async def lose_listener(layer: PostgresChannelLayer, observer: Observer) -> None:
    """Kill the connection that listens. Wait for the next one, which requests a catch-up."""
    before = layer.stats()["reconnects"]
    kill_listener(observer)
    await until(lambda: layer.stats()["reconnects"] > before)


# ---------------------------------------------------------------- more rows than it may append


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("is_disturbed", [False, True])
def test_catch_up_group_adds_beyond_the_queue_limit_keep_the_order(
    migrated_dsn: str, observer: Observer, connections: int, is_disturbed: bool
) -> None:
    """The catch-up waits for dispatch, and dispatch waits for the rows of two joins.

    While no loop receives, another process sends, adds the channel to two groups, and sends
    to the groups and the channel. The rows of the groups take their places between rows that
    the catch-up has not appended yet.
    ``is_disturbed``: the connection that listens is killed again and again meanwhile.
    """
    layer = new_layer(
        make_conninfo(migrated_dsn, application_name="sender"),
        listen_dsn=make_conninfo(migrated_dsn, application_name="listener"),
        capacity=1000,
        pool_max_size=connections,
    )

    async def begin() -> str:
        await listen(layer)
        return await layer.new_channel()

    async def send() -> None:
        sender = new_layer(migrated_dsn, capacity=1000)
        for n in range(30):
            await sender.send(channel, number(n))
        for group in ("room", "hall"):
            await sender.group_add(group, channel)
        for n in range(30, 129, 3):
            await sender.group_send("room", number(n))
            await sender.send(channel, number(n + 1))
            await sender.group_send("hall", number(n + 2))
        await sender.close()

    async def end() -> list[int]:
        try:
            reading = asyncio.create_task(received(layer, channel, 129))
            while is_disturbed and not (await asyncio.wait({reading}, timeout=0.05))[0]:
                kill_listener(observer)
            return await reading
        finally:
            await layer.close()

    channel = asyncio.run(begin())
    asyncio.run(send())
    assert asyncio.run(end()) == list(range(129))


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("connections", [1, 2])
async def test_catch_up_beside_unread_announced_rows_makes_progress(
    migrated_dsn: str,
    make_layer: MakeLayer,
    pool_proxy: Proxy,
    observer: Observer,
    connections: int,
) -> None:
    """30 announced messages wait for a read when a catch-up begins that appends 100 more.

    Dispatch waits for the reads. So if the pool has a single connection, the catch-up must
    not wait for dispatch.
    """
    layer = make_layer(
        dsn=pool_proxy.dsn(connect_timeout=2),
        listen_dsn=make_conninfo(migrated_dsn, application_name="listener"),
        capacity=1000,
        send_timeout=60,
        pool_max_size=connections,
    )
    sender = make_layer(capacity=1000)
    channel = await layer.new_channel()
    await hear_all(layer)
    pool_proxy.swallow()
    for n in range(30):
        await sender.send(channel, number(n, 20_000))
    await until(lambda: layer.stats()["pending_announcements"] == 30)
    await lose_listener(layer, observer)
    for n in range(30, 130):
        await sender.send(channel, number(n))
    pool_proxy.let_go()
    assert await received(layer, channel, 130) == list(range(130))


# ---------------------------------------------------------------- more announcements than are kept


async def test_catch_up_more_announced_than_kept_aside_loses_and_doubles_nothing(
    migrated_dsn: str,
    make_layer: MakeLayer,
    pool_proxy: Proxy,
    observer: Observer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MAX_ASIDE, 5)
    layer = make_layer(
        dsn=pool_proxy.dsn(connect_timeout=2),
        listen_dsn=make_conninfo(migrated_dsn, application_name="listener"),
        capacity=1000,
        send_timeout=60,
    )
    sender = make_layer(capacity=1000)
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    announcements = layer._loops.client.announcements
    for start in range(0, 120, 40):
        await hear_all(layer)
        pool_proxy.swallow()
        await lose_listener(layer, observer)
        for n in range(start, start + 40, 2):
            await sender.send(channel, number(n, 20_000 * (n % 3 == 0)))
            await sender.group_send("room", number(n + 1, 20_000 * (n % 3 == 1)))
        await until(lambda: announcements.is_over_limit)
        pool_proxy.let_go()
        assert await received(layer, channel, 40) == list(range(start, start + 40))
    # No other message follows.
    await sender.send(channel, number(-1))
    assert await received(layer, channel, 1) == [-1]


async def test_join_more_rows_than_the_capacity_are_received(
    migrated_dsn: str, make_layer: MakeLayer
) -> None:
    """Another process adds the member and sends before this one has heard of either."""
    with Proxy(migrated_dsn) as proxy:
        layer = make_layer(dsn=proxy.dsn(), capacity=10)
        sender = make_layer()
        channel = await layer.new_channel()
        await hear_all(layer)
        reading = asyncio.create_task(received(layer, channel, 50))
        proxy.swallow()
        await sender.group_add("room", channel)
        await sender.group_send_many([("room", number(n)) for n in range(50)])
        proxy.let_go(revive=True)
        assert await reading == list(range(50))


async def test_join_rows_of_one_transaction_to_two_groups_keep_their_order(
    migrated_dsn: str, make_layer: MakeLayer, pool_proxy: Proxy
) -> None:
    """The transaction drew its ids before another message, and is announced after it.

    Another process has added the channel to the second group, to which this process does not
    listen yet.
    """
    layer = make_layer(
        dsn=pool_proxy.dsn(connect_timeout=2), listen_dsn=migrated_dsn, send_timeout=60
    )
    sender = make_layer()
    channel = await layer.new_channel()
    await layer.group_add("first", channel)
    await hear_all(layer)
    pool_proxy.swallow()
    before = layer.stats()["pending_announcements"]
    await sender.group_add("second", channel)
    async with await AsyncConnection.connect(migrated_dsn) as application:
        for n, group in enumerate(["first", "second", "second"]):
            message = json.dumps({"type": "test", "number": n})
            await application.execute("SELECT pg_layer_group_send(%s, %s::jsonb)", (group, message))
        await sender.send(channel, number(100))
    await sender.send(channel, number(101))
    await until(lambda: layer.stats()["pending_announcements"] >= before + 4)
    pool_proxy.let_go()
    assert await received(layer, channel, 5) == [100, 0, 1, 2, 101]


async def test_join_marked_rows_found_by_a_search_meanwhile_are_received(
    migrated_dsn: str, make_layer: MakeLayer, pool_proxy: Proxy, observer: Observer
) -> None:
    """The join waits for a ping, and a discard that was sent after the message waits for it."""
    with Proxy(migrated_dsn) as listen_proxy:
        layer = make_layer(
            dsn=pool_proxy.dsn(connect_timeout=2),
            listen_dsn=listen_proxy.dsn(),
            send_timeout=60,
            heartbeat=1,
        )
        sender = make_layer()
        channel = await layer.new_channel()
        await hear_all(layer)
        pool_proxy.swallow()
        await sender.group_add("room", channel)
        await silently(migrated_dsn, "room", 0)
        await sender.group_discard("room", channel)
        await sender.send(channel, number(1))
        await until(lambda: layer.stats()["pending_announcements"] >= 3)
        listen_proxy.swallow()
        pool_proxy.let_go()
        owner = owner_of(layer)
        cursor = layer._loops.client.cursor
        (row,) = observer.execute(
            "SELECT boot, xid::text::bigint FROM pg_layer_message WHERE address LIKE '%@room'"
        )
        while cursor.overdue is None or not cursor.overdue.sees(*row):
            await owner.lease.renew(None, 30)
        await owner.receiver.search_marked()
        listen_proxy.let_go()
        assert await received(layer, channel, 2) == [0, 1]


async def test_search_marked_announcements_on_their_way_are_heard_first(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer
) -> None:
    """The process has not read its notifications for two heartbeats.

    Meanwhile a transaction has written a message, another sender has sent one, and then the
    transaction's message was announced. That is the order in the other processes.
    """
    with Proxy(migrated_dsn) as listen_proxy:
        layer = make_layer(listen_dsn=listen_proxy.dsn(), heartbeat=600, lease=2000)
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        await hear_all(layer)
        listen_proxy.swallow()
        await silently(migrated_dsn, "room", 0)
        await make_layer().group_send("room", number(1))
        observer.execute(
            "SELECT pg_layer_announce_marked(ARRAY[boot], ARRAY[xid::text::bigint], ARRAY[id],"
            " ARRAY[address], ARRAY[channel], ARRAY[kind], ARRAY[excluded], ARRAY[payload])"
            " FROM pg_layer_message WHERE marked"
        )
        owner = owner_of(layer)
        for _ in range(2):
            owner.lease._heartbeat_at = -math.inf  # a heartbeat has passed
            await owner.lease.renew(None, 30)
        searching = asyncio.create_task(owner.receiver.search_marked())
        await until(lambda: searching.done() or len(owner.receiver._pings) > 0)
        listen_proxy.let_go()
        await searching
        assert await received(layer, channel, 2) == [1, 0]
