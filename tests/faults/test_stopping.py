"""Processes that stop while the database is unavailable: they do not wait, and log one line."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from asgiref.sync import async_to_sync
from psycopg.conninfo import make_conninfo

from pg_layer import LayerUnavailable, OutcomeUnknown, PostgresChannelLayer
from pg_layer._process import shutdown as termination
from pg_layer._state import log_events
from tests.conftest import MakeLayer, Observer
from tests.faults.proxy import Proxy
from tests.faults.test_outcomes import MESSAGE, blocked, goes_away
from tests.faults.test_processes import joined, start_server
from tests.faults.test_sync_faults import locked
from tests.processes import (
    TIMEOUT,
    UNHURRIED,
    Link,
    Processes,
    listen,
    open_layer,
    terminate_backends,
    until,
)

LONG = 10 * TIMEOUT  # seconds: a call that waits this long fails the test
SOCKETS = 6


@pytest.fixture
def ending() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def proxy(migrated_dsn: str) -> Iterator[Proxy]:
    with Proxy(migrated_dsn) as proxy:
        yield proxy


@pytest.mark.parametrize("how", ["cut", "swallowed"])
@pytest.mark.parametrize("path", ["async/", "sync/", "declared/", "leaving/", "leaving-sync/"])
async def test_server_stopping_while_the_database_is_away_ends_at_once_and_quietly(
    observer: Observer, ending: ExitStack, proxy: Proxy, path: str, how: str
) -> None:
    """Each consumer leaves its group when its socket closes. Some send to the group."""
    config = {"send_timeout": LONG, "heartbeat": 1}
    layers = {"default": {"BACKEND": "pg_layer.PostgresChannelLayer", "CONFIG": config}}
    server, address = start_server(ending, proxy.dsn(), settings={"CHANNEL_LAYERS": layers})
    clients = [await joined(f"{address}/{path}") for _ in range(SOCKETS)]
    members = "SELECT count(*) FROM pg_layer_membership"
    await until(lambda: observer.execute(members.encode()).fetchone() == (SOCKETS,))
    if how == "cut":
        goes_away(proxy)
    else:
        proxy.swallow()
    await until(lambda: any(f"[{log_events.DATABASE_LOST}]" in line for line in server.errors))
    await asyncio.to_thread(server.end, signal.SIGTERM)
    assert len(server.errors) == 1, server.all_output()
    for client in clients:
        await client.close()


async def end_while_connecting(link: Link, dsn: str) -> None:
    layer = PostgresChannelLayer(dsn=dsn, send_timeout=LONG)
    await layer.group_add("room", await layer.new_channel())
    await listen(layer)
    link.say("listening")
    await link.hear()
    await until(lambda: layer.stats()["listener"] == "connecting")
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(layer.send("jobs", MESSAGE), 0.5)


async def test_loop_ending_while_it_connects_does_not_wait_for_the_connection(
    processes: Processes, proxy: Proxy
) -> None:
    """Before Python 3.12 psycopg may swallow a cancellation, and continue to connect."""
    process = processes.start(end_while_connecting, proxy.dsn(connect_timeout=int(LONG)))
    assert await process.hear() == "listening"
    goes_away(proxy)
    process.say()
    await process.result()


@pytest.mark.parametrize("how", ["cut", "swallowed"])
async def test_close_does_not_wait_for_a_database_that_is_away(proxy: Proxy, how: str) -> None:
    layer = PostgresChannelLayer(dsn=proxy.dsn(connect_timeout=int(LONG)), send_timeout=LONG)
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    await listen(layer)
    if how == "cut":
        goes_away(proxy)
    else:
        proxy.swallow()
    sending = asyncio.create_task(layer.send("jobs", MESSAGE))
    await asyncio.sleep(0)
    await asyncio.wait_for(layer.close(), TIMEOUT)
    with pytest.raises(LayerUnavailable):
        await asyncio.wait_for(sending, TIMEOUT)


async def test_close_does_not_wait_for_a_send_of_the_background_loop(
    migrated_dsn: str, observer: Observer
) -> None:
    layer = PostgresChannelLayer(dsn=migrated_dsn, send_timeout=LONG)

    def send() -> None:
        async_to_sync(layer.send)("jobs", MESSAGE)

    await asyncio.to_thread(send)
    with locked(migrated_dsn, "pg_layer_message"):
        sending = asyncio.create_task(asyncio.to_thread(send))
        await blocked(observer)
        await asyncio.wait_for(layer.close(), TIMEOUT)
        with pytest.raises(OutcomeUnknown):
            await asyncio.wait_for(sending, TIMEOUT)


@pytest.fixture
def asked_to_stop() -> Iterator[Callable[[], None]]:
    """Send this process SIGTERM. Its handler does not end it."""
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield lambda: signal.raise_signal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, before)
    termination._after_fork()


async def test_group_discard_of_a_stopping_process_changes_the_table_before_it_returns(
    make_layer: MakeLayer, asked_to_stop: Callable[[], None]
) -> None:
    """The database is available."""
    layer = make_layer()
    channel = await layer.new_channel()
    await listen(layer)
    asked_to_stop()
    assert termination.is_stopping()
    for _ in range(20):
        await layer.group_add("room", channel)
        await layer.group_discard("room", channel)
        assert await layer.group_count("room") == 0


async def test_send_of_a_stopping_process_waits_if_the_server_has_too_many_connections(
    make_layer: MakeLayer, observer: Observer, asked_to_stop: Callable[[], None]
) -> None:
    role = f"limited_{secrets.token_hex(4)}"
    for statement in (
        f"CREATE ROLE {role} LOGIN PASSWORD 'x'",
        f"GRANT ALL ON ALL TABLES IN SCHEMA public TO {role}",
        f"GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {role}",
    ):
        observer.execute(statement.encode())
    try:
        dsn = make_conninfo(observer.info.dsn, user=role, password="x")
        async with open_layer(dsn, send_timeout=LONG, **UNHURRIED) as layer:
            await listen(layer)
            asked_to_stop()
            # The listener's connection is the only one that may be there.
            observer.execute(f"ALTER ROLE {role} CONNECTION LIMIT 1".encode())
            ended = f"usename = '{role}' AND query !~ 'listen'"
            await until(lambda: terminate_backends(observer, ended))
            sending = asyncio.create_task(layer.send("jobs", MESSAGE))
            engine = layer._loops.main_engine
            assert engine is not None
            await until(lambda: engine.outage._failing_since is not None or sending.done())
            observer.execute(f"ALTER ROLE {role} CONNECTION LIMIT -1".encode())
            await sending
    finally:
        observer.execute(f"DROP OWNED BY {role}".encode())
        observer.execute(f"DROP ROLE {role}".encode())
