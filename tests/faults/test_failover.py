"""Failover: a standby takes over, one that lagged too; and servers that only read."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager

import pytest
from psycopg.conninfo import make_conninfo

from devtools.postgres import PostgresServer
from pg_layer import ChannelFull, LayerUnavailable, PostgresChannelLayer
from tests.processes import PATIENCE, Link, Processes, listen, open_layer, receive, until

Recovery = Callable[[str], AbstractContextManager[None]]

PATIENT: dict[str, object] = {"send_timeout": 30}


@pytest.fixture
def standby(server: PostgresServer, database: str) -> Iterator[PostgresServer]:
    """A standby that streams from the server."""
    with PostgresServer(fsync=False, primary=server) as standby:
        yield standby


@pytest.fixture
def either(server: PostgresServer, standby: PostgresServer, database: str) -> str:
    """Leads to the one of the two that can be written to."""
    return make_conninfo(
        database,
        host="127.0.0.1,127.0.0.1",
        port=f"{server.port},{standby.port}",
        target_session_attrs="read-write",
    )


@pytest.fixture
def processes() -> Iterator[Processes]:
    """Processes that end with the test."""
    started = Processes()
    yield started
    started.close()


async def caught_up(server: PostgresServer, standby: PostgresServer) -> None:
    """Wait until the standby has all that the server has written so far."""
    ((lsn,),) = server.execute(
        "SELECT pg_logical_emit_message(true, 'test', 'so far')"
    )  # and flush it
    await until(lambda: standby.execute(f"SELECT pg_last_wal_replay_lsn() >= '{lsn}'") == [(True,)])


async def cut_off(standby: PostgresServer) -> None:
    """From here on the standby hears nothing of its primary.

    It is the stream that is cut: a standby whose replay is paused has the WAL, and replays it when promoted.
    """
    standby.execute("ALTER SYSTEM SET primary_conninfo = ''")
    standby.execute("SELECT pg_reload_conf()")
    await until(lambda: standby.execute("SELECT count(*) FROM pg_stat_wal_receiver") == [(0,)])


async def fail_over(server: PostgresServer, standby: PostgresServer) -> None:
    """The server crashes for good, and the standby takes over."""
    await asyncio.to_thread(server.stop, "immediate")
    await promote(standby)


async def promote(standby: PostgresServer) -> None:
    promoted = await asyncio.to_thread(standby.execute, "SELECT pg_promote()")
    assert promoted == [(True,)]


async def fail_over_to_old_ids(server: PostgresServer, standby: PostgresServer) -> None:
    """The same, with a standby that lags so far that it hands out ids again."""
    id_before = last_id(server)
    await fail_over(server, standby)
    assert last_id(standby) < id_before


def waiting(server: PostgresServer, channel: str) -> int:
    """How many rows a server has for a channel."""
    ((count,),) = server.execute(
        f"SELECT count(*) FROM pg_layer_message WHERE channel = '{channel}'", dbname="layer"
    )
    return int(count)


def last_id(server: PostgresServer) -> int:
    ((id,),) = server.execute("SELECT last_value FROM pg_layer_message_id_seq", dbname="layer")
    return int(id)


async def use_up_ids(layer: PostgresChannelLayer) -> None:
    """More than a sequence is ahead by in the WAL, so that a standby that lags hands ids out again."""
    for number in range(100):
        await layer.send("elsewhere", {"number": number})


class Consumers:
    """Consumers of one layer: by name, the channel of each and the numbers it has received."""

    def __init__(self, layer: PostgresChannelLayer) -> None:
        self.layer = layer
        self.channels: dict[str, str] = {}
        self.received: dict[str, list[int]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def add(self, name: str, *, joins: bool = True) -> None:
        """A consumer with a new channel, as a rule in the group "room"."""
        channel = await self.layer.new_channel()
        if joins:
            await self.layer.group_add("room", channel)
        self.read(name, channel)

    def read(self, name: str, channel: str) -> None:
        """A consumer of that channel."""
        self.channels[name], self.received[name] = channel, []
        self._tasks.append(asyncio.create_task(self._consume(name)))

    async def _consume(self, name: str) -> None:
        while True:
            message = await self.layer.receive(self.channels[name])
            self.received[name].append(message["number"])

    async def reached(self, number: int, *names: str) -> None:
        """Wait until each of them has received that number."""
        try:
            await until(lambda: all(number in self.received[name] for name in names))
        except TimeoutError:
            pytest.fail(f"{number} did not arrive at all of {names}: {self.received}")

    def stop(self) -> None:
        for task in self._tasks:
            task.cancel()


@asynccontextmanager
async def consumers(dsn: str, **options: object) -> AsyncIterator[Consumers]:
    """A layer that listens, for consumers."""
    async with open_layer(dsn, **{**PATIENT, **options}) as layer:
        await listen(layer)
        theirs = Consumers(layer)
        try:
            yield theirs
        finally:
            theirs.stop()


# ---------------------------------------------------------------------- a standby takes over


async def test_consumers_hear_their_groups_again_after_a_failover_to_a_standby_that_lagged(
    server: PostgresServer, standby: PostgresServer, either: str, recovery: Recovery
) -> None:
    # One row tells all members of a process: the new primary must hear of the late one's process.
    async with (
        consumers(either) as theirs,
        consumers(either) as others,
        open_layer(either, **PATIENT) as sender,
    ):
        await theirs.add("early")
        await theirs.add("leaving")
        for number in range(10):
            await sender.group_send("room", {"number": number})
        await theirs.reached(9, "early", "leaving")
        await caught_up(server, standby)
        await cut_off(standby)
        await others.add("late")
        await theirs.layer.group_discard("room", theirs.channels["leaving"])
        for number in range(10, 100):
            await sender.group_send("room", {"number": number})
        await theirs.reached(99, "early")
        await others.reached(99, "late")
        number = 99
        with recovery(
            "failover: a member that the new primary had not heard of gets messages again"
        ):
            await fail_over_to_old_ids(server, standby)
            deadline = time.monotonic() + PATIENCE
            while others.received["late"][-1] == 99 and time.monotonic() < deadline:
                number += 1
                await sender.group_send("room", {"number": number})
        for _ in range(10):
            number += 1
            await sender.group_send("room", {"number": number})
        await theirs.reached(number, "early")
        await others.reached(number, "late")
        # What was sent on the new primary reaches all it knew of, and the others from some time on.
        assert theirs.received["early"] == list(range(number + 1))
        late = others.received["late"]
        assert late[:90] == list(range(10, 100))
        assert late[90:] == list(range(number + 1 - len(late[90:]), number + 1))
        assert theirs.received["leaving"] == list(range(10))


async def test_only_jobs_whose_claim_the_standby_missed_are_received_again_after_a_failover(
    server: PostgresServer, standby: PostgresServer, either: str
) -> None:
    """Messages to the own channel are not, although the standby missed their deletion as well."""
    async with consumers(either) as theirs, open_layer(either, **PATIENT) as sender:
        own = await theirs.layer.new_channel()
        for number in range(50):
            await sender.send(own, {"number": number, "blob": bytes(200 * number)})
            await sender.send("jobs", {"number": number})
        await caught_up(server, standby)
        await cut_off(standby)
        theirs.read("own", own)
        theirs.read("jobs", "jobs")
        await theirs.reached(49, "own", "jobs")
        await use_up_ids(sender)
        await until(lambda: waiting(server, own) == waiting(server, "jobs") == 0)
        assert waiting(standby, own) == waiting(standby, "jobs") == 50
        await fail_over_to_old_ids(server, standby)
        for number in range(50, 100):
            await sender.send(own, {"number": number, "blob": bytes(200 * (number - 50))})
            await sender.send("jobs", {"number": number})
        await theirs.reached(99, "own", "jobs")
        await until(lambda: waiting(standby, own) == waiting(standby, "jobs") == 0)
        assert theirs.received["own"] == list(range(100))
        jobs = theirs.received["jobs"]
        assert jobs[:50] == list(range(50))
        assert jobs[50:] in (list(range(50, 100)), list(range(100)))


async def test_who_leaves_a_group_after_a_failover_has_left(
    server: PostgresServer, standby: PostgresServer, either: str
) -> None:
    async with consumers(either) as theirs, open_layer(either, **PATIENT) as sender:
        await theirs.add("staying")
        await caught_up(server, standby)
        await cut_off(standby)
        await use_up_ids(sender)
        for name in ("leaving", "removed", "returning"):
            await theirs.add(name)
        await fail_over_to_old_ids(server, standby)
        number = 0
        deadline = time.monotonic() + PATIENCE
        while (
            not all(theirs.received.values()) and time.monotonic() < deadline
        ):  # until the new primary has heard of them
            await sender.group_send("room", {"number": number})
            number += 1
            await asyncio.wait_for(
                theirs.layer.group_add("other", theirs.channels["staying"]), PATIENCE
            )
        await theirs.reached(number - 1, *theirs.channels)
        for name in ("leaving", "returning"):
            await theirs.layer.group_discard("room", theirs.channels[name])
        await sender.group_discard("room", theirs.channels["removed"])  # by another process
        await sender.group_send("room", {"number": number})
        await theirs.layer.group_add("room", theirs.channels["returning"])
        await sender.group_send("room", {"number": number + 1})
        for channel in theirs.channels.values():
            await sender.send(channel, {"number": number + 2})
        await theirs.reached(number + 2, *theirs.channels)
        last = {
            name: [n for n in numbers if n >= number] for name, numbers in theirs.received.items()
        }
        assert last == {
            "staying": [number, number + 1, number + 2],
            "leaving": [number + 2],
            "removed": [number + 2],
            "returning": [number + 1, number + 2],
        }


async def test_capacity_counts_from_the_start_after_a_failover(
    server: PostgresServer, standby: PostgresServer, either: str
) -> None:
    async with (
        consumers(either, capacity=20) as theirs,
        open_layer(either, **PATIENT, capacity=20) as sender,
    ):
        await caught_up(server, standby)
        await cut_off(standby)
        # A sender remembers how low the ids of waiting messages may be. On the new primary they are lower.
        await theirs.add("reader", joins=False)
        channel = theirs.channels["reader"]
        for number in range(150):
            await sender.send(channel, {"number": number})
            if number % 10 == 9:
                await theirs.reached(number, "reader")
        theirs.stop()
        await fail_over_to_old_ids(server, standby)
        outcomes = []
        for number in range(40):
            try:
                await sender.send(channel, {"number": number})
                outcomes.append("sent")
            except ChannelFull:
                outcomes.append("full")
        assert outcomes == ["sent"] * 20 + ["full"] * 20


async def write_until_told(link: Link, dsn: str) -> dict[str, dict[int, float]]:
    """Send numbers to the group until told to stop; returns by outcome which, and when that was known."""
    outcomes: dict[str, dict[int, float]] = {"sent": {}, "unknown": {}, "refused": {}}
    async with open_layer(dsn, **PATIENT) as layer:
        told = asyncio.create_task(link.hear())
        number = 0
        while not told.done():
            try:
                await layer.group_send("room", {"number": number})
                outcome = "sent"
            except LayerUnavailable as error:
                outcome = "unknown" if "unknown" in str(error) else "refused"
            outcomes[outcome][number] = time.monotonic()
            number += 1
            await asyncio.wait({told}, timeout=0.005)
    return outcomes


async def test_traffic_goes_on_through_a_failover(
    server: PostgresServer,
    standby: PostgresServer,
    either: str,
    processes: Processes,
    recovery: Recovery,
) -> None:
    async with consumers(either) as theirs:
        await theirs.add("a")
        await theirs.add("b")
        await caught_up(server, standby)
        writer = processes.start(write_until_told, either)
        await theirs.reached(50, "a", "b")
        with recovery("failover under traffic: from the crash to the next message"):
            await asyncio.to_thread(server.stop, "immediate")
            crashed_at = time.monotonic()
            last = theirs.received["a"][-1]
            await promote(standby)
            await until(lambda: theirs.received["a"][-1] > last)
        await theirs.reached(theirs.received["a"][-1] + 50, "a", "b")
        writer.say("stop")
        outcomes = await writer.result()
        await theirs.reached(max(outcomes["sent"]), "a", "b")
        # The last moments before the crash may be lost, and nothing else.
        certain = {number for number, known_at in outcomes["sent"].items() if known_at > crashed_at}
        for numbers in theirs.received.values():
            assert numbers == sorted(set(numbers))
            assert not certain - set(numbers)
            assert not set(numbers) & set(outcomes["refused"])
        assert len(outcomes["unknown"]) <= 1
        assert not outcomes["refused"]


# ---------------------------------------------------------------------- servers that only read


@pytest.mark.parametrize("insists", [False, True], ids=["any server", "read-write"])
async def test_a_standby_alone_is_said_to_be_read_only_until_it_is_promoted(
    server: PostgresServer,
    standby: PostgresServer,
    database: str,
    insists: bool,
    recovery: Recovery,
) -> None:
    await caught_up(server, standby)
    target = "read-write" if insists else "any"
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
                await asyncio.wait_for(call(), PATIENCE)
        assert not receiving.done()
        assert not working.done()
        with recovery(f"a standby is promoted ({target}): until what was refused works"):
            await promote(standby)
            await until_it_works(lambda: layer.group_add("room", channel))
            await layer.group_send("room", {"number": 1})
            assert await asyncio.wait_for(receiving, PATIENCE) == {"number": 1}
        await layer.send("jobs", {"number": 2})
        assert await asyncio.wait_for(working, PATIENCE) == {"number": 2}
        await layer.send(channel, {"number": 3})
        assert await receive(layer, channel) == {"number": 3}
        await layer.flush()


async def until_it_works(call: Callable[[], Awaitable[None]]) -> None:
    """Call until the layer is available; raises its last word if it stays unavailable."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            return await call()
        except LayerUnavailable:
            if time.monotonic() > deadline:
                raise


async def test_a_primary_that_only_reads_any_more_is_given_up_for_its_successor(
    server: PostgresServer, standby: PostgresServer, either: str, recovery: Recovery
) -> None:
    async with (
        consumers(either, heartbeat=2) as theirs,
        open_layer(either, **PATIENT) as sender,
        open_layer(either, send_timeout=1) as hasty,
    ):
        await theirs.add("consumer")
        theirs.read("jobs", "jobs")
        for number in range(10):
            await sender.group_send("room", {"number": number})
            await sender.send("jobs", {"number": number})
            await hasty.group_send("elsewhere", {"number": number})
        await theirs.reached(9, "consumer", "jobs")
        await caught_up(server, standby)
        server.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        server.execute("SELECT pg_reload_conf()")
        await until(lambda: server.execute("SHOW default_transaction_read_only") == [("on",)])
        with recovery(
            "a primary that only reads any more: until a message arrives from its successor"
        ):
            with pytest.raises(LayerUnavailable, match="read-only"):
                await asyncio.wait_for(hasty.group_send("room", {"number": -1}), PATIENCE)
            await promote(standby)
            for number in range(10, 20):
                await sender.group_send("room", {"number": number})
                await sender.send("jobs", {"number": number})
            await until_it_works(lambda: hasty.group_send("room", {"number": 20}))
            await sender.send("jobs", {"number": 20})
            await theirs.reached(20, "consumer", "jobs")
        assert server.running
        assert theirs.received == {"consumer": list(range(21)), "jobs": list(range(21))}
