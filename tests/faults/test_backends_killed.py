"""Backends that are killed under traffic."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter

import msgpack  # type: ignore[import-untyped]
import pytest
from psycopg.conninfo import make_conninfo

from pg_layer import LayerUnavailable
from tests.conftest import Observer
from tests.faults.traffic import REFUSED, RETURNED, TRAFFIC, UNKNOWN, Recovery, Sent, begin
from tests.processes import listen, open_layer

KILLING = 30.0  # seconds
KILLING_EVERY = (0.02, 0.3)


def backend_pids(observer: Observer, *names: str) -> set[int]:
    rows = observer.execute(
        "SELECT pid FROM pg_stat_activity"
        " WHERE datname = current_database() AND application_name = ANY (%s)",
        [list(names)],
    ).fetchall()
    return {pid for (pid,) in rows}


def kill(observer: Observer, *names: str) -> set[int]:
    """Terminate the backends with these application names. Return their process ids."""
    pids = backend_pids(observer, *names)
    observer.execute("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS pid", [list(pids)])
    return pids


# ---------------------------------------------------------------------- tests


async def test_listener_backend_killed_listens_again_and_misses_nothing(
    migrated_dsn: str, observer: Observer, recovery: Recovery
) -> None:
    async with begin(migrated_dsn) as traffic:
        for _ in range(3):
            killed = kill(observer, "listener")
            assert len(killed) == 2
            with recovery("listener's backend killed (promise: 1 s)"):
                await traffic.arrives_again()
            assert not killed & backend_pids(observer, "listener")
        assert await traffic.end() == []
        assert not sum((sender.failed for sender in traffic.senders), Counter())


@pytest.mark.parametrize("name", ["pool", "sender"])
async def test_pool_or_sender_backends_killed_lose_nothing(
    migrated_dsn: str, observer: Observer, name: str
) -> None:
    async with begin(migrated_dsn) as traffic:
        for _ in range(10):
            await traffic.until(lambda: kill(observer, name))
            await traffic.arrives_again()
        assert await traffic.end() == []


@pytest.mark.slow
async def test_all_backends_killed_repeatedly_lose_nothing(
    migrated_dsn: str, observer: Observer, recovery: Recovery
) -> None:
    async with begin(migrated_dsn, senders=2) as traffic:
        killed = 0
        deadline = time.monotonic() + KILLING
        while time.monotonic() < deadline:
            killed += len(kill(observer, "listener", "pool", "sender"))
            await asyncio.sleep(random.uniform(*KILLING_EVERY))
        with recovery("all backends killed repeatedly"):
            await traffic.arrives_again()
        assert await traffic.end() == []
        assert killed > 50


async def test_backends_killed_during_a_burst_lose_nothing(
    migrated_dsn: str, observer: Observer
) -> None:
    """Concurrent sends are written in batches. All messages of a batch have the same outcome."""
    sent: dict[str, list[Sent]] = {"here:own-0": [], "here:own-1": []}

    async def send_one(stream: str, channel: str, number: int) -> Sent:
        outcome = RETURNED
        try:
            await layer.send(channel, {"stream": stream, "number": number, "at": time.monotonic()})
        except LayerUnavailable as error:
            outcome = UNKNOWN if "unknown" in str(error) else REFUSED
        return Sent(outcome, time.monotonic())

    async with (
        begin(migrated_dsn, senders=0) as traffic,
        open_layer(make_conninfo(migrated_dsn, application_name="sender"), **TRAFFIC) as layer,
    ):
        for burst in range(20):
            sending = {
                stream: [
                    asyncio.create_task(send_one(stream, receiver.channel, number))
                    for number in range(200 * burst, 200 * (burst + 1))
                ]
                for stream, receiver in zip(sent, traffic.receivers, strict=True)
            }
            await asyncio.sleep(random.random() * 0.02)
            kill(observer, "sender", "pool")
            for stream, tasks in sending.items():
                sent[stream] += await asyncio.gather(*tasks)
        assert await traffic.end(sent_here=sent) == []


async def test_jobs_at_the_own_address_after_a_reconnect_come_before_waiting_jobs(
    migrated_dsn: str, observer: Observer
) -> None:
    """A claim whose answer was lost has moved jobs to the own address.

    They are the oldest jobs, and no notification announces them.
    """
    listen_dsn = make_conninfo(migrated_dsn, application_name="listener")
    payloads = [msgpack.packb({"number": number}) for number in range(2)]
    for _ in range(5):
        async with open_layer(migrated_dsn, listen_dsn=listen_dsn) as layer:
            await listen(layer)
            own = await layer.new_channel()
            jobs = [asyncio.create_task(layer.receive("jobs")) for _ in payloads]
            await asyncio.wait(jobs, timeout=0.2)  # nothing notifies them of the next jobs
            observer.execute(
                "INSERT INTO pg_layer_message (address, xid, boot, channel, payload, expires_at)"
                " SELECT pg_layer_address('asgi', j.channel), pg_current_xact_id(), b.boot, 'jobs',"
                " j.payload, 'infinity'"
                " FROM pg_layer_boot AS b,"
                " unnest(%s::text[], %s::bytea[]) WITH ORDINALITY AS j (channel, payload, number)"
                " ORDER BY j.number",
                [[own, "jobs"], payloads],
            )
            assert kill(observer, "listener")
            assert await asyncio.gather(*jobs) == [{"number": 0}, {"number": 1}]
