"""PostgreSQL is restarted, and crashes, under traffic."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import psycopg
import pytest

from devtools.postgres import PostgresServer
from devtools.postgres.server import StopMode
from pg_layer._state import log_events
from tests.faults.readers import lists
from tests.faults.test_backends_killed import Recovery, Sent, Traffic, begin
from tests.processes import Link, Processes, listen, open_layer, receive, until

DOWN = 5.0  # seconds for which the server is away in the tests of a long outage


async def is_back(traffic: Traffic) -> None:
    """Returns when all receivers listen again: messages may arrive a while before, by the pool."""
    await traffic.until(
        lambda: all(
            any(line.event == log_events.DATABASE_BACK for line in receiver.warnings())
            for receiver in traffic.receivers
        )
    )


def assert_told_once(traffic: Traffic) -> None:
    """Each process has logged the outage's beginning and its end, once, and no retry."""
    for party in (*traffic.receivers, *traffic.senders):
        warnings = party.warnings()
        events = [line.event for line in warnings]
        beginnings = [at for at, event in enumerate(events) if event == log_events.DATABASE_LOST]
        ends = [at for at, event in enumerate(events) if event == log_events.DATABASE_BACK]
        assert len(beginnings) == len(ends), warnings
        # A sender that was only slowed down need not say so.
        assert len(ends) == 1 or (party in traffic.senders and not ends), warnings
        assert beginnings <= ends, warnings
        assert len(set(warnings)) == len(warnings), warnings


# ---------------------------------------------------------------------- in order


async def test_restart(server: PostgresServer, database: str, recovery: Recovery) -> None:
    async with begin(database) as traffic:
        await asyncio.to_thread(server.restart, "fast")
        with recovery("restart, from the server's return (promise: 2 s)"):
            await traffic.flows()
        await is_back(traffic)
        assert await traffic.end() == []
        assert_told_once(traffic)


async def test_several_restarts(server: PostgresServer, database: str, recovery: Recovery) -> None:
    async with begin(database, senders=2) as traffic:
        for _ in range(4):
            await asyncio.to_thread(server.restart, "fast")
            with recovery("restart, from the server's return (promise: 2 s)"):
                await traffic.flows()
        assert await traffic.end() == []


async def test_a_server_that_is_away_for_a_while(
    server: PostgresServer, database: str, recovery: Recovery
) -> None:
    async with begin(database, heartbeat=1, lease=300) as traffic:
        await asyncio.to_thread(server.stop, "fast")
        await asyncio.sleep(DOWN)
        await asyncio.to_thread(server.start)
        with recovery(f"{DOWN:g} s without a server, from its return (promise: 2 s)"):
            await traffic.flows()
        await is_back(traffic)
        assert await traffic.end() == []
        assert_told_once(traffic)


async def test_sends_fail_when_their_time_is_over_and_succeed_afterwards(
    server: PostgresServer, database: str, recovery: Recovery
) -> None:
    async with begin(database, send_timeout=1) as traffic:
        await asyncio.to_thread(server.stop, "fast")
        (sender,) = traffic.senders
        await traffic.until(lambda: len(sender.failed) == 4 and min(sender.failed.values()) >= 2)
        await asyncio.to_thread(server.start)
        with recovery("sends had timed out, from the server's return (promise: 2 s)"):
            await traffic.flows()
        await is_back(traffic)
        assert await traffic.end() == []
        assert_told_once(traffic)


async def test_nothing_is_lost_in_an_outage_that_is_longer_than_the_lease(
    server: PostgresServer, database: str, recovery: Recovery
) -> None:
    """Time in which the server is away ends no lease."""
    async with begin(database, heartbeat=0.4, lease=1) as traffic:
        await asyncio.to_thread(server.stop, "fast")
        await asyncio.sleep(3)
        await asyncio.to_thread(server.start)
        with recovery("away for longer than a lease, from the server's return (promise: 2 s)"):
            await traffic.flows()
        assert await traffic.end() == []


# ---------------------------------------------------------------------- a crash


async def test_crash(server: PostgresServer, database: str, recovery: Recovery) -> None:
    async with begin(database, heartbeat=1, lease=300) as traffic:
        crashes: list[tuple[float, float]] = []
        for _ in range(2):
            began = time.monotonic()
            await asyncio.to_thread(server.stop, "immediate")
            crashes.append((began, time.monotonic()))
            await asyncio.to_thread(server.start)
            with recovery("crash, from the server's return (promise: 5 s)"):
                await traffic.flows()

        def may_be_lost(sent: Sent) -> bool:
            # The server ends at some moment of the call, and loses what was committed just before.
            return any(began - 1 < sent.at <= ended for began, ended in crashes)

        assert await traffic.end(may_be_lost) == []


async def join_late(link: Link, dsn: str) -> list[dict[str, Any]]:
    """Join when told to, say so, and return the first message of each group."""
    async with open_layer(dsn) as layer:
        channels = [await layer.new_channel() for _ in range(3)]
        await listen(layer)
        link.say("listening")
        await link.hear()
        for index, channel in enumerate(channels):
            await layer.group_add(f"room-{index}", channel)
        link.say("joined")
        return [await receive(layer, channel) for channel in channels]


async def test_memberships_that_a_crash_undid_are_put_back(
    server: PostgresServer, database: str, processes: Processes
) -> None:
    server.execute(
        "ALTER SYSTEM SET wal_writer_delay = '10s'"
    )  # what is not flushed by then is undone
    server.restart("fast")
    reader = processes.start(join_late, database)
    assert await reader.hear() == "listening"
    reader.say()
    assert await reader.hear() == "joined"
    await asyncio.to_thread(server.stop, "immediate")
    await asyncio.to_thread(server.start)
    with psycopg.connect(database, autocommit=True) as observer:

        def are_back() -> bool:
            row = observer.execute("SELECT count(*) FROM pg_layer_membership").fetchone()
            return row == (3,)

        await until(are_back)
    async with open_layer(database) as sender:
        for index in range(3):
            await sender.group_send(f"room-{index}", {"type": "hello", "index": index})
    assert [message["index"] for message in await reader.result()] == [0, 1, 2]


async def test_memberships_whose_end_a_crash_undid_are_removed_again(
    server: PostgresServer, database: str
) -> None:
    """The table has rows again that their owner had deleted. A moment later they are gone."""
    server.execute(
        "ALTER SYSTEM SET wal_writer_delay = '10s'"
    )  # what is not flushed by then is undone
    server.restart("fast")
    async with open_layer(database, send_timeout=30) as layer:
        channels = [await layer.new_channel() for _ in range(4)]
        await listen(layer)
        for channel in channels:
            await layer.group_add("room", channel)
        server.execute("CHECKPOINT")  # so that these are on its disk
        for channel in channels[2:]:
            await layer.group_discard("room", channel)
        await asyncio.to_thread(server.stop, "immediate")
        await asyncio.to_thread(server.start)
        await lists(layer, "room", *channels[:2])
        await layer.group_send("room", {"number": 1})
        for channel in channels:
            await layer.send(channel, {"number": 2})
        found = [(await receive(layer, channel))["number"] for channel in channels]
    assert found == [1, 1, 2, 2]


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_what_waited_in_the_table_arrives_after_a_restart_once(
    server: PostgresServer, database: str, mode: StopMode
) -> None:
    """Read before, in part: deletions commit lazily, and a crash brings rows back."""
    async with open_layer(database) as layer, open_layer(database) as sender:
        channel = await layer.new_channel()
        await listen(layer)
        for number in range(50):
            await sender.send(channel, {"number": number})
            await sender.send("jobs", {"number": number})
        server.execute("CHECKPOINT")  # so that all of these are on its disk
        before = [
            (await receive(layer, name))["number"] for _ in range(20) for name in (channel, "jobs")
        ]
        await asyncio.to_thread(server.restart, mode)
        await sender.send(channel, {"number": 50})
        await sender.send("jobs", {"number": 50})
        after = [
            (await receive(layer, name))["number"] for _ in range(31) for name in (channel, "jobs")
        ]
    assert before == [number for number in range(20) for _ in range(2)]
    assert after == [number for number in range(20, 51) for _ in range(2)]
