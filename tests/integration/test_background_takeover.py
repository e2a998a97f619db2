"""A loop that receives takes over from the background loop, which received for synchronous code."""

from __future__ import annotations

import asyncio
import threading

from asgiref.sync import async_to_sync
from psycopg.conninfo import make_conninfo

from tests.conftest import Observer
from tests.processes import new_layer
from tests.project.commands import TIMEOUT, eventually

NAME = "pg_layer_test_takeover"


def test_receive_of_a_queued_message_on_a_new_loop_ends_the_background_loop(
    migrated_dsn: str, observer: Observer
) -> None:
    """Its connections would keep the database from being dropped."""
    layer = new_layer(make_conninfo(migrated_dsn, application_name=NAME))
    channel = async_to_sync(layer.new_channel)()
    async_to_sync(layer.group_add)("room", channel)
    for number in range(2):
        async_to_sync(layer.group_send)("room", {"number": number})
    eventually(
        lambda: layer.stats()["queued_messages"] == 2,
        "the background loop has received the messages",
    )

    async def take() -> list[int]:
        return [
            (await asyncio.wait_for(layer.receive(channel), TIMEOUT))["number"] for _ in range(2)
        ]

    assert asyncio.run(take()) == [0, 1]
    query = "SELECT count(*) FROM pg_stat_activity WHERE application_name = %s"
    eventually(
        lambda: observer.execute(query, [NAME]).fetchone() == (0,), "all connections are closed"
    )
    eventually(lambda: not background_threads(), "the background loop's thread has ended")
    asyncio.run(layer.close())


def background_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pg_layer-background"]
