"""PostgreSQL is restarted, or crashes, under traffic."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import psycopg
import pytest

from devtools.postgres import PostgresServer
from devtools.postgres.server import StopMode
from tests.faults.readers import wait_for_members
from tests.faults.traffic import Recovery, Sent, all_listen_again, assert_outage_logged_once, begin
from tests.processes import Link, Processes, listen, open_layer, receive, until

DOWN = 5.0  # seconds for which the server is down


# ---------------------------------------------------------------------- restarts and outages


async def test_restart_under_traffic_loses_nothing_and_is_logged_once(
    server: PostgresServer, database: str, recovery: Recovery
) -> None:
    async with begin(database) as traffic:
        await asyncio.to_thread(server.restart, "fast")
        with recovery("restart, from the server's return (promise: 2 s)"):
            await traffic.arrives_again()
        await all_listen_again(traffic)
        assert await traffic.end() == []
        assert_outage_logged_once(traffic)


async def test_repeated_restarts_under_traffic_lose_nothing(
    server: PostgresServer, database: str, recovery: Recovery
) -> None:
    async with begin(database, senders=2) as traffic:
        for _ in range(4):
            await asyncio.to_thread(server.restart, "fast")
            with recovery("restart, from the server's return (promise: 2 s)"):
                await traffic.arrives_again()
        assert await traffic.end() == []


async def test_outage_shorter_than_send_timeout_loses_nothing(
    server: PostgresServer, database: str, recovery: Recovery
) -> None:
    async with begin(database, heartbeat=1, lease=300) as traffic:
        await asyncio.to_thread(server.stop, "fast")
        await asyncio.sleep(DOWN)
        await asyncio.to_thread(server.start)
        with recovery(f"{DOWN:g} s without a server, from its return (promise: 2 s)"):
            await traffic.arrives_again()
        await all_listen_again(traffic)
        assert await traffic.end() == []
        assert_outage_logged_once(traffic)


async def test_sends_in_an_outage_fail_after_send_timeout_and_succeed_afterwards(
    server: PostgresServer, database: str, recovery: Recovery
) -> None:
    async with begin(database, send_timeout=1) as traffic:
        await asyncio.to_thread(server.stop, "fast")
        (sender,) = traffic.senders
        await traffic.until(lambda: len(sender.failed) == 4 and min(sender.failed.values()) >= 2)
        await asyncio.to_thread(server.start)
        with recovery("sends had timed out, from the server's return (promise: 2 s)"):
            await traffic.arrives_again()
        await all_listen_again(traffic)
        assert await traffic.end() == []
        assert_outage_logged_once(traffic)


async def test_outage_longer_than_the_lease_loses_nothing(
    server: PostgresServer, database: str, recovery: Recovery
) -> None:
    """Time in which the server is down ends no lease."""
    async with begin(database, heartbeat=0.4, lease=1) as traffic:
        await asyncio.to_thread(server.stop, "fast")
        await asyncio.sleep(3)
        await asyncio.to_thread(server.start)
        with recovery("away for longer than a lease, from the server's return (promise: 2 s)"):
            await traffic.arrives_again()
        assert await traffic.end() == []


# ---------------------------------------------------------------------- a crash


async def test_crash_under_traffic_loses_only_the_last_commits(
    server: PostgresServer, database: str, recovery: Recovery
) -> None:
    async with begin(database, heartbeat=1, lease=300) as traffic:
        crashes: list[tuple[float, float]] = []
        for _ in range(2):
            crash_began = time.monotonic()
            await asyncio.to_thread(server.stop, "immediate")
            await asyncio.to_thread(server.start)
            crashes.append((crash_began, time.monotonic()))
            with recovery("crash, from the server's return (promise: 5 s)"):
                await traffic.arrives_again()

        def may_be_lost(sent: Sent) -> bool:
            # The server ends at an unknown moment, and loses the last commits. A busy sender notes
            # the outcome of a call when the server is already stopped.
            return any(crash_began - 1 < sent.at <= started for crash_began, started in crashes)

        assert await traffic.end(may_be_lost) == []


async def join_late(link: Link, dsn: str) -> list[dict[str, Any]]:
    """Join on request, and return the first message of each group. Runs in a process."""
    async with open_layer(dsn) as layer:
        channels = [await layer.new_channel() for _ in range(3)]
        await listen(layer)
        link.say("listening")
        await link.hear()
        for index, channel in enumerate(channels):
            await layer.group_add(f"room-{index}", channel)
        link.say("joined")
        return [await receive(layer, channel) for channel in channels]


async def test_memberships_undone_by_a_crash_are_written_again(
    server: PostgresServer, database: str, processes: Processes
) -> None:
    # Commits that are not flushed within these 10 s are undone by the crash.
    server.execute("ALTER SYSTEM SET wal_writer_delay = '10s'")
    server.restart("fast")
    reader = processes.start(join_late, database)
    assert await reader.hear() == "listening"
    reader.say()
    assert await reader.hear() == "joined"
    await asyncio.to_thread(server.stop, "immediate")
    await asyncio.to_thread(server.start)
    with psycopg.connect(database, autocommit=True) as observer:

        def all_rows_back() -> bool:
            row = observer.execute("SELECT count(*) FROM pg_layer_membership").fetchone()
            return row == (3,)

        await until(all_rows_back)
    async with open_layer(database) as sender:
        for index in range(3):
            await sender.group_send(f"room-{index}", {"type": "hello", "index": index})
    assert [message["index"] for message in await reader.result()] == [0, 1, 2]


async def test_memberships_restored_by_a_crash_are_removed_again(
    server: PostgresServer, database: str
) -> None:
    """The crash undoes the deletion of rows. Their owner removes them again."""
    # Commits that are not flushed within these 10 s are undone by the crash.
    server.execute("ALTER SYSTEM SET wal_writer_delay = '10s'")
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
        await wait_for_members(layer, "room", *channels[:2])
        await layer.group_send("room", {"number": 1})
        for channel in channels:
            await layer.send(channel, {"number": 2})
        found = [(await receive(layer, channel))["number"] for channel in channels]
    assert found == [1, 1, 2, 2]


@pytest.mark.parametrize("mode", ["fast", "immediate"])
async def test_messages_waiting_in_the_table_arrive_once_after_a_restart_or_crash(
    server: PostgresServer, database: str, mode: StopMode
) -> None:
    """A part was received before. Deletions commit lazily, and a crash brings the rows back."""
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
