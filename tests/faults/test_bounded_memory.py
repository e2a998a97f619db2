"""A client remembers which messages it has seen for a bounded time, in every mode."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import tracemalloc
from collections.abc import AsyncIterator, Iterator

import pytest

from devtools.postgres import PostgresServer
from pg_layer import PostgresChannelLayer
from tests.components import require_executable
from tests.conftest import MakeLayer, Observer
from tests.faults.conftest import migrate
from tests.faults.pgbouncer import PgBouncer, version
from tests.faults.readers import heartbeats, numbered
from tests.processes import Link, Process, Processes, listen, open_layer, until

pytestmark = pytest.mark.slow

OPTIONS: dict[str, object] = {
    "lease": 3600,
    "heartbeat": 0.3,
    "sweep_interval": 0,
    "send_timeout": 30,
    "expiry": 3600,
    "capacity": 100_000,
}
BATCH = 500  # messages to a channel and to a group, in one statement each
BATCHES = 20
FEW = 100  # keys that may be remembered when nothing is in flight
BYTES = 20  # permitted growth for each message; a key that is kept takes more
FIRST_TO_PREPARE = (1, 21)


@pytest.fixture
def processes() -> Iterator[Processes]:
    """Yield a starter of processes, which end with the test."""
    started = Processes()
    yield started
    started.close()


@pytest.fixture
def traced_memory() -> Iterator[None]:
    """Trace Python's memory while the test runs."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


async def send_batches(link: Link, dsn: str, channel: str) -> None:
    """Send a batch to the channel and to "room" on each request of the test. Runs in a process."""
    async with open_layer(dsn, **OPTIONS) as layer:
        while await link.hear():
            messages = [numbered(number) for number in range(BATCH)]
            assert all(await layer.send_many([(channel, message) for message in messages]))
            await layer.group_send_many([("room", message) for message in messages])
            link.say("sent")


class Counter:
    """A receiver on two channels, one of them in "room", that keeps only the count."""

    def __init__(self, layer: PostgresChannelLayer) -> None:
        self._layer = layer
        self.count = 0
        self.own = ""

    async def read(self, channel: str) -> None:
        while True:
            await self._layer.receive(channel)
            self.count += 1

    async def received(self, count: int) -> None:
        """Return when ``count`` messages have arrived."""
        await until(lambda: self.count >= count)


@contextlib.asynccontextmanager
async def counter_on(layer: PostgresChannelLayer) -> AsyncIterator[Counter]:
    """Receive on the layer until the block ends."""
    counter = Counter(layer)
    counter.own, member = [await layer.new_channel() for _ in range(2)]
    await listen(layer)
    await layer.group_add("room", member)
    tasks = [asyncio.create_task(counter.read(channel)) for channel in (counter.own, member)]
    try:
        yield counter
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def remembered_keys(layer: PostgresChannelLayer) -> int:
    """Return how many keys of messages the client remembers."""
    keys = dict(layer.stats())["remembered_keys"]
    assert isinstance(keys, int)
    return keys


async def settled_memory(layer: PostgresChannelLayer) -> int:
    """Return the bytes in use, some heartbeats after the last message."""
    await heartbeats(layer, 4)
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def exchange(counter: Counter, sender: Process[None], batches: int) -> None:
    """Exchange ``batches`` batches, one after the other."""
    for _ in range(batches):
        count = counter.count
        sender.say(True)
        assert await sender.hear() == "sent"
        await counter.received(count + 2 * BATCH)


async def assert_no_growth(layer: PostgresChannelLayer, dsn: str, processes: Processes) -> None:
    """Assert that the process keeps no memory of messages that it received."""
    async with counter_on(layer) as counter:
        sender = processes.start(send_batches, dsn, counter.own)
        await exchange(counter, sender, 2)  # caches that are filled once
        before = await settled_memory(layer)
        await exchange(counter, sender, BATCHES)
        grown = await settled_memory(layer) - before
        assert counter.count == 2 * BATCH * (BATCHES + 2)
        assert grown < BYTES * 2 * BATCH * BATCHES
        assert remembered_keys(layer) < FEW
        sender.say(False)
        await sender.result()


@pytest.mark.usefixtures("traced_memory")
@pytest.mark.parametrize("options", [{}, {"poll_interval": 0.05}], ids=["listening", "polling"])
async def test_client_receiving_many_messages_does_not_grow(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    options: dict[str, object],
) -> None:
    """With each heartbeat or poll the client forgets earlier messages."""
    await assert_no_growth(make_layer(**OPTIONS, **options), migrated_dsn, processes)


async def test_client_receiving_unannounced_messages_forgets_them_when_they_expire(
    make_layer: MakeLayer, observer: Observer
) -> None:
    """A message without a notification is remembered until it expires."""
    layer = make_layer(**OPTIONS)
    async with counter_on(layer) as counter:
        observer.execute("SET pg_layer.silent = on")
        for rounds in range(1, 4):
            observer.execute(
                "SELECT pg_layer_send("
                "%s, jsonb_build_object('type', 'test'), expiry => 10, capacity => 100000)"
                " FROM generate_series(1, 1000)",
                (counter.own,),
            )
            await counter.received(1000 * rounds)
        assert counter.count == 3000
        await until(lambda: remembered_keys(layer) < FEW)


# ---------------------------------------------------------------------- through a pooler


@pytest.fixture(scope="module")
def program() -> str:
    """Return the path of PgBouncer. Debian installs it where only root's PATH leads."""
    return require_executable("pgbouncer", "/usr/sbin/pgbouncer", component="pgbouncer")


@pytest.fixture(scope="module")
def pooled_server() -> Iterator[PostgresServer]:
    """Yield a server behind a pooler."""
    with PostgresServer(fsync=False) as server:
        yield server


@pytest.fixture
def direct(pooled_server: PostgresServer) -> Iterator[str]:
    """Yield the DSN of a migrated database on that server, without the pooler."""
    dsn = pooled_server.create_database("layer")
    migrate(dsn)
    yield dsn
    pooled_server.execute("DROP DATABASE layer WITH (FORCE)")


@pytest.fixture
def pooler(program: str, pooled_server: PostgresServer) -> Iterator[PgBouncer]:
    """Yield a pooler in transaction mode, without prepared statements."""
    max_prepared_statements = 0 if version(program) >= FIRST_TO_PREPARE else None
    with PgBouncer(
        program, pooled_server, max_prepared_statements=max_prepared_statements
    ) as pooler:
        yield pooler


@pytest.mark.pgbouncer
@pytest.mark.usefixtures("traced_memory")
@pytest.mark.parametrize("options", [{}, {"poll_interval": 0.05}], ids=["no listen_dsn", "polling"])
async def test_client_behind_a_pooler_receiving_many_messages_does_not_grow(
    pooler: PgBouncer, direct: str, processes: Processes, options: dict[str, object]
) -> None:
    """The pooler does not keep LISTEN. The client polls because of its options, or by itself."""
    dsn = pooler.dsn(direct)
    async with open_layer(dsn, **OPTIONS, **options) as layer:
        await listen(layer)
        await until(lambda: layer.stats()["listener"] == "polling")
        await assert_no_growth(layer, dsn, processes)
