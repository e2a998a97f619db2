"""Periodic tasks of a process continue after an error that the layer does not expect."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pg_layer._state import log_events
from tests.conftest import MakeLayer, Observer
from tests.logs import records
from tests.processes import until
from tests.project.commands import TIMEOUT, eventually


def failed_tasks(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.__dict__["task"] for record in records(caplog, log_events.TASK_FAILED)]


@contextmanager
def renewal_without_snapshot(observer: Observer) -> Iterator[None]:
    """Make the function that renews a lease return an invalid snapshot."""
    [(definition,)] = observer.execute(
        "SELECT pg_get_functiondef('pg_layer_renew'::regproc)"
    ).fetchall()
    broken = definition.replace("snapshot := pg_current_snapshot()::text;", "snapshot := 'broken';")
    assert broken != definition
    observer.execute(broken)
    yield
    observer.execute(definition)


async def test_polling_goes_on_after_an_unexpected_error(
    make_layer: MakeLayer, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    layer = make_layer(poll_interval=0.05, heartbeat=240, lease=600)
    channel = await layer.new_channel()
    with renewal_without_snapshot(observer):
        waiting = asyncio.create_task(layer.receive(channel))
        await until(lambda: failed_tasks(caplog))
        assert failed_tasks(caplog) == ["Polling"]
    await make_layer().send(channel, {"type": "test"})
    assert await asyncio.wait_for(waiting, TIMEOUT) == {"type": "test"}
    assert all(record.exc_info for record in records(caplog, log_events.TASK_FAILED))


async def test_sweeping_goes_on_after_an_unexpected_error(
    make_layer: MakeLayer, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    observer.execute("CREATE TABLE sweeps (at timestamptz DEFAULT clock_timestamp())")
    observer.execute("ALTER FUNCTION pg_layer_sweep RENAME TO pg_layer_sweep_before")
    observer.execute(
        """
        CREATE FUNCTION pg_layer_sweep(text, integer, boolean, float8, OUT bigint, OUT last float8)
        LANGUAGE sql AS 'INSERT INTO sweeps DEFAULT VALUES; SELECT 0::bigint, 0::float8'
        """
    )
    layer = make_layer(heartbeat=0.1, lease=10, sweep_interval=0.1)
    await layer.group_add("room", await layer.new_channel())
    await asyncio.to_thread(
        eventually,
        lambda: observer.execute("SELECT count(*) FROM sweeps").fetchall() >= [(3,)],
        "it sweeps again and again",
    )
    assert failed_tasks(caplog) == ["Sweeping"]
    assert all(record.exc_info for record in records(caplog, log_events.TASK_FAILED))
