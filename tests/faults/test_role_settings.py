"""Settings of a role or a database that would end or hinder the layer's sessions."""

from __future__ import annotations

import asyncio

import psycopg

from tests.conftest import MakeLayer, Observer
from tests.faults.readers import numbered
from tests.processes import listen, receive

SETTINGS = {
    "idle_session_timeout": "'1s'",
    "default_transaction_isolation": "serializable",
}


async def test_sessions_of_the_layer_outlast_what_a_database_sets(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer
) -> None:
    """The server would cut an idle listener again and again."""
    [(name,)] = observer.execute("SELECT current_database()").fetchall()
    for setting, value in SETTINGS.items():
        observer.execute(f'ALTER DATABASE "{name}" SET {setting} = {value}'.encode())
    layer, sender = make_layer(heartbeat=20), make_layer()
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await listen(layer)
    with psycopg.connect(migrated_dsn, autocommit=True) as other:
        assert other.execute("SHOW idle_session_timeout").fetchone() == ("1s",)
        await asyncio.sleep(2.5)  # longer than the server lets a session be idle
        try:
            other.execute("SELECT 1")
        except psycopg.OperationalError:
            pass  # as it should be: else nothing is tested
        else:
            raise AssertionError("The server keeps idle sessions.")
    await sender.group_send("room", numbered(1))
    assert (await receive(layer, channel))["number"] == 1
    assert layer.stats()["reconnects"] == 0
