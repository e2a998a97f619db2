"""Failover to a standby, also to one that lags; and servers that are read-only."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager

import pytest
from psycopg.conninfo import make_conninfo

from devtools.postgres import PostgresServer
from pg_layer import ChannelFull, LayerUnavailable, PostgresChannelLayer
from tests.faults.standby import caught_up, cut_off, fail_over
from tests.processes import TIMEOUT, Link, Processes, listen, open_layer, receive, until

Recovery = Callable[[str], AbstractContextManager[None]]

LONG_TIMEOUT: dict[str, object] = {"send_timeout": 30}


@pytest.fixture
def standby(server: PostgresServer, database: str) -> Iterator[PostgresServer]:
    """Yield a standby that streams from the server."""
    with PostgresServer(fsync=False, primary=server) as standby:
        yield standby


@pytest.fixture
def writable_dsn(server: PostgresServer, standby: PostgresServer, database: str) -> str:
    """Return the DSN that leads to the one of the two servers that accepts writes."""
    return make_conninfo(
        database,
        host="127.0.0.1,127.0.0.1",
        port=f"{server.port},{standby.port}",
        target_session_attrs="read-write",
    )


@pytest.fixture
def processes() -> Iterator[Processes]:
    """Yield a starter of processes, which end with the test."""
    started = Processes()
    yield started
    started.close()


async def promote(standby: PostgresServer) -> None:
    promoted = await asyncio.to_thread(standby.execute, "SELECT pg_promote()")
    assert promoted == [(True,)]


async def fail_over_to_old_ids(server: PostgresServer, standby: PostgresServer) -> None:
    """Fail over to a standby that lags so far that it gives out ids again."""
    id_before = last_id(server)
    await fail_over(server, standby)
    assert last_id(standby) < id_before


def rows_waiting(server: PostgresServer, channel: str) -> int:
    """Return how many rows a server has for a channel."""
    ((count,),) = server.execute(
        f"SELECT count(*) FROM pg_layer_message WHERE channel = '{channel}'", dbname="layer"
    )
    return int(count)


def last_id(server: PostgresServer) -> int:
    ((id,),) = server.execute("SELECT last_value FROM pg_layer_message_id_seq", dbname="layer")
    return int(id)


async def use_up_preallocated_ids(layer: PostgresChannelLayer) -> None:
    """Use more ids than a sequence logs ahead in the WAL.

    Only then does a standby that lags give out ids again.
    """
    for number in range(100):
        await layer.send("elsewhere", {"number": number})


class Consumers:
    """The consumers of one layer: by name, the channel and the numbers that it received."""

    def __init__(self, layer: PostgresChannelLayer) -> None:
        self.layer = layer
        self.channels: dict[str, str] = {}
        self.received: dict[str, list[int]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def add(self, name: str, *, joins: bool = True) -> None:
        """Add a consumer with a new channel, by default in the group "room"."""
        channel = await self.layer.new_channel()
        if joins:
            await self.layer.group_add("room", channel)
        self.read(name, channel)

    def read(self, name: str, channel: str) -> None:
        """Add a consumer of the channel."""
        self.channels[name], self.received[name] = channel, []
        self._tasks.append(asyncio.create_task(self._consume(name)))

    async def _consume(self, name: str) -> None:
        while True:
            message = await self.layer.receive(self.channels[name])
            self.received[name].append(message["number"])

    async def reached(self, number: int, *names: str) -> None:
        """Return when each of the consumers has received the number."""
        try:
            await until(lambda: all(number in self.received[name] for name in names))
        except TimeoutError:
            pytest.fail(f"{number} did not arrive at all of {names}: {self.received}")

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()


@asynccontextmanager
async def listening_consumers(dsn: str, **options: object) -> AsyncIterator[Consumers]:
    """Yield the consumers of a layer that listens."""
    async with open_layer(dsn, **{**LONG_TIMEOUT, **options}) as layer:
        await listen(layer)
        early_consumers = Consumers(layer)
        try:
            yield early_consumers
        finally:
            early_consumers.stop()


# ---------------------------------------------------------------------- a standby takes over


async def test_members_unknown_to_a_lagging_standby_hear_their_groups_after_failover(
    server: PostgresServer, standby: PostgresServer, writable_dsn: str, recovery: Recovery
) -> None:
    """One row serves all members of a process.

    So the new primary must learn which processes have members.
    """
    async with (
        listening_consumers(writable_dsn) as early_consumers,
        listening_consumers(writable_dsn) as late_consumers,
        open_layer(writable_dsn, **LONG_TIMEOUT) as sender,
    ):
        await early_consumers.add("early")
        await early_consumers.add("leaving")
        for number in range(10):
            await sender.group_send("room", {"number": number})
        await early_consumers.reached(9, "early", "leaving")
        await caught_up(server, standby)
        await cut_off(standby)
        await late_consumers.add("late")
        await early_consumers.layer.group_discard("room", early_consumers.channels["leaving"])
        for number in range(10, 100):
            await sender.group_send("room", {"number": number})
        await early_consumers.reached(99, "early")
        await late_consumers.reached(99, "late")
        number = 99
        with recovery("failover: a member that the new primary did not know gets messages again"):
            await fail_over_to_old_ids(server, standby)
            deadline = time.monotonic() + TIMEOUT
            while late_consumers.received["late"][-1] == 99 and time.monotonic() < deadline:
                number += 1
                await sender.group_send("room", {"number": number})
        for _ in range(10):
            number += 1
            await sender.group_send("room", {"number": number})
        await early_consumers.reached(number, "early")
        await late_consumers.reached(number, "late")
        # Messages sent on the new primary reach all members that it knows. They reach the others as
        # soon as their process has written their memberships again.
        assert early_consumers.received["early"] == list(range(number + 1))
        late = late_consumers.received["late"]
        assert late[:90] == list(range(10, 100))
        assert late[90:] == list(range(number + 1 - len(late[90:]), number + 1))
        assert early_consumers.received["leaving"] == list(range(10))


async def test_failover_repeats_only_jobs_whose_claim_the_standby_missed(
    server: PostgresServer, standby: PostgresServer, writable_dsn: str
) -> None:
    """Messages to an own channel are not repeated, although the standby missed their deletion."""
    async with (
        listening_consumers(writable_dsn) as early_consumers,
        open_layer(writable_dsn, **LONG_TIMEOUT) as sender,
    ):
        own = await early_consumers.layer.new_channel()
        for number in range(50):
            await sender.send(own, {"number": number, "blob": bytes(200 * number)})
            await sender.send("jobs", {"number": number})
        await caught_up(server, standby)
        await cut_off(standby)
        early_consumers.read("own", own)
        early_consumers.read("jobs", "jobs")
        await early_consumers.reached(49, "own", "jobs")
        await use_up_preallocated_ids(sender)
        await until(lambda: rows_waiting(server, own) == rows_waiting(server, "jobs") == 0)
        assert rows_waiting(standby, own) == rows_waiting(standby, "jobs") == 50
        await fail_over_to_old_ids(server, standby)
        for number in range(50, 100):
            await sender.send(own, {"number": number, "blob": bytes(200 * (number - 50))})
            await sender.send("jobs", {"number": number})
        await early_consumers.reached(99, "own", "jobs")
        await until(lambda: rows_waiting(standby, own) == rows_waiting(standby, "jobs") == 0)
        assert early_consumers.received["own"] == list(range(100))
        jobs = early_consumers.received["jobs"]
        assert jobs[:50] == list(range(50))
        assert jobs[50:] in (list(range(50, 100)), list(range(100)))


async def test_channels_leaving_a_group_after_a_failover_receive_no_more(
    server: PostgresServer, standby: PostgresServer, writable_dsn: str
) -> None:
    async with (
        listening_consumers(writable_dsn) as early_consumers,
        open_layer(writable_dsn, **LONG_TIMEOUT) as sender,
    ):
        await early_consumers.add("staying")
        await caught_up(server, standby)
        await cut_off(standby)
        await use_up_preallocated_ids(sender)
        for name in ("leaving", "removed", "returning"):
            await early_consumers.add(name)
        await fail_over_to_old_ids(server, standby)
        number = 0
        deadline = time.monotonic() + TIMEOUT
        # Send until the new primary knows all members.
        while not all(early_consumers.received.values()) and time.monotonic() < deadline:
            await sender.group_send("room", {"number": number})
            number += 1
            await asyncio.wait_for(
                early_consumers.layer.group_add("other", early_consumers.channels["staying"]),
                TIMEOUT,
            )
        await early_consumers.reached(number - 1, *early_consumers.channels)
        for name in ("leaving", "returning"):
            await early_consumers.layer.group_discard("room", early_consumers.channels[name])
        await sender.group_discard(
            "room", early_consumers.channels["removed"]
        )  # by another process
        await sender.group_send("room", {"number": number})
        await early_consumers.layer.group_add("room", early_consumers.channels["returning"])
        await sender.group_send("room", {"number": number + 1})
        for channel in early_consumers.channels.values():
            await sender.send(channel, {"number": number + 2})
        await early_consumers.reached(number + 2, *early_consumers.channels)
        last = {
            name: [n for n in numbers if n >= number]
            for name, numbers in early_consumers.received.items()
        }
        assert last == {
            "staying": [number, number + 1, number + 2],
            "leaving": [number + 2],
            "removed": [number + 2],
            "returning": [number + 1, number + 2],
        }


async def test_capacity_after_a_failover_counts_from_the_lower_ids(
    server: PostgresServer, standby: PostgresServer, writable_dsn: str
) -> None:
    async with (
        listening_consumers(writable_dsn, capacity=20) as early_consumers,
        open_layer(writable_dsn, **LONG_TIMEOUT, capacity=20) as sender,
    ):
        await caught_up(server, standby)
        await cut_off(standby)
        # The sender remembers a low-water id. The ids on the new primary are lower.
        await early_consumers.add("reader", joins=False)
        channel = early_consumers.channels["reader"]
        for number in range(150):
            await sender.send(channel, {"number": number})
            if number % 10 == 9:
                await early_consumers.reached(number, "reader")
        early_consumers.stop()
        await fail_over_to_old_ids(server, standby)
        outcomes = []
        for number in range(40):
            try:
                await sender.send(channel, {"number": number})
                outcomes.append("sent")
            except ChannelFull:
                outcomes.append("full")
        assert outcomes == ["sent"] * 20 + ["full"] * 20


async def send_until_stopped(link: Link, dsn: str) -> dict[str, dict[int, float]]:
    """Send numbers to the group until the test requests the end. Runs in a process.

    Return by outcome the numbers, and when each outcome was known.
    """
    outcomes: dict[str, dict[int, float]] = {"sent": {}, "unknown": {}, "refused": {}}
    async with open_layer(dsn, **LONG_TIMEOUT) as layer:
        stop = asyncio.create_task(link.hear())
        number = 0
        while not stop.done():
            try:
                await layer.group_send("room", {"number": number})
                outcome = "sent"
            except LayerUnavailable as error:
                outcome = "unknown" if "unknown" in str(error) else "refused"
            outcomes[outcome][number] = time.monotonic()
            number += 1
            await asyncio.wait({stop}, timeout=0.005)
    return outcomes


async def test_failover_under_traffic_loses_only_the_last_commits(
    server: PostgresServer,
    standby: PostgresServer,
    writable_dsn: str,
    processes: Processes,
    recovery: Recovery,
) -> None:
    async with listening_consumers(writable_dsn) as early_consumers:
        await early_consumers.add("a")
        await early_consumers.add("b")
        await caught_up(server, standby)
        writer = processes.start(send_until_stopped, writable_dsn)
        await early_consumers.reached(50, "a", "b")
        with recovery("failover under traffic: from the crash to the next message"):
            await asyncio.to_thread(server.stop, "immediate")
            crashed_at = time.monotonic()
            last = early_consumers.received["a"][-1]
            await promote(standby)
            await until(lambda: early_consumers.received["a"][-1] > last)
        await early_consumers.reached(early_consumers.received["a"][-1] + 50, "a", "b")
        writer.say("stop")
        outcomes = await writer.result()
        await early_consumers.reached(max(outcomes["sent"]), "a", "b")
        # Only the last commits before the crash may be lost.
        certain = {number for number, known_at in outcomes["sent"].items() if known_at > crashed_at}
        for numbers in early_consumers.received.values():
            assert numbers == sorted(set(numbers))
            assert not certain - set(numbers)
            assert not set(numbers) & set(outcomes["refused"])
        assert len(outcomes["unknown"]) <= 1
        assert not outcomes["refused"]


# ---------------------------------------------------------------------- read-only servers


@pytest.mark.parametrize("targets_writable", [False, True], ids=["any server", "read-write"])
async def test_calls_on_a_standby_raise_read_only_until_it_is_promoted(
    server: PostgresServer,
    standby: PostgresServer,
    database: str,
    targets_writable: bool,
    recovery: Recovery,
) -> None:
    await caught_up(server, standby)
    target = "read-write" if targets_writable else "any"
    dsn = make_conninfo(database, port=standby.port, target_session_attrs=target)
    async with open_layer(dsn, send_timeout=2) as layer:
        channel = await layer.new_channel()
        receiving = asyncio.create_task(layer.receive(channel))
        working = asyncio.create_task(layer.receive("jobs"))
        calls: list[Callable[[], Awaitable[None]]] = [
            lambda: layer.send(channel, {"number": 0}),
            lambda: layer.group_add("room", channel),
            layer.flush,
        ]
        for call in calls:
            with pytest.raises(LayerUnavailable, match="read-only"):
                await asyncio.wait_for(call(), TIMEOUT)
        assert not receiving.done()
        assert not working.done()
        with recovery(f"a standby is promoted ({target}): until refused calls succeed"):
            await promote(standby)
            await retry_until_available(lambda: layer.group_add("room", channel))
            await layer.group_send("room", {"number": 1})
            assert await asyncio.wait_for(receiving, TIMEOUT) == {"number": 1}
        await layer.send("jobs", {"number": 2})
        assert await asyncio.wait_for(working, TIMEOUT) == {"number": 2}
        await layer.send(channel, {"number": 3})
        assert await receive(layer, channel) == {"number": 3}
        await layer.flush()


async def retry_until_available(call: Callable[[], Awaitable[None]]) -> None:
    """Call until the layer is available. Raise the last error if it stays unavailable."""
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            return await call()
        except LayerUnavailable:
            if time.monotonic() > deadline:
                raise


async def test_primary_turned_read_only_is_left_for_the_promoted_standby(
    server: PostgresServer, standby: PostgresServer, writable_dsn: str, recovery: Recovery
) -> None:
    async with (
        listening_consumers(writable_dsn, heartbeat=2) as early_consumers,
        open_layer(writable_dsn, **LONG_TIMEOUT) as sender,
        open_layer(writable_dsn, send_timeout=1) as impatient,
    ):
        await early_consumers.add("consumer")
        early_consumers.read("jobs", "jobs")
        for number in range(10):
            await sender.group_send("room", {"number": number})
            await sender.send("jobs", {"number": number})
            await impatient.group_send("elsewhere", {"number": number})
        await early_consumers.reached(9, "consumer", "jobs")
        await caught_up(server, standby)
        server.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        server.execute("SELECT pg_reload_conf()")
        await until(lambda: server.execute("SHOW default_transaction_read_only") == [("on",)])
        with recovery("a primary turned read-only: until a message arrives from its successor"):
            with pytest.raises(LayerUnavailable, match="read-only"):
                await asyncio.wait_for(impatient.group_send("room", {"number": -1}), TIMEOUT)
            await promote(standby)
            for number in range(10, 20):
                await sender.group_send("room", {"number": number})
                await sender.send("jobs", {"number": number})
            await retry_until_available(lambda: impatient.group_send("room", {"number": 20}))
            await sender.send("jobs", {"number": 20})
            await early_consumers.reached(20, "consumer", "jobs")
        assert server.running
        assert early_consumers.received == {"consumer": list(range(21)), "jobs": list(range(21))}
