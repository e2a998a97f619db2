"""Memberships that their owner changes during a flush: table and owner agree afterwards.

A statement of the owner waits at the server, and then its answer in the network. So the flush takes
effect between the statement and the answer.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import psycopg
import pytest

from pg_layer import PostgresChannelLayer
from tests.conftest import MakeLayer, Observer
from tests.faults.proxy import Proxy
from tests.faults.test_membership_agreement import Agreement, new_channels
from tests.processes import TIMEOUT, Link, Process, Processes, listen, open_layer, receive, until

GROUP = "room"
WRITE, FLUSH = "pg_layer_write_memberships", "pg_layer_flush"
LOCK = 7205759403792794  # that statements take when they write messages
ROUNDS = 25
CHANNELS = 30
LONG = 120.0  # seconds, the send_timeout of calls that no test waits for


@pytest.fixture
def proxy(migrated_dsn: str) -> Iterator[Proxy]:
    with Proxy(migrated_dsn) as proxy:
        yield proxy


@pytest.fixture
async def proxied(migrated_dsn: str, proxy: Proxy) -> AsyncIterator[PostgresChannelLayer]:
    """Return a layer whose statements go through the proxy, and whose listener does not."""
    async with open_layer(
        proxy.dsn(), listen_dsn=migrated_dsn, send_timeout=LONG, pool_max_size=8
    ) as layer:
        yield layer


async def until_locked_out(observer: Observer, statement: str, count: int = 1) -> list[int]:
    """Wait until several statements with a text wait for a lock. Return their clients' ports."""
    query = (
        "SELECT client_port FROM pg_stat_activity WHERE datname = current_database() AND"
        " pid <> pg_backend_pid() AND wait_event_type = 'Lock' AND strpos(query, %s) > 0"
    )

    def ports() -> list[int]:
        found = [port for (port,) in observer.execute(query, [statement])]
        return found if len(found) == count else []

    return await until(ports)


@asynccontextmanager
async def answer_held(
    dsn: str, observer: Observer, proxy: Proxy, layer: PostgresChannelLayer
) -> AsyncIterator[None]:
    """Hold back the answer to the layer's present write of memberships, which is committed."""
    address = layer._loops.client.address
    query = "SELECT FROM pg_stat_activity WHERE client_port = %s AND state <> 'idle'"
    with psycopg.connect(dsn) as blocker:
        blocker.execute("SELECT FROM pg_layer_client WHERE address = %s FOR UPDATE", [address])
        [port] = await until_locked_out(observer, WRITE)
        proxy.hold(port)
    await until(lambda: observer.execute(query, [port]).fetchone() is None)
    try:
        yield
    finally:
        proxy.let_go()


async def act_elsewhere(link: Link, dsn: str, group: str) -> None:
    """Make changes for the test until it sends None."""
    async with open_layer(dsn) as layer:
        await layer.group_count(group)
        link.say("ready")
        while (order := await link.hear()) is not None:
            for call, *arguments in order:
                await getattr(layer, call)(*arguments)
            link.say("done")


async def start_elsewhere(processes: Processes, dsn: str) -> Process[None]:
    process = processes.start(act_elsewhere, dsn, GROUP)
    assert await process.hear() == "ready"
    return process


@pytest.mark.parametrize("was_member", [False, True], ids=["new", "member"])
async def test_group_add_answered_after_a_flush_is_kept_and_listed(
    migrated_dsn: str,
    make_layer: MakeLayer,
    observer: Observer,
    proxy: Proxy,
    proxied: PostgresChannelLayer,
    was_member: bool,
) -> None:
    """The owner writes a row. A flush removes it and is applied. Then the answer arrives.

    In the owner's order the flush precedes the change. So the channel is a member when `group_add`
    returns, and another process does not find the group empty.
    """
    other = make_layer()
    [channel, marker] = await new_channels(proxied, 2)
    if was_member:
        await proxied.group_add(GROUP, channel)
    adding = asyncio.create_task(proxied.group_add(GROUP, channel))
    async with answer_held(migrated_dsn, observer, proxy, proxied):
        await other.flush()
        await other.send(marker, {"type": "flushed"})
        assert await receive(proxied, marker) == {"type": "flushed"}
        assert not adding.done()
    await asyncio.wait_for(adding, TIMEOUT)
    pairs = [(GROUP, channel)]
    agreement = Agreement(proxied, other)
    assert await agreement.look(pairs) == (set(pairs), set(pairs))
    assert await agreement.reached_by_all(pairs) == set(pairs)


@pytest.mark.parametrize(
    "flushes_elsewhere", [False, True], ids=["same process", "another process"]
)
async def test_memberships_changed_beside_flushes_agree_with_the_table(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    observer: Observer,
    proxy: Proxy,
    proxied: PostgresChannelLayer,
    flushes_elsewhere: bool,
) -> None:
    """In each round two processes change memberships of the same channels, beside flushes.

    The answer to one statement of the owner is late. After each round a channel is listed if and
    only if a message reaches it.
    """
    channels = await new_channels(proxied, CHANNELS)
    agreement = Agreement(proxied, make_layer())
    other = await start_elsewhere(processes, migrated_dsn)
    pairs = [(GROUP, channel) for channel in channels]

    async def change() -> None:
        for _ in range(2):
            call = random.choice([proxied.group_add, proxied.group_add, proxied.group_discard])
            await call(GROUP, random.choice(channels))

    for _ in range(ROUNDS):
        tasks = [asyncio.create_task(change()) for _ in range(4)]
        orders: list[tuple[str, ...]] = [
            (random.choice(["group_add", "group_discard"]), GROUP, random.choice(channels))
            for _ in range(4)
        ]
        async with answer_held(migrated_dsn, observer, proxy, proxied):
            if flushes_elsewhere:
                orders.insert(random.randrange(3), ("flush",))
            else:
                await proxied.flush()
            other.say(orders)
            assert await other.hear() == "done"
        await asyncio.wait_for(asyncio.gather(*tasks), TIMEOUT)
        await agreement.reached_by_all(pairs)


async def test_flush_whose_control_message_another_flush_replaced_returns(
    make_layer: MakeLayer,
    observer: Observer,
    proxy: Proxy,
    proxied: PostgresChannelLayer,
    migrated_dsn: str,
) -> None:
    """After its flush a process cannot read for a while. Another flush replaces the row."""
    other = make_layer()
    await listen(proxied)
    with psycopg.connect(migrated_dsn) as blocker:
        blocker.execute("SELECT pg_advisory_xact_lock(%s)", [LOCK])
        first = asyncio.create_task(proxied.flush())
        await until_locked_out(observer, FLUSH)
        second = asyncio.create_task(other.flush())
        await until_locked_out(observer, FLUSH, 2)
        proxy.swallow()
        blocker.rollback()
    active = (
        "SELECT FROM pg_stat_activity WHERE datname = current_database() AND"
        " pid <> pg_backend_pid() AND state = 'active' AND strpos(query, %s) > 0"
    )
    await until(lambda: observer.execute(active, [FLUSH]).fetchone() is None)
    proxy.let_go()
    await asyncio.wait_for(asyncio.gather(first, second), TIMEOUT)
