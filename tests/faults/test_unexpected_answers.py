"""SQL functions that return an unexpected result, as those of a later version may.

The task concerned tries again until the function is repaired. Meanwhile ``health()``,
``stats()``, the log and ``manage.py pg_layer_status`` report it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import psycopg
import pytest

from pg_layer import PostgresChannelLayer
from pg_layer._state import log_events
from tests.conftest import MakeLayer, Observer
from tests.integration.test_status import look, sweep
from tests.logs import records
from tests.processes import listen, receive, terminate_backends, until

SHORT_HEARTBEAT: dict[str, object] = {"heartbeat": 0.1, "lease": 60}


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pg_layer._process.tasks.PAUSE", 0.05)


def terminate_connections(observer: Observer) -> None:
    """Terminate the layer's connections, whose prepared statements still use the old function."""
    terminate_backends(
        observer, "datname = current_database() AND application_name LIKE 'pg_layer%'"
    )


@contextmanager
def extra_column(observer: Observer, name: str) -> Iterator[None]:
    """Make the function return one column more than the layer expects, while the block runs."""
    [(types, columns)] = observer.execute(
        """
        SELECT (SELECT array_agg(type::regtype::text ORDER BY number)
                FROM unnest(p.proargtypes) WITH ORDINALITY AS a (type, number)),
            (SELECT string_agg(format('%%I %%s', a.name, a.type::regtype), ', ' ORDER BY a.number)
             FROM unnest(p.proargnames, p.proargmodes, p.proallargtypes) WITH ORDINALITY
                AS a (name, mode, type, number) WHERE a.mode IN ('o', 't'))
        FROM pg_proc AS p WHERE p.proname = %s
        """,
        [name],
    ).fetchall()
    arguments = ", ".join(f"${number}" for number in range(1, len(types) + 1))
    # Move the function to another schema: it keeps its name, which may qualify its parameters.
    observer.execute("CREATE SCHEMA before")
    observer.execute(f"ALTER FUNCTION {name} SET SCHEMA before")
    observer.execute(
        f"CREATE FUNCTION {name}({', '.join(types)}) RETURNS TABLE ({columns}, more integer)"
        f" LANGUAGE sql AS $$ SELECT f.*, 0 FROM before.{name}({arguments}) AS f $$"
    )
    terminate_connections(observer)
    yield
    observer.execute(f"DROP FUNCTION {name}")
    observer.execute(f"ALTER FUNCTION before.{name} SET SCHEMA public")
    terminate_connections(observer)


# ---------------------------------------------------------------------- uses of each function


@asynccontextmanager
async def without_use(
    layer: PostgresChannelLayer, sender: PostgresChannelLayer, dsn: str
) -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def with_added_member(
    layer: PostgresChannelLayer, sender: PostgresChannelLayer, dsn: str
) -> AsyncIterator[None]:
    """Another process adds a channel. The owner writes its row when the function is repaired."""
    channel = await layer.new_channel()
    await sender.group_add("room", channel)
    yield
    client = layer._loops.client
    with psycopg.connect(dsn, autocommit=True) as observer:
        rows = "SELECT count(*) FROM pg_layer_membership WHERE address = %s AND id = 0"
        await until(lambda: observer.execute(rows, [client.address]).fetchone() == (1,))
    await sender.group_send("room", {"number": 1})
    assert await receive(layer, channel) == {"number": 1}


@asynccontextmanager
async def with_marked_message(
    layer: PostgresChannelLayer, sender: PostgresChannelLayer, dsn: str
) -> AsyncIterator[None]:
    """Write a marked message, and wait until a heartbeat of the repaired function finds it."""
    channel = await layer.new_channel()
    with psycopg.connect(dsn) as connection:
        connection.execute("SET LOCAL pg_layer.silent = on")
        connection.execute('SELECT pg_layer_send(%s, \'{"type": "test"}\')', [channel])
    yield
    assert await receive(layer, channel) == {"type": "test"}


@asynccontextmanager
async def with_expired_message(
    layer: PostgresChannelLayer, sender: PostgresChannelLayer, dsn: str
) -> AsyncIterator[None]:
    """Send a message that expires, and wait until the repaired function has deleted it."""
    await sender.send("jobs", {"number": 1}, expiry=0.01)
    yield
    with psycopg.connect(dsn, autocommit=True) as observer:
        await until(
            lambda: observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (0,)
        )


Use = Callable[[PostgresChannelLayer, PostgresChannelLayer, str], Any]


@pytest.mark.parametrize(
    ("function", "task_name", "use"),
    [
        ("pg_layer_renew", "The heartbeat", without_use),
        ("pg_layer_position", "Catching up", without_use),
        ("pg_layer_write_memberships", "The writing of memberships", with_added_member),
        ("pg_layer_marked_keys", "The search for marked messages", with_marked_message),
        ("pg_layer_delete_expired", "The deletion of expired messages", with_expired_message),
        ("pg_layer_sweep", "Sweeping", without_use),
    ],
)
async def test_task_getting_an_unexpected_answer_reports_it_and_goes_on(
    function: str,
    task_name: str,
    use: Use,
    make_layer: MakeLayer,
    migrated_dsn: str,
    observer: Observer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    interval = 0.1 if task_name == "Sweeping" else 0
    layer, sender = make_layer(**SHORT_HEARTBEAT, sweep_interval=interval), make_layer()
    await listen(layer)

    def failed() -> list[str]:
        return [record.__dict__["task"] for record in records(caplog, log_events.TASK_FAILED)]

    async def problems() -> str:
        return "\n".join((await layer.health())["problems"])

    with extra_column(observer, function):
        used = use(layer, sender, migrated_dsn)
        await used.__aenter__()
        await until(lambda: task_name in failed())
        assert layer.stats()["failing_tasks"]
        assert f"{task_name} fails, and is tried again: " in await problems()
        assert failed().count(task_name) == 1
    await until(lambda: not layer.stats()["failing_tasks"])
    await used.__aexit__(None, None, None)
    age = layer.stats()["lease_age"]
    assert age is not None
    await until(lambda: (layer.stats()["lease_age"] or 0) < age)  # the lease is renewed
    assert task_name not in await problems()
    assert failed().count(task_name) == 1


async def test_jobs_are_received_once_after_a_claim_got_an_unexpected_answer(
    make_layer: MakeLayer, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """The claim has moved the jobs to the client's address. A catch-up finds them."""
    layer, sender = make_layer(), make_layer()
    await listen(layer)
    received = []
    with extra_column(observer, "pg_layer_claim"):
        for number in range(3):
            await sender.send("jobs", {"number": number})
            received.append((await receive(layer, "jobs"))["number"])
    failed = records(caplog, log_events.TASK_FAILED)
    assert "The claim of jobs" in [record.__dict__["task"] for record in failed]
    await sender.send("jobs", {"number": 3})
    received.append((await receive(layer, "jobs"))["number"])
    assert received == [0, 1, 2, 3]


async def test_status_command_shows_failing_tasks(
    make_layer: MakeLayer, migrated_dsn: str, observer: Observer
) -> None:
    sweep(observer)
    layer = make_layer(**SHORT_HEARTBEAT, sweep_interval=0)
    await listen(layer)
    counted = "SELECT counters ->> 'failing_tasks' FROM pg_layer_client"
    with extra_column(observer, "pg_layer_delete_expired"):
        await layer.send("jobs", {"number": 1}, expiry=0.01)
        await until(lambda: observer.execute(counted).fetchone() == ("1",))
        shown = await asyncio.to_thread(look, migrated_dsn)
        assert shown["failing_tasks"] == 1
        assert shown["problems"] == ["Failing tasks of live clients: 1. See the processes' logs."]
    await until(lambda: observer.execute(counted).fetchone() == ("0",))
    assert (await asyncio.to_thread(look, migrated_dsn))["ok"]


async def test_health_when_the_renewal_gets_an_unexpected_answer_does_not_raise(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer()
    await listen(layer)
    with extra_column(observer, "pg_layer_renew"):
        health = await layer.health()
    assert health["round_trip"] is None
    assert any(
        problem.startswith("The ping failed: ValueError: ") for problem in health["problems"]
    )


async def test_health_when_the_lease_is_over_reports_it_and_renews_it(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer(heartbeat=0.4, lease=1)
    await listen(layer)
    time.sleep(1.1)  # noqa: ASYNC251  # block the loop, as an application may
    health = await layer.health()
    assert (health["lease_age"] or 0) > 1
    assert any(
        problem.startswith("The lease was not renewed for ") for problem in health["problems"]
    )
    assert (await layer.health())["problems"] == []
