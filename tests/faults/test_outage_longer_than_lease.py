"""The database is unavailable for longer than a lease.

Time in which the database is down ends no lease. So a process that still runs loses nothing
that was acknowledged, whichever process reconnects first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import psycopg
import pytest
from psycopg.types.json import Jsonb

from devtools.postgres import PostgresServer
from devtools.postgres.server import StopMode
from tests.faults.proxy import Proxy
from tests.faults.readers import numbered, readers_of
from tests.faults.standby import caught_up, fail_over, port_of, writable
from tests.processes import Link, Processes, listen, open_layer, until
from tests.project.commands import manage, succeeded

LEASE = 2.0
# No process sweeps by itself.
SHORT_LEASE: dict[str, object] = {
    "lease": LEASE,
    "heartbeat": 0.5,
    "sweep_interval": 0,
    "send_timeout": 30,
    "expiry": 3600,
}


@pytest.fixture
def processes() -> Iterator[Processes]:
    """Yield a starter of processes, which end with the test."""
    started = Processes()
    yield started
    started.close()


async def wait_longer_than(lease: float = LEASE) -> None:
    """Sleep for longer than the lease. The database is down, so no event can announce its end."""
    await asyncio.sleep(lease + 1)


async def sweep(dsn: str) -> None:
    """Run the sweeper once."""
    succeeded(await asyncio.to_thread(manage, dsn, "pg_layer_sweep", "--once"))


async def send_on_command(link: Link, dsn: str, channel: str) -> None:
    """Send each range of numbers from the test to the channel and to "room".

    Report when each range is sent. Runs in a process.
    """
    async with open_layer(dsn, send_timeout=60, expiry=3600) as layer:
        while (numbers := await link.hear()) is not None:
            for number in numbers:
                await layer.send(channel, numbered(number))
                await layer.group_send("room", numbered(number))
            link.say("sent")


def send_by_sql(dsn: str, channel: str, number: int) -> None:
    """Send a number to the channel and to "room" by the SQL functions."""
    message = Jsonb({"type": "test", "number": number})
    with psycopg.connect(dsn, autocommit=True) as connection:
        row = connection.execute("SELECT pg_layer_send(%s, %s)", (channel, message)).fetchone()
        assert row == (True,)
        connection.execute("SELECT pg_layer_group_send('room', %s)", (message,))


@pytest.mark.parametrize("stop_mode", ["fast", "immediate"], ids=["restart", "crash"])
async def test_sender_back_before_the_reader_after_a_long_outage_reaches_it(
    server: PostgresServer, database: str, processes: Processes, stop_mode: StopMode
) -> None:
    """The reader's network is down for a moment longer than the server.

    So the sender in another process, and SQL, send before the reader has renewed its lease.
    """
    with Proxy(database) as proxy:
        async with open_layer(proxy.dsn(), **SHORT_LEASE) as layer:
            own, member = [await layer.new_channel() for _ in range(2)]
            await listen(layer)
            await layer.group_add("room", member)
            async with readers_of(layer, own, member) as readers:
                sender = processes.start(send_on_command, database, own)
                sender.say(range(1))
                assert await sender.hear() == "sent"
                await readers.reached(0)
                await asyncio.to_thread(proxy.swallow)
                await asyncio.to_thread(server.stop, stop_mode)
                await wait_longer_than()
                await asyncio.to_thread(server.start)
                sender.say(range(1, 20))
                assert await sender.hear() == "sent"
                await asyncio.to_thread(send_by_sql, database, own, 20)
                await asyncio.to_thread(proxy.let_go)
                await readers.reached(20)
                sender.say(range(21, 30))
                assert await sender.hear() == "sent"
                await readers.reached(29)
                assert readers.numbers == {own: list(range(30)), member: list(range(30))}
            sender.say(None)
            await sender.result()


async def test_calls_waiting_in_one_process_take_effect_after_a_long_outage(
    server: PostgresServer, database: str
) -> None:
    """The calls begin while the server is down, and succeed at the moment of its return.

    They wait for the only connection of the pool. The listening connection comes back later, so
    that the process has not renewed its lease by then.
    """
    lease = 4.0
    with Proxy(database) as proxy:
        options = {**SHORT_LEASE, "lease": lease, "heartbeat": 0.4 * lease, "pool_max_size": 1}
        async with open_layer(database, listen_dsn=proxy.dsn(), **options) as layer:
            own, member, late = [await layer.new_channel() for _ in range(3)]
            await listen(layer)
            await layer.group_add("room", member)
            async with readers_of(layer, own, member, late) as readers:

                async def send(numbers: range) -> None:
                    for number in numbers:
                        await layer.group_send("room", numbered(number))
                        await layer.send(own, numbered(number))

                await asyncio.to_thread(proxy.swallow)
                await asyncio.to_thread(server.stop)
                sending = asyncio.create_task(send(range(20)))
                joining = asyncio.create_task(layer.group_add("room", late))
                await wait_longer_than(lease)
                assert not sending.done()
                assert not joining.done()
                await asyncio.to_thread(server.start)
                await sending
                await asyncio.to_thread(proxy.let_go)
                await joining
                await send(range(20, 30))
                await readers.reached(29)
                assert readers.numbers[own] == readers.numbers[member] == list(range(30))
                assert set(range(20, 30)) <= set(readers.numbers[late])


async def test_sweeper_back_before_the_reader_removes_nothing_of_it(
    server: PostgresServer, database: str
) -> None:
    """Messages were committed before the outage, and the reader has not received them.

    The sweeper reaches the server first, when no process has renewed a lease yet.
    """
    with Proxy(database) as proxy:
        async with (
            open_layer(proxy.dsn(), **SHORT_LEASE) as layer,
            open_layer(database, send_timeout=30, expiry=3600) as sender,
        ):
            own, member = [await layer.new_channel() for _ in range(2)]
            await listen(layer)
            await layer.group_add("room", member)
            async with readers_of(layer, own, member) as readers:
                await asyncio.to_thread(proxy.swallow)
                for number in range(10):
                    await sender.send(own, numbered(number, 1000 * number))
                    await sender.group_send("room", numbered(number, 1000 * number))
                await asyncio.to_thread(server.stop)
                await wait_longer_than()
                await asyncio.to_thread(server.start)
                await sweep(database)
                assert await sender.group_channels("room") == [member]
                assert not readers.numbers[own]
                await asyncio.to_thread(proxy.let_go)
                await readers.reached(9)
                await sender.send(own, numbered(10))
                await sender.group_send("room", numbered(10))
                await readers.reached(10)
                assert readers.numbers == {own: list(range(11)), member: list(range(11))}


async def test_reader_and_sweeper_back_before_another_reader_remove_nothing_of_it(
    server: PostgresServer, database: str
) -> None:
    """The first reader that returns renews its lease. The other one still has a whole lease."""
    lease = 8.0
    options: dict[str, object] = {**SHORT_LEASE, "lease": lease}
    with Proxy(database) as proxy:
        async with (
            open_layer(proxy.dsn(), **options) as layer,
            open_layer(database, **options) as first_reader,
        ):
            own, member = [await layer.new_channel() for _ in range(2)]
            early = await first_reader.new_channel()
            await listen(layer)
            await layer.group_add("room", member)
            await first_reader.group_add("room", early)
            async with (
                readers_of(layer, own, member) as readers,
                readers_of(first_reader, early) as others,
            ):
                await asyncio.to_thread(proxy.swallow)
                for number in range(10):
                    await first_reader.send(own, numbered(number, 1000 * number))
                    await first_reader.group_send("room", numbered(number, 1000 * number))
                await asyncio.to_thread(server.stop)
                await wait_longer_than(lease)
                await asyncio.to_thread(server.start)
                await until(lambda: (first_reader.stats()["lease_age"] or lease) < lease / 2)
                await sweep(database)
                for number in range(10, 20):
                    await first_reader.send(own, numbered(number))
                    await first_reader.group_send("room", numbered(number))
                await asyncio.to_thread(proxy.let_go)
                await readers.reached(19)
                await others.reached(19)
                assert sorted(await first_reader.group_channels("room")) == sorted([early, member])
                assert readers.numbers == {own: list(range(20)), member: list(range(20))}
                assert others.numbers == {early: list(range(20))}


@pytest.mark.parametrize("sweeps", [False, True], ids=["no sweep", "sweep"])
async def test_sender_back_before_the_reader_after_a_failover_reaches_it(
    server: PostgresServer, database: str, processes: Processes, sweeps: bool
) -> None:
    """The standby was started long before. It is promoted after a whole lease."""
    with PostgresServer(fsync=False, primary=server) as standby:
        promoted = standby.dsn("layer")
        with Proxy(database) as old, Proxy(promoted) as new:
            proxied_dsn = writable(database, port_of(old), port_of(new))
            async with open_layer(proxied_dsn, **SHORT_LEASE) as layer:
                own, member = [await layer.new_channel() for _ in range(2)]
                await listen(layer)
                await layer.group_add("room", member)
                async with readers_of(layer, own, member) as readers:
                    writable_dsn = writable(database, server.port, standby.port)
                    sender = processes.start(send_on_command, writable_dsn, own)
                    sender.say(range(1))
                    assert await sender.hear() == "sent"
                    await readers.reached(0)
                    await caught_up(server, standby)
                    for proxy in (old, new):
                        await asyncio.to_thread(proxy.swallow)
                    await asyncio.to_thread(server.stop, "immediate")
                    await wait_longer_than()
                    await fail_over(server, standby)
                    if sweeps:
                        await sweep(promoted)
                    sender.say(range(1, 20))
                    assert await sender.hear() == "sent"
                    await asyncio.to_thread(send_by_sql, promoted, own, 20)
                    for proxy in (old, new):
                        await asyncio.to_thread(proxy.let_go)
                    await readers.reached(20)
                    assert readers.numbers == {own: list(range(21)), member: list(range(21))}
                sender.say(None)
                await sender.result()
