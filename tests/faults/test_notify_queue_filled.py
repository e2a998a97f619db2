"""A failing transaction fills NOTIFY's queue: the server does not wake listeners to read it."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from devtools.postgres import PostgresServer
from pg_layer import PostgresChannelLayer
from tests.faults.conftest import migrate
from tests.processes import listen, open_layer, receive, until

OPTIONS: dict[str, object] = {"heartbeat": 1, "lease": 60, "capacity": 1000}


@pytest.fixture
def dsn() -> Iterator[str]:
    """Yield a migrated database of a server with the smallest possible queue."""
    settings = {"max_notify_queue_pages": 64}
    with PostgresServer(fsync=False, version="18", settings=settings) as server:
        dsn = server.create_database("layer")
        migrate(dsn)
        yield dsn


def fill_queue(dsn: str) -> None:
    """Notify more than the queue holds, in one transaction, which fails."""
    with psycopg.connect(dsn, autocommit=True) as filler:
        with pytest.raises(psycopg.errors.ProgramLimitExceeded):
            filler.execute(
                "SELECT pg_notify('filled', n || repeat('x', 7900))"
                " FROM generate_series(1, 100) AS n"
            )
        with pytest.raises(psycopg.errors.ProgramLimitExceeded):
            filler.execute("NOTIFY filled")


async def receive_numbers(layer: PostgresChannelLayer, channel: str, count: int) -> list[int]:
    return [(await receive(layer, channel))["number"] for _ in range(count)]


async def test_idle_listeners_after_a_filled_queue_free_it_and_hear_again(
    dsn: str,
) -> None:
    """The listeners poll until the queue is free, and then hear notifications again."""
    async with open_layer(dsn, **OPTIONS) as layer, open_layer(dsn, **OPTIONS) as other:
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        await listen(layer)
        await listen(other)
        fill_queue(dsn)
        for number in range(0, 20, 2):
            await other.group_send("room", {"number": number})
            await other.send(channel, {"number": number + 1})
        assert await receive_numbers(layer, channel, 20) == list(range(20))
        await until(
            lambda: (layer.stats()["listener"], other.stats()["listener"]) == ("listening",) * 2
        )
        before = layer.stats()["inline_messages"]
        await other.group_send("room", {"number": 20})
        await other.send(channel, {"number": 21})
        assert await receive_numbers(layer, channel, 2) == [20, 21]
        assert layer.stats()["inline_messages"] == before + 2
