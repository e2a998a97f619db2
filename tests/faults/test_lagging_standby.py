"""A standby takes over that lags behind its primary.

Its tables are those of a moment ago: messages that were received and deleted are there again, and
memberships are there that have ended, or are missing. None of that shows at the receivers.
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

# Nothing expires, and no lease ends. The heartbeats are quick: what a client remembers for some
# of them only is forgotten before the failover.
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
    """A standby that streams from the server."""
    with PostgresServer(fsync=False, primary=server) as standby:
        yield standby


@pytest.fixture
def either(server: PostgresServer, standby: PostgresServer, database: str) -> str:
    """The DSN that leads to the one of the two that is the primary."""
    return writable(database, server.port, standby.port)


def waiting(server: PostgresServer, channel: str) -> int:
    """The rows that a server has for a channel."""
    query = f"SELECT count(*) FROM pg_layer_message WHERE channel = '{channel}'"
    ((count,),) = server.execute(query, dbname="layer")
    return int(count)


async def test_messages_that_return_with_a_lagging_standby_are_not_received_again(
    server: PostgresServer, standby: PostgresServer, either: str
) -> None:
    """Messages wait when the standby stops to follow, and are received and deleted afterwards.

    Many heartbeats later the standby takes over, and has them as if they still waited. It hands
    out the ids of the others again, which it has not heard of.
    """
    async with open_layer(either, **OPTIONS) as layer, open_layer(either, **OPTIONS) as sender:
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
            await until(lambda: waiting(server, own) == 0)
            assert waiting(standby, own) == 50
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


async def test_messages_of_a_standby_that_lagged_in_steps_are_not_received_again(
    server: PostgresServer, standby: PostgresServer, either: str
) -> None:
    """The standby stops to follow in the middle of traffic that is received all the time."""
    async with open_layer(either, **OPTIONS) as layer, open_layer(either, **OPTIONS) as sender:
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


async def test_member_that_a_lagging_standby_never_heard_of_receives_all_that_is_sent_to_it(
    server: PostgresServer, standby: PostgresServer, either: str
) -> None:
    """The sender reaches the new primary before the member's process does.

    One membership was made by its own process, one by another; no other channel is in the groups.
    """
    with Proxy(server.dsn("layer")) as old, Proxy(standby.dsn("layer")) as new:
        by_proxy = writable(either, port_of(old), port_of(new))
        async with (
            open_layer(by_proxy, **OPTIONS) as layer,
            open_layer(either, **OPTIONS) as sender,
        ):
            mine, theirs = [await layer.new_channel() for _ in range(2)]
            await listen(layer)
            await caught_up(server, standby)
            await cut_off(standby)
            await layer.group_add("mine", mine)
            await sender.group_add("theirs", theirs)

            async def send(numbers: range) -> None:
                for number in numbers:
                    await sender.group_send("mine", numbered(number))
                    await sender.group_send("theirs", numbered(number))

            async with readers_of(layer, mine, theirs) as readers:
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
                await wait_for_members(sender, "mine", mine)
                await wait_for_members(sender, "theirs", theirs)
                await send(range(30, 31))
                await readers.reached(30)
                assert readers.numbers == {mine: list(range(31)), theirs: list(range(31))}


async def test_membership_that_ended_while_the_standby_lagged_does_not_return(
    server: PostgresServer, standby: PostgresServer, either: str
) -> None:
    """Other processes and the owner have made and ended memberships.

    The standby knows of their beginning alone, also where the owner had not yet been told.
    """
    async with open_layer(either, **OPTIONS) as layer, open_layer(either, **OPTIONS) as other:
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


async def test_message_of_a_transaction_that_knows_no_boot_comes_to_members_of_the_lost_server(
    server: PostgresServer, standby: PostgresServer, either: str
) -> None:
    """The member joined when the old server was many transactions ahead of the standby.

    The promoted standby hands out their numbers again, at first to a transaction of an application, before
    any process of the layer has come back.
    """
    options = {**OPTIONS, "heartbeat": 600}  # what a member remembers of its beginning stays
    with Proxy(server.dsn("layer")) as old, Proxy(standby.dsn("layer")) as new:
        async with open_layer(writable(either, port_of(old), port_of(new)), **options) as layer:
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
                    standby.execute(
                        f"""SELECT pg_layer_group_send('room', '{{"type": "test", "number": {number}}}')""",
                        dbname="layer",
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
