"""A catch-up that brings more rows, or hears more announcements, than it takes at once."""

from __future__ import annotations

import asyncio
import json
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
    """What a layer's statements pass, its LISTEN connection excepted."""
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
    home = layer._loops.home
    assert home is not None
    assert home.owner is not None
    return home.owner


async def hear_all(layer: PostgresChannelLayer) -> None:
    """Return when the layer listens, and no catch-up is under way."""
    await listen(layer)
    await until(lambda: not owner_of(layer).receiver.is_in_doubt)


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
    """Kill the connection that listens. Return when there is another one, and a catch-up is asked for."""
    before = layer.stats()["reconnects"]
    kill_listener(observer)
    await until(lambda: layer.stats()["reconnects"] > before)


# ---------------------------------------------------------------------- more rows than it may append


@pytest.mark.usefixtures("small_parts")
@pytest.mark.parametrize("connections", [1, 4])
@pytest.mark.parametrize("is_disturbed", [False, True])
def test_catch_up_with_group_adds_among_more_rows_than_the_queue_takes_brings_all_in_order(
    migrated_dsn: str, observer: Observer, connections: int, is_disturbed: bool
) -> None:
    """While no loop receives, another process sends, adds the channel to two groups, and sends to all.

    The catch-up of the next loop waits for dispatch, which waits for the groups' rows. These take their
    places between rows that the catch-up has not appended yet. ``is_disturbed``: meanwhile the connection
    that listens is killed, again and again.
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
async def test_catch_up_beside_announced_rows_that_are_not_read_yet_makes_progress(
    migrated_dsn: str,
    make_layer: MakeLayer,
    pool_proxy: Proxy,
    observer: Observer,
    connections: int,
) -> None:
    """30 large messages are announced, and wait for a read. A catch-up that brings 100 more comes between.

    Dispatch waits for the reads: with a single connection the catch-up must not wait for dispatch.
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


# ---------------------------------------------------------------------- more announcements than are kept


async def test_catch_up_during_which_more_is_announced_than_is_kept_aside_loses_and_doubles_nothing(
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
    # Nothing else is left to come.
    await sender.send(channel, number(-1))
    assert await received(layer, channel, 1) == [-1]


async def test_first_member_of_a_group_receives_more_than_its_capacity_sent_since(
    migrated_dsn: str, make_layer: MakeLayer
) -> None:
    """Another process adds the member and sends, before this one has heard of either."""
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


async def test_first_member_of_a_group_receives_what_one_transaction_sent_to_two_groups_in_its_order(
    migrated_dsn: str, make_layer: MakeLayer, pool_proxy: Proxy
) -> None:
    """The transaction drew its ids before another message, and is announced after it.

    Another process has added the channel to the second group, and this one could not listen to it yet.
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


async def test_first_member_of_a_group_receives_marked_messages_that_a_look_meets_while_it_is_added(
    migrated_dsn: str, make_layer: MakeLayer, pool_proxy: Proxy, observer: Observer
) -> None:
    """The join waits for a ping. Behind it waits a discard that was sent after the message."""
    with Proxy(migrated_dsn) as listen_proxy:
        layer = make_layer(
            dsn=pool_proxy.dsn(connect_timeout=2),
            listen_dsn=listen_proxy.dsn(),
            send_timeout=60,
            heartbeat=0.1,
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
        while cursor.look is None or not cursor.look.sees(*row):
            await owner.lease.renew(None, 30)
        await owner.receiver.look_for_marked()
        listen_proxy.let_go()
        assert await received(layer, channel, 2) == [0, 1]
