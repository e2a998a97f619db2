"""Regressions: moments at which messages were once lost, received twice or delayed."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from pg_layer import LayerUnavailable, PostgresChannelLayer
from pg_layer._db.queries import receive as queries
from pg_layer._messages.rows import Row
from pg_layer._state.channel_queue import ChannelQueue, QueuedMessage
from tests.conftest import MakeLayer
from tests.processes import terminate_backends

MIGRATIONS = Path(__file__).parents[2] / "migrations"
TIMEOUT = 20.0


async def new_listening_channel(layer: PostgresChannelLayer) -> str:
    """Return a new channel of the layer, after its listener has heard a message."""
    channel = await layer.new_channel()
    await layer.send(channel, {"type": "begin"})
    await asyncio.wait_for(layer.receive(channel), TIMEOUT)
    return channel


async def receive_numbers(layer: PostgresChannelLayer, channel: str, count: int) -> list[int]:
    """Receive ``count`` messages from the channel. Return their numbers."""
    return [(await asyncio.wait_for(layer.receive(channel), TIMEOUT))["n"] for _ in range(count)]


async def test_calls_cancelled_at_random_moments_leave_the_pool_usable(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer(capacity=10**6)
    channel = await new_listening_channel(layer)
    receiving = asyncio.create_task(layer.receive("jobs"))
    rng = random.Random(5)
    calls = [
        lambda: layer.send("many", {"n": 1}),
        lambda: layer.group_send("room", {"n": 1}),
        lambda: layer.group_add("room", channel),
        lambda: layer.send(channel, {"n": 1}),
        layer.flush,
    ]

    async def caller(index: int) -> None:
        for _ in range(150):
            task = asyncio.create_task(calls[index]())
            for _ in range(rng.randrange(12)):
                await asyncio.sleep(0)
            if rng.random() < 0.6:
                task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()

    await asyncio.gather(*(caller(index) for index in range(len(calls))))
    # Run as many statements at once as the pool has connections, several times.
    for _ in range(5):
        await asyncio.gather(
            layer.send("a", {}), layer.group_send("b", {}), layer.group_add("c", channel)
        )
    receiving.cancel()


async def test_close_while_a_job_is_handed_over_does_not_release_the_job(
    make_layer: MakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer begins to close while it puts a claimed job into the channel queue.

    ``receive()`` then either returns the job, or another process receives it. Never both.
    """
    worker, other = make_layer(), make_layer()
    await new_listening_channel(worker)
    receiving = asyncio.create_task(worker.receive("jobs"))
    closing: list[asyncio.Task[None]] = []
    put = ChannelQueue.put

    def put_and_close(self: ChannelQueue, message: QueuedMessage) -> None:
        if self.channel == "jobs" and not closing:
            # This task runs before the receiver that put() wakes.
            closing.append(asyncio.ensure_future(worker.close()))
        put(self, message)

    monkeypatch.setattr(ChannelQueue, "put", put_and_close)
    await other.send("jobs", {"n": 1})
    done, _ = await asyncio.wait({receiving}, timeout=TIMEOUT)
    await closing[0]
    await other.send("jobs", {"n": 2})
    next_numbers = (
        await receive_numbers(other, "jobs", 1) if done and receiving.result() == {"n": 1} else [2]
    )
    assert next_numbers == [2]
    receiving.cancel()


@pytest.mark.parametrize("is_flushed", [False, True])
async def test_tables_truncated_memberships_are_written_again_and_messages_arrive(
    migrated_dsn: str, make_layer: MakeLayer, is_flushed: bool
) -> None:
    layer, sender = make_layer(lease=2, heartbeat=0.1), make_layer()
    channel = await new_listening_channel(layer)
    for number in range(50):
        await sender.send("elsewhere", {"n": number})
    if is_flushed:
        await layer.flush()
    await layer.group_add("room", channel)
    with psycopg.connect(migrated_dsn) as conn:
        conn.execute(
            "TRUNCATE pg_layer_message, pg_layer_membership, pg_layer_client RESTART IDENTITY"
        )
    async with await psycopg.AsyncConnection.connect(migrated_dsn, autocommit=True) as observer:
        found = None
        while found != (1, ""):  # until a heartbeat has written the membership again
            cursor = await observer.execute(
                "SELECT count(*), pg_sleep(0.02)::text FROM pg_layer_membership"
            )
            found = await cursor.fetchone()
    for number in range(10):
        await sender.group_send("room", {"n": number})
    assert await receive_numbers(layer, channel, 10) == list(range(10))


async def test_claim_cancelled_and_not_answered_gives_the_job_to_another_process(
    make_layer: MakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, other = make_layer(), make_layer()
    await new_listening_channel(worker)
    claim = queries.claim
    receiving = asyncio.create_task(worker.receive("jobs"))

    async def claim_without_answer(*args: object, **options: object) -> list[Row]:
        rows = await claim(*args, **options)  # type: ignore[arg-type]
        if rows:
            monkeypatch.setattr(queries, "claim", claim)
            receiving.cancel()
            raise psycopg.OperationalError("The connection was lost after the commit.")
        return rows

    monkeypatch.setattr(queries, "claim", claim_without_answer)
    await other.send("jobs", {"n": 1})
    await asyncio.wait({receiving}, timeout=TIMEOUT)
    assert receiving.cancelled()
    assert await receive_numbers(other, "jobs", 1) == [1]


async def test_receive_waiting_during_close_raises_or_goes_on(
    make_layer: MakeLayer,
) -> None:
    """A receive on an own channel raises. A receive on a normal channel begins again."""
    layer = make_layer()
    own = await new_listening_channel(layer)
    on_jobs = asyncio.create_task(layer.receive("jobs"))
    on_own = asyncio.create_task(layer.receive(own))
    await asyncio.sleep(0)
    await layer.close()
    with pytest.raises(LayerUnavailable, match="closed"):
        await asyncio.wait_for(on_own, TIMEOUT)
    await layer.send("jobs", {"n": 1})
    assert await asyncio.wait_for(on_jobs, TIMEOUT) == {"n": 1}


async def test_sends_queued_for_an_absent_server_each_keep_their_own_timeout(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer(dsn="host=127.0.0.1 port=1 user=nobody", send_timeout=0.5)
    # Each message fills a batch. One after the other, the 80 timeouts would last twice TIMEOUT.
    message = {"b": b"x" * 1_100_000}
    calls = [layer.send(f"c{index}", message) for index in range(80)]
    outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), TIMEOUT)
    assert {type(outcome) for outcome in outcomes} == {LayerUnavailable}


@pytest.mark.parametrize("set_by", ["database", "role"])
async def test_layer_with_client_encoding_sql_ascii_delivers_utf8_text(
    migrated_dsn: str, make_layer: MakeLayer, set_by: str
) -> None:
    name = sql.Identifier(str(conninfo_to_dict(migrated_dsn)["dbname"]))
    with psycopg.connect(migrated_dsn) as conn:
        if set_by == "database":
            conn.execute(
                sql.SQL("ALTER DATABASE {} SET client_encoding = 'SQL_ASCII'").format(name)
            )
        dsn = (
            make_conninfo(migrated_dsn, client_encoding="SQL_ASCII")
            if set_by == "role"
            else migrated_dsn
        )
    layer = make_layer(dsn=dsn)
    channel = await new_listening_channel(layer)
    await layer.send(channel, {"n": 1, "text": "grüße"})
    assert await asyncio.wait_for(layer.receive(channel), TIMEOUT) == {"n": 1, "text": "grüße"}


async def test_connection_lost_leaves_no_closed_socket_in_the_event_loop(
    migrated_dsn: str, make_layer: MakeLayer
) -> None:
    layer = make_layer(dsn=make_conninfo(migrated_dsn, application_name="to be killed"))
    channel = await new_listening_channel(layer)
    loop = asyncio.get_running_loop()
    for number in range(3):
        with psycopg.connect(migrated_dsn, autocommit=True) as conn:
            terminate_backends(conn, "application_name = 'to be killed'")
        await asyncio.sleep(0)
        watched = set(loop._selector.get_map())  # type: ignore[attr-defined]
        assert watched <= {int(name) for name in os.listdir("/proc/self/fd")}
        await layer.send(channel, {"n": number})
        assert await receive_numbers(layer, channel, 1) == [number]


async def test_close_without_a_database_wakes_a_waiting_receive() -> None:
    layer = PostgresChannelLayer(dsn="postgresql://nobody@127.0.0.1:1/none")
    waiting = asyncio.create_task(layer.receive(await layer.new_channel()))
    await asyncio.sleep(0)
    await asyncio.wait_for(layer.close(), TIMEOUT)
    with pytest.raises(LayerUnavailable):
        await asyncio.wait_for(waiting, TIMEOUT)


async def test_delete_with_the_key_of_an_earlier_boot_deletes_nothing(
    make_layer: MakeLayer, migrated_dsn: str
) -> None:
    """After a crash, PostgreSQL can give out ids and transaction ids again.

    A process may still delete a message that it received before the crash. The boot in the
    key protects the later row that has the same ids.
    """
    layer, sender = make_layer(), make_layer()
    channel = await layer.new_channel()
    await sender.send(channel, {"n": 0})
    with psycopg.connect(migrated_dsn, autocommit=True) as conn:
        rows = conn.execute(
            "SELECT address, boot, xid::text::bigint, id FROM pg_layer_message"
        ).fetchall()
        [(address, boot, xid, id)] = rows
        delete = "SELECT pg_layer_delete(%s, ARRAY[%s], ARRAY[%s], ARRAY[%s])"
        conn.execute(delete, (address, boot - 1, xid, id))
        assert await receive_numbers(layer, channel, 1) == [0]
        await sender.send(channel, {"n": 1})
        rows = conn.execute(
            "SELECT address, boot, xid::text::bigint, id FROM pg_layer_message"
        ).fetchall()
        for row in rows:
            conn.execute(delete, row)
        assert conn.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (0,)
