"""Releases of claimed jobs while the loop ends, the connection is lost or the fence is raised.

Each job is received once, by any process, and in order.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from devtools.postgres import PostgresServer
from pg_layer import PostgresChannelLayer
from tests.conftest import MakeLayer, Observer
from tests.faults.proxy import Proxy
from tests.processes import listen, new_layer, open_layer, receive, until

JOBS = 20
CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
IN_LOCKS = f"{CONNECTIONS} AND wait_event_type = 'Lock'"
FENCES = f"{IN_LOCKS} AND query LIKE '%pg_layer_raise_fence%'"


@pytest.fixture(autouse=True)
def every_reader_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give readers jobs ahead, even on a slow machine."""
    monkeypatch.setattr("pg_layer._receive.jobs.QUICK", 3600.0)


@pytest.fixture
def pool_proxy(migrated_dsn: str) -> Iterator[Proxy]:
    with Proxy(migrated_dsn) as proxy:
        yield proxy


class LockedReleases:
    """A lock that this object holds: releases wait for it after they have moved the jobs."""

    def __init__(self, dsn: str) -> None:
        self._holder: psycopg.Connection[tuple[Any, ...]] = psycopg.connect(dsn)
        self._holder.execute(
            "INSERT INTO pg_layer_low_id (address, low_id, kept_on)"
            " VALUES ('asgi!:jobs', 0, current_date) ON CONFLICT (address) DO NOTHING"
        )
        self._holder.commit()
        self._holder.execute("SELECT FROM pg_layer_low_id WHERE address = 'asgi!:jobs' FOR UPDATE")

    def let_go(self) -> None:
        self._holder.commit()

    def kill(self, observer: Observer) -> None:
        """Terminate the backend of the release, which then has no effect. Free the lock."""
        observer.execute(
            "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
            " AND query LIKE '%pg_layer_release%'"
        )
        self.let_go()

    def close(self) -> None:
        self._holder.close()


@contextmanager
def locked_releases(dsn: str) -> Iterator[LockedReleases]:
    locked = LockedReleases(dsn)
    try:
        yield locked
    finally:
        locked.close()


async def receive_jobs(layer: PostgresChannelLayer, count: int) -> list[int]:
    return [(await receive(layer, "jobs"))["number"] for _ in range(count)]


async def receive_until_all_are_done(*layers: PostgresChannelLayer, done: list[int]) -> None:
    """Receive on all layers until all jobs have arrived. Record jobs that arrive twice as well."""

    async def work_on(layer: PostgresChannelLayer) -> None:
        while True:
            done.append((await layer.receive("jobs"))["number"])

    tasks = [asyncio.create_task(work_on(layer)) for layer in layers]
    try:
        await until(lambda: len(done) >= JOBS)
        # A job that is given out twice arrives before the one that is sent now.
        await layers[-1].send("jobs", {"number": -1})
        await until(lambda: -1 in done)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    done.remove(-1)


async def leave_jobs_ahead(layer: PostgresChannelLayer, observer: Observer) -> list[int]:
    """Receive a few jobs. Return when the release of the jobs ahead waits for the lock."""
    done = await receive_jobs(layer, 4)
    await until(lambda: layer._loops.client.releasing)
    await until(lambda: observer.execute(IN_LOCKS).fetchone() == (1,))
    return done


async def receive_until_the_release_ends(
    locked: LockedReleases,
    observer: Observer,
    takes_effect: bool,
    *layers: PostgresChannelLayer,
    done: list[int],
) -> None:
    """Receive on all layers. End the release when the client waits to raise its fence."""
    receiving = asyncio.create_task(receive_until_all_are_done(*layers, done=done))
    await until(lambda: observer.execute(FENCES).fetchone() == (1,))
    if takes_effect:
        locked.let_go()
    else:
        locked.kill(observer)
    await receiving


async def send_jobs(dsn: str) -> None:
    async with open_layer(dsn, capacity=1000) as sender:
        for n in range(JOBS):
            await sender.send("jobs", {"number": n})


@pytest.mark.parametrize("takes_effect", [True, False])
def test_release_in_flight_when_its_loop_ends_neither_loses_nor_doubles_jobs(
    migrated_dsn: str, observer: Observer, takes_effect: bool
) -> None:
    """The statement continues in the server. The next loop finds out its outcome."""
    layer, other = [new_layer(migrated_dsn, capacity=1000) for _ in range(2)]
    done: list[int] = []

    async def run_first_loop() -> None:
        await listen(layer)
        done.extend(await leave_jobs_ahead(layer, observer))

    async def run_next_loop() -> None:
        await receive_until_the_release_ends(
            locked, observer, takes_effect, layer, other, done=done
        )
        for each in (layer, other):
            await each.close()

    asyncio.run(send_jobs(migrated_dsn))
    with locked_releases(migrated_dsn) as locked:
        asyncio.run(run_first_loop())
        asyncio.run(run_next_loop())
    assert sorted(done) == list(range(JOBS))
    assert done[:4] == list(range(4))


@pytest.mark.parametrize("takes_effect", [True, False])
async def test_release_losing_its_connection_neither_loses_nor_doubles_jobs(
    migrated_dsn: str,
    make_layer: MakeLayer,
    pool_proxy: Proxy,
    observer: Observer,
    takes_effect: bool,
) -> None:
    layer = make_layer(
        dsn=pool_proxy.dsn(), listen_dsn=migrated_dsn, capacity=1000, send_timeout=60
    )
    other = make_layer(capacity=1000)
    await listen(layer)
    await send_jobs(migrated_dsn)
    with locked_releases(migrated_dsn) as locked:
        done = await leave_jobs_ahead(layer, observer)
        pool_proxy.cut()
        await receive_until_the_release_ends(
            locked, observer, takes_effect, layer, other, done=done
        )
    assert sorted(done) == list(range(JOBS))


async def test_release_refused_by_the_server_is_tried_again(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer
) -> None:
    """The fence in the table is higher than the client knows, because another one raised it."""
    layer, other = make_layer(capacity=1000), make_layer(capacity=1000)
    await listen(layer)
    await send_jobs(migrated_dsn)
    done = await receive_jobs(layer, 4)
    raise_fences(observer)
    await until(lambda: layer._loops.client.fence >= 2)
    await receive_until_all_are_done(layer, other, done=done)
    assert sorted(done) == list(range(JOBS))


def test_release_cancelled_before_its_first_step_loses_no_job(
    migrated_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop ends in the step in which a release is due.

    Its task is cancelled before it has run.
    """
    # A release is due only when the test calls it.
    monkeypatch.setattr("pg_layer._receive.jobs.RELEASE_DELAY", 3600.0)
    layer = new_layer(migrated_dsn, capacity=1000)
    done: list[int] = []

    async def run_first_loop() -> None:
        await listen(layer)
        done.extend(await receive_jobs(layer, 4))
        engine = layer._loops.main_engine
        assert engine is not None
        assert engine.owner is not None
        jobs, client = engine.owner.receiver.jobs, layer._loops.client
        reader = jobs._reader("jobs")
        await until(lambda: not reader.is_claiming and not client.announcements.holds_jobs("jobs"))
        assert len(reader.queue)
        # The call runs in the step of the loop in which the end of this function stops the loop.
        asyncio.get_running_loop().call_soon(jobs._release_now, reader)

    async def run_next_loop() -> None:
        await receive_until_all_are_done(layer, done=done)
        await layer.close()

    asyncio.run(send_jobs(migrated_dsn))
    asyncio.run(run_first_loop())
    asyncio.run(run_next_loop())
    assert sorted(done) == list(range(JOBS))
    assert done[:4] == list(range(4))


async def test_release_before_a_crash_of_the_server_is_not_undone(
    server: PostgresServer, database: str
) -> None:
    """The process counts released jobs as gone.

    If a crash undid the release, the process would delete these jobs.
    """
    # Commits that are not flushed within these 10 s are undone by the crash.
    server.execute("ALTER SYSTEM SET wal_writer_delay = '10s'")
    server.restart("fast")
    async with open_layer(database, capacity=1000) as layer:
        await listen(layer)
        await send_jobs(database)
        done = await receive_jobs(layer, 4)
        with psycopg.connect(database, autocommit=True) as observer:

            def are_released() -> bool:
                row = observer.execute(
                    "SELECT count(*) FROM pg_layer_message WHERE address = 'asgi!:jobs'"
                ).fetchone()
                return row == (JOBS - 4,)

            await until(lambda: not len(layer._loops.client.queue("jobs")))
            await until(are_released)
        await asyncio.to_thread(server.stop, "immediate")
        await asyncio.to_thread(server.start)
        await receive_until_all_are_done(layer, done=done)
    assert done == list(range(JOBS))


# ---------------------------------------------------------------------- claims


def raise_fences(observer: Observer) -> None:
    observer.execute("SELECT pg_layer_raise_fence(address, 2) FROM pg_layer_client")


async def test_claim_refused_by_the_server_is_tried_again(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer, sender = make_layer(), make_layer()
    await listen(layer)
    await sender.send("jobs", {"number": 0})
    assert await receive_jobs(layer, 1) == [0]
    raise_fences(observer)
    for n in range(1, 10):
        await sender.send("jobs", {"number": n})
    assert await receive_jobs(layer, 9) == list(range(1, 10))
    await until(
        lambda: observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (0,)
    )
