"""An old snapshot of another transaction: dead rows stay as long, and no statement reads them.

`python -m benchmarks.old_snapshot` measures the cost in time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pg_layer import PostgresChannelLayer
from tests.conftest import MakeLayer, Observer
from tests.faults.readers import heartbeats
from tests.processes import listen, receive, until

MESSAGES = 3000
BEATS = 3
ROUNDS = 6
# The index entries that all heartbeats and catch-ups together may read. Some determine where the
# next ones begin.
FEW = 3 * MESSAGES


@contextmanager
def old_snapshot(dsn: str) -> Iterator[None]:
    """Hold a snapshot that needs all existing rows, and all rows written in the block."""
    with psycopg.connect(dsn) as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT 1 FROM pg_layer_client")
        yield


async def talk(layer: PostgresChannelLayer, sender: PostgresChannelLayer, channel: str) -> None:
    """Send and receive messages through one channel in rounds. They arrive in order."""
    for start in range(0, MESSAGES, 300):
        numbers = list(range(start, start + 300))
        await asyncio.gather(*(sender.send(channel, {"n": n}) for n in numbers))
        assert [(await receive(layer, channel))["n"] for _ in numbers] == numbers


def pages(observer: Observer) -> int:
    row = observer.execute(
        "SELECT pg_relation_size('pg_layer_message') + pg_indexes_size('pg_layer_message')"
    ).fetchone()
    assert row is not None
    return int(row[0]) // 8192


async def emptied(observer: Observer) -> None:
    """Return when all rows are deleted."""
    await until(
        lambda: observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (0,)
    )


async def closed(layer: PostgresChannelLayer, observer: Observer, name: str) -> None:
    """Close a layer. Return when its connections have reported the rows that they have read."""
    await layer.close()
    connections = "SELECT FROM pg_stat_activity WHERE application_name = %s"
    await until(lambda: observer.execute(connections, (name,)).fetchone() is None)


async def vacuumed(observer: Observer) -> None:
    """Vacuum the table once all rows are deleted, as autovacuum does."""
    await emptied(observer)
    observer.execute("VACUUM pg_layer_message")


async def test_dead_rows_stay_only_as_long_as_an_old_snapshot(
    make_layer: MakeLayer, migrated_dsn: str, observer: Observer
) -> None:
    layer, sender = make_layer(capacity=1000), make_layer(capacity=1000)
    await listen(layer)
    channel = await layer.new_channel()
    with old_snapshot(migrated_dsn):
        await talk(layer, sender, channel)
        await vacuumed(observer)  # it removes nothing
        held = pages(observer)
        await talk(layer, sender, channel)
        # The bound is one row, and its index entry, for each message sent during the snapshot.
        most = pages(observer)
        assert held < most <= 2 * held + 10
    # After the snapshot the space is used again, and the table does not grow further.
    for _ in range(4):
        await vacuumed(observer)
        await talk(layer, sender, channel)
        assert pages(observer) < most


class Reconnected:
    """The connections of a layer, which report the rows that they have read when they end."""

    def __init__(self, layer: PostgresChannelLayer, observer: Observer, name: str) -> None:
        self._layer = layer
        self._observer = observer
        self._name = name

    async def now(self) -> int:
        """End all connections. Return the index entries of messages that were read so far.

        The layer has connected again, and has caught up.
        """
        reconnects = self._layer.stats()["reconnects"]
        self._observer.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE application_name = %s",
            (self._name,),
        )
        self._observer.execute("SELECT pg_stat_clear_snapshot()")
        [(read,)] = self._observer.execute(
            "SELECT sum(idx_tup_read)::bigint FROM pg_stat_user_indexes"
            " WHERE relname = 'pg_layer_message'"
        ).fetchall()
        await until(lambda: self._layer.stats()["reconnects"] > reconnects)
        # The first heartbeat may precede the end of the catch-up; this message follows it.
        await listen(self._layer)
        return int(read)


@pytest.mark.parametrize(
    "is_analyzed", [False, True], ids=["no statistics", "statistics of empty tables"]
)
async def test_heartbeats_and_catch_ups_read_no_dead_rows(
    make_layer: MakeLayer, migrated_dsn: str, observer: Observer, is_analyzed: bool
) -> None:
    """Messages were received and deleted. The process reconnects and catches up several times."""
    named = make_conninfo(migrated_dsn, application_name="layer")
    options: dict[str, object] = {"capacity": 1000, "lease": 60, "heartbeat": 0.3}
    layer = make_layer(dsn=named, **options)
    sender = make_layer(
        dsn=make_conninfo(migrated_dsn, application_name="sender"), capacity=1000, expiry=3600
    )
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await listen(layer)
    connections = Reconnected(layer, observer, "layer")
    with old_snapshot(migrated_dsn):
        await talk(layer, sender, channel)
        await emptied(observer)
        await closed(sender, observer, "sender")
        if is_analyzed:
            observer.execute("ANALYZE")
        await heartbeats(layer, BEATS)
        await connections.now()
        await heartbeats(layer, BEATS)
        before = await connections.now()
        for _ in range(ROUNDS):
            await heartbeats(layer, BEATS)
            after = await connections.now()
        assert after - before < FEW


async def test_heartbeats_and_catch_ups_read_no_received_group_messages(
    make_layer: MakeLayer, migrated_dsn: str, observer: Observer
) -> None:
    """Group messages stay until they expire. Earlier ones are not read again."""
    named = make_conninfo(migrated_dsn, application_name="layer")
    layer = make_layer(dsn=named, capacity=1000, lease=60, heartbeat=0.3)
    sender = make_layer(dsn=make_conninfo(migrated_dsn, application_name="sender"), expiry=3600)
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await listen(layer)
    connections = Reconnected(layer, observer, "layer")
    for start in range(0, MESSAGES, 300):
        numbers = list(range(start, start + 300))
        await sender.group_send_many([("room", {"n": n}) for n in numbers])
        assert [(await receive(layer, channel))["n"] for _ in numbers] == numbers
    await closed(sender, observer, "sender")
    await heartbeats(layer, BEATS)
    await connections.now()
    before = await connections.now()
    for _ in range(ROUNDS):
        await heartbeats(layer, BEATS)
        after = await connections.now()
    assert after - before < FEW
