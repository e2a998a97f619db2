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
BYTES = 20  # that the process may grow by for each message; a key that is kept takes more
FIRST_TO_PREPARE = (1, 21)


@pytest.fixture
def processes() -> Iterator[Processes]:
    """Processes that end with the test."""
    started = Processes()
    yield started
    started.close()


@pytest.fixture
def traced() -> Iterator[None]:
    """Python's memory is traced while the test runs."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


async def send_batches(link: Link, dsn: str, channel: str) -> None:
    """Send a batch to the channel and to "room" whenever the test says so."""
    async with open_layer(dsn, **OPTIONS) as layer:
        while await link.hear():
            messages = [numbered(number) for number in range(BATCH)]
            assert all(await layer.send_many([(channel, message) for message in messages]))
            await layer.group_send_many([("room", message) for message in messages])
            link.say("sent")


class Counting:
    """Receives on two channels, one of them in "room", and keeps nothing but the count."""

    def __init__(self, layer: PostgresChannelLayer) -> None:
        self._layer = layer
        self.count = 0
        self.own = ""

    async def read(self, channel: str) -> None:
        while True:
            await self._layer.receive(channel)
            self.count += 1

    async def received(self, count: int) -> None:
        """Return when so many messages have arrived."""
        await until(lambda: self.count >= count)


@contextlib.asynccontextmanager
async def counting_of(layer: PostgresChannelLayer) -> AsyncIterator[Counting]:
    """Receive until the block ends."""
    counting = Counting(layer)
    counting.own, member = [await layer.new_channel() for _ in range(2)]
    await listen(layer)
    await layer.group_add("room", member)
    tasks = [asyncio.create_task(counting.read(channel)) for channel in (counting.own, member)]
    try:
        yield counting
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)


def remembered(layer: PostgresChannelLayer) -> int:
    """How many keys of messages the client remembers."""
    keys = dict(layer.stats())["remembered_keys"]
    assert isinstance(keys, int)
    return keys


async def memory(layer: PostgresChannelLayer) -> int:
    """The bytes in use, some heartbeats after the last message."""
    await heartbeats(layer, 4)
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


async def exchange(counting: Counting, sender: Process[None], batches: int) -> None:
    """Let so many batches arrive, one after the other."""
    for _ in range(batches):
        count = counting.count
        sender.say(True)
        assert await sender.hear() == "sent"
        await counting.received(count + 2 * BATCH)


async def check(layer: PostgresChannelLayer, dsn: str, processes: Processes) -> None:
    """Messages arrive for a while, and leave nothing behind in the process."""
    async with counting_of(layer) as counting:
        sender = processes.start(send_batches, dsn, counting.own)
        await exchange(counting, sender, 2)  # fills what is filled once
        before = await memory(layer)
        await exchange(counting, sender, BATCHES)
        grown = await memory(layer) - before
        assert counting.count == 2 * BATCH * (BATCHES + 2)
        assert grown < BYTES * 2 * BATCH * BATCHES
        assert remembered(layer) < FEW
        sender.say(False)
        await sender.result()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("options", [{}, {"poll_interval": 0.05}], ids=["listening", "polling"])
async def test_client_that_receives_many_messages_does_not_grow(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    options: dict[str, object],
) -> None:
    """Each heartbeat or poll lets it forget the messages from before."""
    await check(make_layer(**OPTIONS, **options), migrated_dsn, processes)


async def test_client_that_receives_unannounced_messages_forgets_them_when_they_have_expired(
    make_layer: MakeLayer, observer: Observer
) -> None:
    """They were written without a notification, so they are remembered until they expire."""
    layer = make_layer(**OPTIONS)
    async with counting_of(layer) as counting:
        observer.execute("SET pg_layer.silent = on")
        for rounds in range(1, 4):
            observer.execute(
                "SELECT pg_layer_send("
                "%s, jsonb_build_object('type', 'test'), expiry => 10, capacity => 100000)"
                " FROM generate_series(1, 1000)",
                (counting.own,),
            )
            await counting.received(1000 * rounds)
        assert counting.count == 3000
        await until(lambda: remembered(layer) < FEW)


# ---------------------------------------------------------------------- through a pooler


@pytest.fixture(scope="module")
def program() -> str:
    """PgBouncer; Debian keeps it where only root looks."""
    return require_executable("pgbouncer", "/usr/sbin/pgbouncer", component="pgbouncer")


@pytest.fixture(scope="module")
def pooled_server() -> Iterator[PostgresServer]:
    """A server behind a pooler."""
    with PostgresServer(fsync=False) as server:
        yield server


@pytest.fixture
def direct(pooled_server: PostgresServer) -> Iterator[str]:
    """A migrated database of that server, without the pooler."""
    dsn = pooled_server.create_database("layer")
    migrate(dsn)
    yield dsn
    pooled_server.execute("DROP DATABASE layer WITH (FORCE)")


@pytest.fixture
def pooler(program: str, pooled_server: PostgresServer) -> Iterator[PgBouncer]:
    """A pooler in transaction mode, without prepared statements."""
    known = 0 if version(program) >= FIRST_TO_PREPARE else None
    with PgBouncer(program, pooled_server, max_prepared_statements=known) as pooler:
        yield pooler


@pytest.mark.pgbouncer
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("options", [{}, {"poll_interval": 0.05}], ids=["no listen_dsn", "polling"])
async def test_client_behind_a_pooler_that_receives_many_messages_does_not_grow(
    pooler: PgBouncer, direct: str, processes: Processes, options: dict[str, object]
) -> None:
    """The pooler does not keep LISTEN, so the client polls, asked or on its own."""
    dsn = pooler.dsn(direct)
    async with open_layer(dsn, **OPTIONS, **options) as layer:
        await listen(layer)
        await until(lambda: layer.stats()["listener"] == "polling")
        await check(layer, dsn, processes)
