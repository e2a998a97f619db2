"""A transaction that is held open elsewhere: dead rows stay as long as it does, and no longer.

What it costs in time is measured by `python -m benchmarks.old_snapshot`.
"""

from __future__ import annotations

import asyncio

import psycopg

from pg_layer import PostgresChannelLayer
from tests.conftest import MakeLayer, Observer
from tests.processes import listen, receive, until

MESSAGES = 3000


async def talk(layer: PostgresChannelLayer, sender: PostgresChannelLayer, channel: str) -> None:
    """Messages go through one inbox, some hundred at a time, and arrive in order."""
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


async def vacuumed(observer: Observer) -> None:
    """As autovacuum does it, once all rows are deleted."""
    await until(lambda: observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (0,))
    observer.execute("VACUUM pg_layer_message")


async def test_dead_rows_pile_up_for_as_long_as_an_old_snapshot_and_no_longer(
    make_layer: MakeLayer, migrated_dsn: str, observer: Observer
) -> None:
    layer, sender = make_layer(capacity=1000), make_layer(capacity=1000)
    await listen(layer)
    channel = await layer.new_channel()
    with psycopg.connect(migrated_dsn) as old:
        old.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        old.execute("SELECT 1 FROM pg_layer_client")
        await talk(layer, sender, channel)
        await vacuumed(observer)  # to no avail
        held = pages(observer)
        await talk(layer, sender, channel)
        # The bound is what is sent while the snapshot lasts: a row each, and its place in the index.
        most = pages(observer)
        assert held < most <= 2 * held + 10
    # It is over: the space is used again, and more than that is not needed, however much is sent.
    for _ in range(4):
        await vacuumed(observer)
        await talk(layer, sender, channel)
        assert pages(observer) < most
