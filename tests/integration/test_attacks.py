"""Moments at which messages were once lost, received twice or held up."""

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

MIGRATIONS = Path(__file__).parents[2] / "migrations"
PATIENCE = 20.0


async def listening(layer: PostgresChannelLayer) -> str:
    """A channel of a layer whose listener is known to hear."""
    channel = await layer.new_channel()
    await layer.send(channel, {"type": "begin"})
    await asyncio.wait_for(layer.receive(channel), PATIENCE)
    return channel


async def numbers(layer: PostgresChannelLayer, channel: str, count: int) -> list[int]:
    return [(await asyncio.wait_for(layer.receive(channel), PATIENCE))["n"] for _ in range(count)]


async def test_cancelled_calls_leave_the_pool_whole(make_layer: MakeLayer) -> None:
    layer = make_layer(capacity=10**6)
    channel = await listening(layer)
    receiving = asyncio.create_task(layer.receive("jobs"))
    chance = random.Random(5)
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
            for _ in range(chance.randrange(12)):
                await asyncio.sleep(0)
            if chance.random() < 0.6:
                task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()

    await asyncio.gather(*(caller(index) for index in range(len(calls))))
    # As many statements at once as there are connections, several times.
    for _ in range(5):
        await asyncio.gather(
            layer.send("a", {}), layer.group_send("b", {}), layer.group_add("c", channel)
        )
    receiving.cancel()


async def test_a_job_that_is_handed_over_while_the_layer_closes_is_not_put_back(
    make_layer: MakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, other = make_layer(), make_layer()
    await listening(worker)
    receiving = asyncio.create_task(worker.receive("jobs"))
    closing: list[asyncio.Task[None]] = []
    put = ChannelQueue.put

    def put_as_it_closes(self: ChannelQueue, message: QueuedMessage) -> None:
        if self.channel == "jobs" and not closing:
            closing.append(
                asyncio.ensure_future(worker.close())
            )  # runs before the receiver that is woken
        put(self, message)

    monkeypatch.setattr(ChannelQueue, "put", put_as_it_closes)
    await other.send("jobs", {"n": 1})
    done, _ = await asyncio.wait({receiving}, timeout=PATIENCE)
    await closing[0]
    await other.send("jobs", {"n": 2})
    again = await numbers(other, "jobs", 1) if done and receiving.result() == {"n": 1} else [2]
    assert again == [2]
    receiving.cancel()


@pytest.mark.parametrize("is_flushed", [False, True])
async def test_tables_that_were_emptied_are_written_again_and_messages_arrive(
    migrated_dsn: str, make_layer: MakeLayer, is_flushed: bool
) -> None:
    layer, sender = make_layer(lease=2, heartbeat=0.1), make_layer()
    channel = await listening(layer)
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
        while found != (1, ""):  # until a heartbeat has put the membership back
            cursor = await observer.execute(
                "SELECT count(*), pg_sleep(0.02)::text FROM pg_layer_membership"
            )
            found = await cursor.fetchone()
    for number in range(10):
        await sender.group_send("room", {"n": number})
    assert await numbers(layer, channel, 10) == list(range(10))


async def test_job_whose_claim_was_not_answered_goes_to_another_process(
    make_layer: MakeLayer, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker, other = make_layer(), make_layer()
    await listening(worker)
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
    await asyncio.wait({receiving}, timeout=PATIENCE)
    assert receiving.cancelled()
    assert await numbers(other, "jobs", 1) == [1]


async def test_a_receive_that_waits_while_the_layer_closes_goes_on_or_says_so(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer()
    own = await listening(layer)
    at_work = asyncio.create_task(layer.receive("jobs"))
    on_own = asyncio.create_task(layer.receive(own))
    await asyncio.sleep(0)
    await layer.close()
    with pytest.raises(LayerUnavailable, match="closed"):
        await asyncio.wait_for(on_own, PATIENCE)
    await layer.send("jobs", {"n": 1})
    assert await asyncio.wait_for(at_work, PATIENCE) == {"n": 1}


async def test_each_call_has_its_own_timeout(make_layer: MakeLayer) -> None:
    layer = make_layer(dsn="host=127.0.0.1 port=1 user=nobody", send_timeout=0.5)
    message = {
        "b": b"x" * 1_100_000
    }  # fills a batch: one after the other these would take twice the patience
    calls = [layer.send(f"c{index}", message) for index in range(80)]
    outcomes = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), PATIENCE)
    assert {type(outcome) for outcome in outcomes} == {LayerUnavailable}


@pytest.mark.parametrize("how", ["database", "role"])
async def test_any_encoding_of_the_client_will_do(
    migrated_dsn: str, make_layer: MakeLayer, how: str
) -> None:
    name = sql.Identifier(str(conninfo_to_dict(migrated_dsn)["dbname"]))
    with psycopg.connect(migrated_dsn) as conn:
        if how == "database":
            conn.execute(
                sql.SQL("ALTER DATABASE {} SET client_encoding = 'SQL_ASCII'").format(name)
            )
        dsn = (
            make_conninfo(migrated_dsn, client_encoding="SQL_ASCII")
            if how == "role"
            else migrated_dsn
        )
    layer = make_layer(dsn=dsn)
    channel = await listening(layer)
    await layer.send(channel, {"n": 1, "text": "grüße"})
    assert await asyncio.wait_for(layer.receive(channel), PATIENCE) == {"n": 1, "text": "grüße"}


async def test_a_lost_connection_leaves_nothing_in_the_event_loop(
    migrated_dsn: str, make_layer: MakeLayer
) -> None:
    layer = make_layer(dsn=make_conninfo(migrated_dsn, application_name="to be killed"))
    channel = await listening(layer)
    loop = asyncio.get_running_loop()
    for number in range(3):
        with psycopg.connect(migrated_dsn, autocommit=True) as conn:
            conn.execute(
                "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                " WHERE application_name = 'to be killed'"
            )
        await asyncio.sleep(0)
        watched = set(loop._selector.get_map())  # type: ignore[attr-defined]
        assert watched <= {int(name) for name in os.listdir("/proc/self/fd")}
        await layer.send(channel, {"n": number})
        assert await numbers(layer, channel, 1) == [number]


async def test_closing_a_layer_that_never_reached_its_database_wakes_who_waits() -> None:
    layer = PostgresChannelLayer(dsn="postgresql://nobody@127.0.0.1:1/none")
    waiting = asyncio.create_task(layer.receive(await layer.new_channel()))
    await asyncio.sleep(0)
    await asyncio.wait_for(layer.close(), PATIENCE)
    with pytest.raises(LayerUnavailable):
        await asyncio.wait_for(waiting, PATIENCE)


async def test_a_later_row_with_the_ids_of_one_that_a_crash_lost_is_not_deleted(
    make_layer: MakeLayer, migrated_dsn: str
) -> None:
    """A crash hands out ids and transaction ids again; a process still deletes what it received before."""
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
        assert await numbers(layer, channel, 1) == [0]
        await sender.send(channel, {"n": 1})
        rows = conn.execute(
            "SELECT address, boot, xid::text::bigint, id FROM pg_layer_message"
        ).fetchall()
        for row in rows:
            conn.execute(delete, row)
        assert conn.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (0,)
