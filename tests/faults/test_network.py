"""The network between a layer and its server is cut, or swallows packets and closes nothing."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Iterator

import psycopg
import pytest

from pg_layer import LayerUnavailable
from tests.conftest import MakeLayer, Observer
from tests.faults.proxy import Proxy
from tests.faults.traffic import (
    Recovery,
    Traffic,
    TrafficProcess,
    all_listen_again,
    assert_outage_logged_once,
)
from tests.processes import listen, receive, until

pytestmark = pytest.mark.slow

HEARTBEAT = 1.0
SWALLOWING = {"heartbeat": HEARTBEAT, "lease": 300, "send_timeout": 2}
CUTTING = 5.0  # seconds
CUTTING_EVERY = (0.02, 0.4)


@pytest.fixture
def pool_proxy(migrated_dsn: str) -> Iterator[Proxy]:
    with Proxy(migrated_dsn) as proxy:
        yield proxy


@pytest.fixture
def listen_proxy(migrated_dsn: str) -> Iterator[Proxy]:
    with Proxy(migrated_dsn) as proxy:
        yield proxy


@contextlib.asynccontextmanager
async def begin(
    dsn: str, pool_proxy: Proxy, listen_proxy: Proxy, **options: object
) -> AsyncIterator[Traffic]:
    """Run two receivers behind the proxies, a sender behind the pool's, and a direct sender."""
    traffic = Traffic(dsn)
    try:
        for _ in range(2):
            await traffic.serve(
                pool_proxy.dsn(connect_timeout=2),
                listen_dsn=listen_proxy.dsn(connect_timeout=2),
                **options,
            )
        traffic.send(pool_proxy.dsn(connect_timeout=2), **options)
        traffic.send(dsn, **options)
        await traffic.arrives_again()
        yield traffic
    finally:
        traffic.close()


async def problems_of(traffic: Traffic, receiver: TrafficProcess) -> list[str]:
    """Return the problems that ``health()`` of a receiver reports."""
    receiver.health.clear()
    receiver.process.say("health")
    await traffic.until(lambda: receiver.health)
    problems: list[str] = receiver.health[0]["problems"]
    return problems


# ---------------------------------------------------------------------- cut


async def test_connections_cut_repeatedly_lose_nothing(
    migrated_dsn: str, pool_proxy: Proxy, listen_proxy: Proxy, recovery: Recovery
) -> None:
    async with begin(migrated_dsn, pool_proxy, listen_proxy) as traffic:
        deadline = time.monotonic() + CUTTING
        while time.monotonic() < deadline:
            for proxy in random.choice(
                ((pool_proxy,), (listen_proxy,), (pool_proxy, listen_proxy))
            ):
                proxy.cut()
            await asyncio.sleep(random.uniform(*CUTTING_EVERY))
        with recovery("all connections cut repeatedly"):
            await traffic.arrives_again()
        assert await traffic.end() == []
        undisturbed = traffic.senders[1]
        assert not undisturbed.failed


async def test_send_after_its_idle_connection_was_cut_succeeds(
    migrated_dsn: str, make_layer: MakeLayer, pool_proxy: Proxy
) -> None:
    layer, sender = make_layer(), make_layer(dsn=pool_proxy.dsn())
    channel = await layer.new_channel()
    await listen(layer)
    for number in range(10):
        await sender.send(channel, {"number": number})
        pool_proxy.cut()
    assert [(await receive(layer, channel))["number"] for _ in range(10)] == list(range(10))


# ---------------------------------------------------------------------- swallowed


@pytest.mark.parametrize("revive", [True, False], ids=["old connections revive", "stay dead"])
@pytest.mark.parametrize("swallowed", ["listener", "pool", "both"])
async def test_network_swallowing_packets_is_noticed_and_loses_nothing(
    migrated_dsn: str,
    pool_proxy: Proxy,
    listen_proxy: Proxy,
    recovery: Recovery,
    swallowed: str,
    revive: bool,
) -> None:
    swallowing = {
        "listener": [listen_proxy],
        "pool": [pool_proxy],
        "both": [pool_proxy, listen_proxy],
    }[swallowed]
    async with begin(migrated_dsn, pool_proxy, listen_proxy, **SWALLOWING) as traffic:
        disturbed, undisturbed = traffic.senders
        for proxy in swallowing:
            proxy.swallow()
        with recovery(f"swallowed for {swallowed}, until noticed (promise: {2 * HEARTBEAT:g} s)"):
            await traffic.until(lambda: all(receiver.warnings() for receiver in traffic.receivers))
        assert all([await problems_of(traffic, receiver) for receiver in traffic.receivers])
        if pool_proxy in swallowing:
            # No send hangs: in each stream two sends in succession fail.
            await traffic.until(
                lambda: len(disturbed.failed) == 4 and min(disturbed.failed.values()) >= 2
            )
        for proxy in swallowing:
            proxy.let_go(revive=revive)
        fate = "old connections revive" if revive else "old ones stay dead"
        with recovery(f"swallowed for {swallowed}, {fate}, from the network's return"):
            await traffic.arrives_again()
        await all_listen_again(traffic)
        problems = [await problems_of(traffic, receiver) for receiver in traffic.receivers]
        assert problems == [[], []], [receiver.warnings() for receiver in traffic.receivers]
        assert await traffic.end() == []
        assert not undisturbed.failed
        assert not disturbed.failed or pool_proxy in swallowing
        assert_outage_logged_once(traffic)


async def test_network_swallowing_packets_briefly_loses_nothing(
    migrated_dsn: str, pool_proxy: Proxy, listen_proxy: Proxy, recovery: Recovery
) -> None:
    """The interruptions are too short to be noticed, or a little longer.

    Old connections continue afterwards, or stay unusable.
    """
    async with begin(migrated_dsn, pool_proxy, listen_proxy, **SWALLOWING) as traffic:
        for _ in range(4):
            for proxy in random.choice(
                ((pool_proxy,), (listen_proxy,), (pool_proxy, listen_proxy))
            ):
                proxy.swallow()
            await asyncio.sleep(random.choice((0.1, 0.5, 1.0, 2.2)))
            for proxy in (pool_proxy, listen_proxy):
                proxy.let_go(revive=random.random() < 0.5)
            with recovery("swallowed briefly, several times"):
                await traffic.arrives_again()
        assert await traffic.end() == []


async def test_sends_into_a_swallowing_network_raise_after_send_timeout(
    make_layer: MakeLayer, pool_proxy: Proxy, recovery: Recovery
) -> None:
    """On an open connection and on a new one; single and concurrent calls of every kind."""
    layer = make_layer(dsn=pool_proxy.dsn(connect_timeout=2), send_timeout=3)
    await layer.send("jobs", {})
    pool_proxy.swallow()
    for _ in range(2):
        with recovery("send_timeout of 3 s"):
            results = await asyncio.wait_for(
                asyncio.gather(
                    *(layer.send(f"jobs-{number}", {}) for number in range(50)),
                    layer.group_send("room", {}),
                    layer.group_add("room", "jobs"),
                    layer.group_discard("room", "jobs-0"),
                    layer.flush(),
                    return_exceptions=True,
                ),
                30,
            )
        assert all(isinstance(result, LayerUnavailable) for result in results)
    pool_proxy.let_go(revive=False)
    await layer.send("jobs", {})


@pytest.mark.parametrize("swallowed", ["listener", "all"])
async def test_receive_in_a_swallowing_network_waits_and_raises_nothing(
    migrated_dsn: str, make_layer: MakeLayer, pool_proxy: Proxy, listen_proxy: Proxy, swallowed: str
) -> None:
    """Only the heartbeat shows that an idle listener has become deaf."""
    dsn = pool_proxy.dsn(connect_timeout=2) if swallowed == "all" else migrated_dsn
    layer = make_layer(dsn=dsn, listen_dsn=listen_proxy.dsn(connect_timeout=2), **SWALLOWING)
    sender = make_layer()
    channel = await layer.new_channel()
    await listen(layer)
    receiving = [asyncio.create_task(receive(layer, name)) for name in (channel, "jobs")]
    for proxy in (pool_proxy, listen_proxy):
        proxy.swallow()
    for name in (channel, "jobs"):
        await sender.send(name, {"number": 1})
    await asyncio.wait(receiving, timeout=2.5 * HEARTBEAT)
    assert all(task.exception() is None for task in receiving if task.done())
    for proxy in (pool_proxy, listen_proxy):
        proxy.let_go(revive=False)
    assert await asyncio.gather(*receiving) == [{"number": 1}] * 2


# ---------------------------------------------------------------------- late statements


async def test_claim_delivered_after_it_was_given_up_claims_nothing(
    migrated_dsn: str, make_layer: MakeLayer, pool_proxy: Proxy, observer: Observer
) -> None:
    """A network may deliver a statement long after its sender has closed the connection."""
    layer, other = make_layer(), make_layer()
    client = make_layer(
        dsn=pool_proxy.dsn(connect_timeout=2),
        listen_dsn=migrated_dsn,
        send_timeout=1,
        lease=300,
        heartbeat=100,
    )
    await listen(client)
    first_job = asyncio.create_task(client.receive("jobs"))
    await layer.send("jobs", {"number": 0})
    assert await first_job == {"number": 0}
    await until(
        lambda: observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (0,)
    )

    pool_proxy.swallow()
    second_job = asyncio.create_task(client.receive("jobs"))
    # The client is notified of the job, and its claim does not reach the server.
    await layer.send("jobs", {"number": 1})
    await until(lambda: not client._loops.client.is_fence_raised)
    pool_proxy.let_go(revive=False)  # new connections reach the server
    assert await asyncio.wait_for(second_job, 10) == {"number": 1}
    await until(
        lambda: observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (0,)
    )

    await layer.send("jobs", {"number": 2})  # no reader waits for it
    connections = b"SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
    before = observer.execute(connections).fetchone()
    pool_proxy.let_go()  # the claim reaches the server now, and its connection ends
    await until(lambda: observer.execute(connections).fetchone() != before)
    assert observer.execute("SELECT address FROM pg_layer_message").fetchall() == [("asgi!:jobs",)]
    assert await receive(other, "jobs") == {"number": 2}


async def test_claim_and_release_with_an_old_fence_are_refused(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer()
    await listen(layer)
    await layer.send("jobs", {"number": 0})
    [(address,)] = observer.execute("SELECT address FROM pg_layer_client").fetchall()
    observer.execute("SELECT pg_layer_raise_fence(%s, 5)", [address])
    observer.execute("SELECT pg_layer_raise_fence(%s, 3)", [address])  # a late one, without effect
    with pytest.raises(
        psycopg.errors.ObjectNotInPrerequisiteState, match="given this statement up"
    ):
        observer.execute("SELECT pg_layer_claim('asgi', 'jobs', %s, 4, 0, 1)", [address])
    claim = "SELECT boot, xid, id FROM pg_layer_claim('asgi', 'jobs', %s, 5, 0, 1)"
    [key] = observer.execute(claim, [address]).fetchall()
    release = "SELECT pg_layer_release('asgi', %s, %s, ARRAY[%s], ARRAY[%s], ARRAY[%s])"
    with pytest.raises(
        psycopg.errors.ObjectNotInPrerequisiteState, match="given this statement up"
    ):
        observer.execute(release, [address, 4, *key])
    where = "SELECT address FROM pg_layer_message WHERE channel = 'jobs'"
    assert observer.execute(where).fetchall() == [(address,)]
    observer.execute(release, [address, 5, *key])
    assert observer.execute(where).fetchall() == [("asgi!:jobs",)]
