"""A standby that lags behind its primary is promoted.

Its tables lag behind by a moment. Messages that were received and deleted are there
again. Memberships that have ended are there, and others are missing. Receivers notice none
of that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from devtools.postgres import PostgresServer
from tests.faults.proxy import Proxy
from tests.faults.readers import heartbeats, numbered, readers_of, wait_for_members
from tests.faults.standby import caught_up, cut_off, fail_over, port_of, writable
from tests.processes import listen, open_layer, until

# Nothing expires, and no lease ends. With short heartbeats the client forgets, before the failover,
# the keys that it remembers only for some heartbeats.
OPTIONS: dict[str, object] = {
    "lease": 3600,
    "heartbeat": 0.2,
    "sweep_interval": 0,
    "send_timeout": 30,
    "expiry": 3600,
    "capacity": 1000,
}


@pytest.fixture
def standby(server: PostgresServer, database: str) -> Iterator[PostgresServer]:
    """Yield a standby that streams from the server."""
    with PostgresServer(fsync=False, primary=server) as standby:
        yield standby


@pytest.fixture
def writable_dsn(server: PostgresServer, standby: PostgresServer, database: str) -> str:
    """Return the DSN that leads to the one of the two servers that is the primary."""
    return writable(database, server.port, standby.port)


def rows_waiting(server: PostgresServer, channel: str) -> int:
    """Return how many rows a server has for a channel."""
    query = f"SELECT count(*) FROM pg_layer_message WHERE channel = '{channel}'"
    ((count,),) = server.execute(query, dbname="layer")
    return int(count)


async def test_messages_restored_by_a_lagging_standby_are_not_received_again(
    server: PostgresServer, standby: PostgresServer, writable_dsn: str
) -> None:
    """Messages wait when the replication stops, and are received and deleted afterwards.

    Many heartbeats later the standby is promoted, and these messages wait in its tables. For
    later messages it gives out ids again that the old primary has used.
    """
    async with (
        open_layer(writable_dsn, **OPTIONS) as layer,
        open_layer(writable_dsn, **OPTIONS) as sender,
    ):
        own, member, late = [await layer.new_channel() for _ in range(3)]
        await listen(layer)
        await layer.group_add("room", member)

        async def send(numbers: range) -> None:
            for number in numbers:
                size = 300 * (number % 50)  # some are too large for a notification
                await sender.send(own, numbered(number, size))
                await sender.group_send("room", numbered(number, size))

        await send(range(50))
        await caught_up(server, standby)
        await cut_off(standby)
        async with readers_of(layer, own, member, late) as readers:
            await readers.reached(49, own, member)
            await layer.group_add("room", late)
            await send(range(50, 100))
            await readers.reached(99)
            await until(lambda: rows_waiting(server, own) == 0)
            assert rows_waiting(standby, own) == 50
            await heartbeats(layer, 10)
            await fail_over(server, standby)
            await send(range(100, 150))
            await readers.reached(149)
            await heartbeats(layer, 3)
            await send(range(150, 151))
            await readers.reached(150)
            assert readers.numbers == {
                own: list(range(151)),
                member: list(range(151)),
                late: list(range(50, 151)),
            }


async def test_messages_restored_in_the_middle_of_traffic_are_not_received_again(
    server: PostgresServer, standby: PostgresServer, writable_dsn: str
) -> None:
    """The replication stops in the middle of traffic that is received all the time."""
    async with (
        open_layer(writable_dsn, **OPTIONS) as layer,
        open_layer(writable_dsn, **OPTIONS) as sender,
    ):
        own, member = [await layer.new_channel() for _ in range(2)]
        await listen(layer)
        await layer.group_add("room", member)
        async with readers_of(layer, own, member) as readers:
            number = 0
            stop = asyncio.Event()

            async def send() -> None:
                nonlocal number
                while not stop.is_set():
                    await sender.send(own, numbered(number, 100 * (number % 100)))
                    await sender.group_send("room", numbered(number, 100 * (number % 100)))
                    number += 1

            sending = asyncio.create_task(send())
            await readers.reached(50)
            await cut_off(standby)
            await readers.reached(number + 50)
            stop.set()
            await sending
            await readers.reached(number - 1)
            await heartbeats(layer, 10)
            await fail_over(server, standby)
            for _ in range(20):
                await sender.send(own, numbered(number))
                await sender.group_send("room", numbered(number))
                number += 1
            await readers.reached(number - 1)
            assert readers.numbers == {own: list(range(number)), member: list(range(number))}


async def test_member_unknown_to_a_lagging_standby_receives_all_messages(
    server: PostgresServer, standby: PostgresServer, writable_dsn: str
) -> None:
    """The sender reaches the new primary before the member's process does.

    One membership was made by its own process, one by another. The groups have no other
    members.
    """
    with Proxy(server.dsn("layer")) as old, Proxy(standby.dsn("layer")) as new:
        proxied_dsn = writable(writable_dsn, port_of(old), port_of(new))
        async with (
            open_layer(proxied_dsn, **OPTIONS) as layer,
            open_layer(writable_dsn, **OPTIONS) as sender,
        ):
            own_member, requested_member = [await layer.new_channel() for _ in range(2)]
            await listen(layer)
            await caught_up(server, standby)
            await cut_off(standby)
            await layer.group_add("mine", own_member)
            await sender.group_add("theirs", requested_member)

            async def send(numbers: range) -> None:
                for number in numbers:
                    await sender.group_send("mine", numbered(number))
                    await sender.group_send("theirs", numbered(number))

            async with readers_of(layer, own_member, requested_member) as readers:
                await send(range(10))
                await readers.reached(9)
                for proxy in (old, new):
                    await asyncio.to_thread(proxy.swallow)
                await fail_over(server, standby)
                await send(range(10, 20))
                for proxy in (old, new):
                    await asyncio.to_thread(proxy.let_go)
                await send(range(20, 30))
                await readers.reached(29)
                await wait_for_members(sender, "mine", own_member)
                await wait_for_members(sender, "theirs", requested_member)
                await send(range(30, 31))
                await readers.reached(30)
                assert readers.numbers == {
                    own_member: list(range(31)),
                    requested_member: list(range(31)),
                }


async def test_membership_that_ended_while_the_standby_lagged_does_not_return(
    server: PostgresServer, standby: PostgresServer, writable_dsn: str
) -> None:
    """Other processes and the owner have made and ended memberships.

    The standby knows only their beginning, in one case before the owner knew of it.
    """
    async with (
        open_layer(writable_dsn, **OPTIONS) as layer,
        open_layer(writable_dsn, **OPTIONS) as other,
    ):
        kept, left, removed, invited = [await layer.new_channel() for _ in range(4)]
        await listen(layer)
        for channel in (kept, left, removed):
            await layer.group_add("room", channel)
        await other.group_add("room", invited)
        await caught_up(server, standby)
        await cut_off(standby)
        await layer.group_discard("room", left)
        await other.group_discard("room", removed)
        await other.group_discard("room", invited)
        async with readers_of(layer, kept, left, removed, invited) as readers:
            await other.group_send("room", numbered(0))
            await readers.reached(0, kept)
            await heartbeats(layer, 5)
            await fail_over(server, standby)
            for number in range(1, 20):
                await other.group_send("room", numbered(number))
            await readers.reached(19, kept)
            await heartbeats(layer, 3)
            await other.group_send("room", numbered(20))
            await readers.reached(20, kept)
            for channel in (left, removed, invited):
                await other.send(channel, numbered(100))
            await readers.reached(100, left, removed, invited)
            ended = {channel: [100] for channel in (left, removed, invited)}
            assert readers.numbers == {kept: list(range(21)), **ended}
            await wait_for_members(other, "room", kept)


async def test_message_without_a_boot_after_failover_reaches_members_of_the_old_server(
    server: PostgresServer, standby: PostgresServer, writable_dsn: str
) -> None:
    """The member joined when the old server was many transactions ahead of the standby.

    The promoted standby gives out these transaction ids again. It gives the first ones to an
    application, before any process of the layer is connected, so that their boot is 0.
    """
    # No heartbeat: the member still remembers the moment in which it began.
    options = {**OPTIONS, "heartbeat": 600}
    with Proxy(server.dsn("layer")) as old, Proxy(standby.dsn("layer")) as new:
        async with open_layer(
            writable(writable_dsn, port_of(old), port_of(new)), **options
        ) as layer:
            member = await layer.new_channel()
            await listen(layer)
            await caught_up(server, standby)
            await cut_off(standby)
            for _ in range(50):
                server.execute("SELECT pg_current_xact_id()", dbname="layer")
            await layer.group_add("room", member)
            async with readers_of(layer, member) as readers:
                for proxy in (old, new):
                    await asyncio.to_thread(proxy.swallow)
                await fail_over(server, standby)
                for number in range(3):
                    message = f'{{"type": "test", "number": {number}}}'
                    standby.execute(
                        f"SELECT pg_layer_group_send('room', '{message}')", dbname="layer"
                    )
                boots = standby.execute(
                    "SELECT DISTINCT boot FROM pg_layer_message WHERE address LIKE '%@room'",
                    dbname="layer",
                )
                assert boots == [(0,)]
                for proxy in (old, new):
                    await asyncio.to_thread(proxy.let_go)
                await readers.reached(2)
                assert readers.numbers == {member: [0, 1, 2]}
