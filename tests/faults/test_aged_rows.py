"""A sweeper after a day without one: it catches up in batches, and does not disturb the traffic."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pg_layer import PostgresChannelLayer
from tests.conftest import MakeLayer, Observer
from tests.integration.test_sweeper import steady
from tests.processes import Link, Processes, listen, open_layer, receive, until
from tests.project.commands import manage, succeeded

MESSAGES, MEMBERSHIPS, CLIENTS = 100_000, 5_000, 2_000

# Statements that wait longer for a lock fail: a sweep must not hold locks that traffic needs.
LOCKS = "-c lock_timeout=1s -c deadlock_timeout=100ms"
OPTIONS: dict[str, object] = {"capacity": 100_000, "sweep_interval": 0, "expiry": 600}


def age(observer: Observer, address: str) -> None:
    """Write the rows of a day without a sweeper: of ended clients, a live one, and groups."""
    observer.execute("ALTER TABLE pg_layer_message SET (autovacuum_enabled = false)")
    observer.execute(
        "INSERT INTO pg_layer_client (address, expires_at, lease, ended_at)"
        " SELECT 'asgi!' || name || n, clock_timestamp() - interval '25 hours', 60,"
        " CASE name WHEN 'closed' THEN clock_timestamp() - interval '25 hours' END"
        " FROM unnest(ARRAY['dead', 'closed']) AS name,"
        f" generate_series(1, {CLIENTS}) AS n".encode()
    )
    observer.execute(
        "INSERT INTO pg_layer_message (address, xid, boot, channel, payload, expires_at)"
        " SELECT CASE n %% 4 WHEN 0 THEN 'asgi!dead' || n / 4 %% %s + 1 WHEN 1 THEN 'asgi!:jobs'"
        "  WHEN 2 THEN 'asgi!@room' ELSE %s END,"
        " pg_current_xact_id(), pg_layer_current_boot(),"
        " CASE n %% 4 WHEN 0 THEN 'old.!1' WHEN 1 THEN 'jobs' WHEN 3 THEN 'old.!1' END, '\\x80',"
        " clock_timestamp() - interval '1 day'"
        " FROM generate_series(1, %s) AS n",
        (CLIENTS, address, MESSAGES),
    )
    # Rows of ended owners; requests about channels of the live one and about normal channels.
    observer.execute(
        "INSERT INTO pg_layer_membership (group_name, address, channel, id, expires_at)"
        " SELECT CASE n %% 2 WHEN 0 THEN 'room' ELSE 'room' || n END,"
        "  CASE n %% 3 WHEN 0 THEN %s WHEN 1 THEN 'asgi!:old.jobs' || n ELSE 'asgi!dead' ||"
        " n %% %s + 1 END,"
        "  CASE n %% 3 WHEN 1 THEN 'old.jobs' ELSE 'old.dead!' END || n,"
        "  CASE n %% 3 WHEN 2 THEN 0 ELSE n END,"
        "  CASE n %% 3 WHEN 2 THEN 'infinity' ELSE clock_timestamp() - interval '1 day' END"
        " FROM generate_series(1, %s) AS n",
        (address, CLIENTS, MEMBERSHIPS),
    )
    steady(observer)


async def member(link: Link, dsn: str) -> tuple[list[object], list[object]]:
    """Join the room. Return the messages of the own channel and the jobs, up to the end."""
    async with open_layer(dsn, **OPTIONS) as layer:
        channel = await layer.new_channel()
        await listen(layer)
        await layer.group_add("room", channel)

        async def numbers(name: str) -> list[object]:
            found: list[object] = []
            while (number := (await receive(layer, name)).get("number", "expired")) is not None:
                found.append(number)
            return found

        jobs = asyncio.create_task(numbers("jobs"))
        link.say(channel)
        own = await numbers(channel)
        await layer.send("jobs", {"number": None})
        return own, await jobs


class Traffic:
    def __init__(self, layer: PostgresChannelLayer, channel: str) -> None:
        self._layer = layer
        self._channel = channel
        self.sent = 0
        self.slowest = 0.0

    async def one(self) -> None:
        message = {"number": self.sent}
        start = time.monotonic()
        await self._layer.group_send("room", message)
        await self._layer.send("jobs", message)
        # Change rows of the table in which the sweep deletes.
        await self._layer.group_add(f"room{self.sent % 20}", self._channel)
        await self._layer.group_discard(f"room{(self.sent - 5) % 20}", self._channel)
        self.slowest = max(self.slowest, time.monotonic() - start)
        self.sent += 1


@asynccontextmanager
async def flowing(traffic: Traffic) -> AsyncIterator[None]:
    stop = asyncio.Event()

    async def run() -> None:
        while not stop.is_set():
            await traffic.one()

    running = asyncio.create_task(run())
    try:
        yield
    finally:
        stop.set()
        await running


async def blocked(dsn: str, is_over: asyncio.Event) -> int:
    """Count how often a statement of the layer is seen waiting for a lock."""
    seen = 0
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as watcher:
        while not is_over.is_set():
            cursor = await watcher.execute(
                "SELECT count(*), pg_sleep(0.005)::text FROM pg_stat_activity"
                " WHERE datname = current_database() AND wait_event_type = 'Lock'"
                " AND wait_event IN ('relation', 'tuple', 'transactionid')"
            )
            row = await cursor.fetchone()
            assert row is not None
            seen += row[0]
    return seen


@pytest.mark.parametrize("old_snapshot", [False, True], ids=["", "beside an old snapshot"])
async def test_sweeper_after_a_day_beside_traffic_removes_old_rows(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    observer: Observer,
    old_snapshot: bool,
) -> None:
    impatient = make_conninfo(migrated_dsn, options=LOCKS)
    layer = make_layer(dsn=impatient, **OPTIONS)
    await listen(layer)  # the first renewal of a client also deletes expired messages
    reader = processes.start(member, impatient)
    channel = await reader.hear()
    [(address,)] = observer.execute("SELECT pg_layer_address('asgi', %s)", (channel,)).fetchall()
    age(observer, address)
    traffic = Traffic(layer, await layer.new_channel())
    with psycopg.connect(migrated_dsn) as holder:
        if old_snapshot:
            holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            holder.execute("SELECT FROM pg_layer_message LIMIT 1")
        is_over = asyncio.Event()
        watching = asyncio.create_task(blocked(migrated_dsn, is_over))
        async with flowing(traffic):
            await until(lambda: traffic.sent >= 20)
            before = traffic.sent
            command = await asyncio.to_thread(manage, migrated_dsn, "pg_layer_sweep", "--once")
            assert traffic.sent > before
        is_over.set()
        # The queries are short: a statement that is seen waiting twice in a row does wait.
        assert await watching <= 1
    await layer.send(channel, {"number": None})
    own, jobs = await reader.result()
    assert own == jobs == list(range(traffic.sent))
    removed = succeeded(command).split()
    assert (int(removed[1]), int(removed[3]), int(removed[5])) == (MESSAGES, MEMBERSHIPS, CLIENTS)
    assert observer.execute("SELECT * FROM pg_layer_sweepable('asgi')").fetchone() == (0, 0, 0)
    assert (
        observer.execute("SELECT FROM pg_layer_membership WHERE channel LIKE 'old.%'").fetchall()
        == []
    )
    dead = b"SELECT count(swept_at), count(*) FROM pg_layer_client WHERE address LIKE 'asgi!dead%'"
    assert observer.execute(dead).fetchone() == (CLIENTS, CLIENTS)


async def test_old_rows_before_a_sweep_are_not_delivered(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, observer: Observer
) -> None:
    layer = make_layer(**OPTIONS)
    await listen(layer)
    reader = processes.start(member, migrated_dsn)
    channel = await reader.hear()
    [(address,)] = observer.execute("SELECT pg_layer_address('asgi', %s)", (channel,)).fetchall()
    age(observer, address)
    # Announce the old rows again: the cursors of the readers check all of them.
    observer.execute(
        "SELECT pg_notify(pg_layer_notification_channel(address), CASE address"
        " WHEN 'asgi!:jobs' THEN 'J ' || min(id)"
        " ELSE concat_ws(' ', 'R', boot, xid,"
        " CASE address WHEN 'asgi!@room' THEN '@room' ELSE '.' END,"
        "  min(id), max(id)) END)"
        " FROM pg_layer_message WHERE address IN ('asgi!:jobs', 'asgi!@room', %s)"
        " GROUP BY address, boot, xid",
        (address,),
    )
    traffic = Traffic(layer, await layer.new_channel())
    for _ in range(100):
        await traffic.one()
    await layer.send(channel, {"number": None})
    own, jobs = await reader.result()
    assert own == jobs == list(range(traffic.sent))


def test_sweep_batch_continues_where_the_last_one_ended(
    migrated_dsn: str, observer: Observer
) -> None:
    """Under an old snapshot deleted rows stay. A batch must not read rows of earlier batches."""
    observer.execute("ALTER TABLE pg_layer_message SET (autovacuum_enabled = false)")

    def pages(messages: int) -> int:
        """Return the number of pages that a sweep in small batches reads."""
        observer.execute("TRUNCATE pg_layer_message")
        observer.execute(
            "INSERT INTO pg_layer_message (address, xid, boot, channel, payload, expires_at)"
            " SELECT 'asgi!:jobs', pg_current_xact_id(), 0, 'jobs', '\\x80', clock_timestamp()"
            " FROM generate_series(1, %s) AS n",
            (messages,),
        )
        with psycopg.connect(migrated_dsn) as holder:
            holder.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            holder.execute("SELECT FROM pg_layer_client")
            before = _looked_at(observer)
            swept = succeeded(manage(migrated_dsn, "pg_layer_sweep", "--once", "--batch-size", "5"))
            assert swept.split()[1] == str(messages)
            return _looked_at(observer) - before

    few, many = pages(3_000), pages(9_000)
    assert many < 1.2 * 3 * few


def _looked_at(observer: Observer) -> int:
    """Return the pages of the message table and its indexes that were read so far."""
    observer.execute("SELECT pg_stat_force_next_flush()")
    [(blocks,)] = observer.execute(
        "SELECT heap_blks_hit + heap_blks_read + idx_blks_hit + idx_blks_read"
        " FROM pg_statio_user_tables WHERE relname = 'pg_layer_message'"
    ).fetchall()
    return int(blocks)
