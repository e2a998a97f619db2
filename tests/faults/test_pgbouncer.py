"""PgBouncer in transaction mode, with a direct connection to listen on, and without one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager

import psycopg
import pytest
from django.db import transaction

from devtools.postgres import PostgresServer
from pg_layer import ChannelFull, LayerUnavailable, PostgresChannelLayer
from pg_layer._state import log_events
from tests.components import require_executable
from tests.faults.conftest import migrate
from tests.faults.pgbouncer import PgBouncer, version
from tests.integration.test_django import postgres
from tests.integration.test_sync import on_django
from tests.logs import events, records
from tests.processes import Link, Process, Processes, listen, open_layer, receive, until

pytestmark = pytest.mark.pgbouncer

Recovery = Callable[[str], AbstractContextManager[None]]

FIRST_TO_PREPARE = (1, 21)
OPTIONS: dict[str, object] = {"send_timeout": 30, "capacity": 1000}


@pytest.fixture(scope="module")
def program() -> str:
    """Return the path of PgBouncer. Debian installs it where only root's PATH leads."""
    return require_executable("pgbouncer", "/usr/sbin/pgbouncer", component="pgbouncer")


@pytest.fixture(scope="module")
def pooled_server() -> Iterator[PostgresServer]:
    """Yield a server that stays up: in these tests the pooler fails."""
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
    """Yield a pooler without support for prepared statements."""
    known = 0 if version(program) >= FIRST_TO_PREPARE else None
    with PgBouncer(program, pooled_server, max_prepared_statements=known) as pooler:
        yield pooler


@pytest.fixture
def processes() -> Iterator[Processes]:
    """Yield a starter of processes, which end with the test."""
    started = Processes()
    yield started
    started.close()


async def receive_numbers(layer: PostgresChannelLayer, channel: str, count: int) -> list[int]:
    return [(await receive(layer, channel))["number"] for _ in range(count)]


async def send_numbers(link: Link, dsn: str, targets: list[tuple[str, str]], count: int) -> None:
    """Send ``count`` numbers to each target, all targets at once. Runs in a process.

    A target is the name of a method, ``send`` or ``group_send``, and its first argument.
    """
    async with open_layer(dsn, **OPTIONS) as layer:

        async def send_to(method: str, name: str) -> None:
            for number in range(count):
                await getattr(layer, method)(name, {"number": number, "blob": bytes(100 * number)})

        await asyncio.gather(*(send_to(*target) for target in targets))


async def exchange(layer: PostgresChannelLayer, dsn: str, processes: Processes, count: int) -> None:
    """Send direct messages, group messages and jobs from another process to this layer.

    Assert that they arrive once and in order.
    """
    own, member = [await layer.new_channel() for _ in range(2)]
    await layer.group_add("room", member)
    reading = asyncio.gather(
        *(receive_numbers(layer, channel, count) for channel in (own, member, "jobs"))
    )
    targets = [("send", own), ("group_send", "room"), ("send", "jobs")]
    writer = processes.start(send_numbers, dsn, targets, count)
    assert await reading == [list(range(count))] * 3
    await writer.result()
    await layer.group_discard("room", member)
    await layer.group_send("room", {"number": -1})
    await layer.send(member, {"number": -2})
    assert await receive_numbers(layer, member, 1) == [-2]


async def assert_nothing_left(direct: str) -> None:
    """Assert that no lease, no membership and no message is left.

    Group messages do not count, because they stay until they expire.
    """
    async with await psycopg.AsyncConnection.connect(direct, autocommit=True) as observer:
        for query in (
            "SELECT count(*) FROM pg_layer_client WHERE expires_at > clock_timestamp()",
            "SELECT count(*) FROM pg_layer_membership",
            "SELECT count(*) FROM pg_layer_message WHERE position('!@' IN address) = 0",
        ):
            cursor = await observer.execute(query.encode())
            assert await cursor.fetchone() == (0,), query


# ---------------------------------------------------------------------- with listen_dsn


@pytest.mark.parametrize("known", [0, 100], ids=["no prepared statements", "prepared statements"])
async def test_pooler_with_listen_dsn_delivers_by_notification(
    program: str,
    pooled_server: PostgresServer,
    direct: str,
    processes: Processes,
    known: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    prepared_option = known if version(program) >= FIRST_TO_PREPARE else None
    with PgBouncer(
        program, pooled_server, max_prepared_statements=prepared_option, pool_size=2
    ) as pooler:
        dsn = pooler.dsn(direct)
        # There are more clients than server connections. So the next statement of a session often
        # runs on another server connection.
        async with (
            open_layer(dsn, listen_dsn=direct, **OPTIONS) as layer,
            open_layer(dsn, listen_dsn=direct, **OPTIONS) as other,
        ):
            await asyncio.gather(
                exchange(layer, dsn, processes, 100),
                asyncio.gather(
                    *(other.send("elsewhere", {"number": number}) for number in range(500))
                ),
            )
            assert sorted(await receive_numbers(other, "elsewhere", 500)) == list(range(500))
            health = await layer.health()
            assert health["listener"] == "listening"
            assert health["last_notification_age"] is not None
            assert health["problems"] == []
        with psycopg.connect(dsn, autocommit=True) as connection:
            assert connection.execute("SELECT name FROM pg_prepared_statements").fetchall() == []
        await assert_nothing_left(direct)
    assert events(caplog) == []


# ---------------------------------------------------------------------- the pooler fails


Outcomes = dict[str, dict[str, list[int]]]


async def send_until_stopped(link: Link, dsn: str, targets: list[tuple[str, str]]) -> Outcomes:
    """Send numbers to each target until the test requests the end. Runs in a process.

    Return for each target which numbers were sent, unknown and refused.
    """
    outcomes: Outcomes = {name: {"sent": [], "unknown": [], "refused": []} for _, name in targets}
    async with open_layer(dsn, **OPTIONS) as layer:
        stop = asyncio.create_task(link.hear())

        async def send_to(method: str, name: str) -> None:
            number = 0
            while not stop.done():
                try:
                    await getattr(layer, method)(name, {"number": number})
                    outcome = "sent"
                except LayerUnavailable as error:
                    outcome = "unknown" if "unknown" in str(error) else "refused"
                except ChannelFull:
                    outcome = "refused"
                outcomes[name][outcome].append(number)
                number += 1
                await asyncio.wait({stop}, timeout=0.002)

        await asyncio.gather(*(send_to(*target) for target in targets))
    return outcomes


class Received:
    """The numbers that the channels of a layer receive, by name."""

    def __init__(self, layer: PostgresChannelLayer, channels: dict[str, str]) -> None:
        self.numbers: dict[str, list[int]] = {name: [] for name in channels}
        self._layer = layer
        self._tasks = [asyncio.create_task(self._receive(*item)) for item in channels.items()]

    async def _receive(self, name: str, channel: str) -> None:
        while True:
            self.numbers[name].append((await self._layer.receive(channel))["number"])

    async def more(self, count: int) -> None:
        """Return when each channel has received ``count`` more numbers."""
        goals = {name: len(numbers) + count for name, numbers in self.numbers.items()}
        await until(lambda: all(len(self.numbers[name]) >= goal for name, goal in goals.items()))

    async def has_all(self, outcomes: Outcomes) -> None:
        """Assert that the messages arrived as their sends promise.

        If the send returned: once and in order. If its outcome is unknown: at most once. If it was
        refused: never.
        """
        try:
            await until(
                lambda: all(set(outcomes[n]["sent"]) <= set(got) for n, got in self.numbers.items())
            )
        except TimeoutError:
            lost = {
                n: sorted(set(outcomes[n]["sent"]) - set(got)) for n, got in self.numbers.items()
            }
            pytest.fail(f"lost: {lost}")
        for name, got in self.numbers.items():
            assert got == sorted(set(got))
            assert not set(got) & set(outcomes[name]["refused"])

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.wait(self._tasks)


@asynccontextmanager
async def outside_traffic(
    layer: PostgresChannelLayer, dsn: str, processes: Processes
) -> AsyncIterator[Received]:
    """Send from another process to a channel, a group and jobs of this layer.

    At the end of the block, assert that all messages arrived.
    """
    own, member = [await layer.new_channel() for _ in range(2)]
    await layer.group_add("room", member)
    await listen(layer)
    received = Received(layer, {own: own, "room": member, "jobs": "jobs"})
    targets = [("send", own), ("group_send", "room"), ("send", "jobs")]
    writer: Process[Outcomes] = processes.start(send_until_stopped, dsn, targets)
    try:
        await received.more(20)
        yield received
        writer.say("stop")
        await received.has_all(await writer.result())
    finally:
        await received.stop()


@pytest.mark.parametrize("has_listen_dsn", [True, False], ids=["listen_dsn", "polling"])
async def test_pooler_killed_under_traffic_loses_no_message_whose_send_returned(
    pooler: PgBouncer, direct: str, processes: Processes, has_listen_dsn: bool, recovery: Recovery
) -> None:
    dsn = pooler.dsn(direct)
    mode_options: dict[str, object] = (
        {"listen_dsn": direct} if has_listen_dsn else {"poll_interval": 0.05}
    )
    async with (
        open_layer(dsn, **OPTIONS, **mode_options) as layer,
        outside_traffic(layer, dsn, processes) as received,
    ):
        for _ in range(3):
            await asyncio.to_thread(pooler.stop)
            with recovery(
                f"PgBouncer is back ({', '.join(mode_options)}): until messages arrive at all"
            ):
                await asyncio.to_thread(pooler.start)
                await received.more(5)
            await received.more(20)
    await assert_nothing_left(direct)


async def test_pooler_losing_server_connections_loses_no_message_whose_send_returned(
    pooler: PgBouncer, pooled_server: PostgresServer, direct: str, processes: Processes
) -> None:
    dsn = pooler.dsn(direct)
    kill = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = 'layer' AND backend_type = 'client backend'"
    )
    async with (
        open_layer(dsn, **OPTIONS, listen_dsn=direct) as layer,
        outside_traffic(layer, dsn, processes) as received,
    ):
        for _ in range(10):
            await asyncio.to_thread(pooled_server.execute, kill)
            await received.more(5)
    await assert_nothing_left(direct)


# ---------------------------------------------------------------------- without listen_dsn


async def test_pooler_without_listen_dsn_and_with_poll_interval_delivers(
    pooler: PgBouncer, direct: str, processes: Processes, caplog: pytest.LogCaptureFixture
) -> None:
    dsn = pooler.dsn(direct)
    async with open_layer(dsn, **OPTIONS, poll_interval=0.02) as layer:
        await exchange(layer, dsn, processes, 100)
        health = await layer.health()
        assert health["listener"] == "polling"
        assert health["problems"] == []
    await assert_nothing_left(direct)
    assert events(caplog) == []


async def test_pooler_without_listen_dsn_is_noticed_and_polled_through(
    pooler: PgBouncer,
    direct: str,
    processes: Processes,
    caplog: pytest.LogCaptureFixture,
    recovery: Recovery,
) -> None:
    dsn = pooler.dsn(direct)
    async with open_layer(dsn, **OPTIONS, heartbeat=1, lease=60) as layer:
        with recovery("PgBouncer alone: until it is noticed that nothing is heard"):
            channel = await layer.new_channel()
            await layer.send(channel, {"number": 0})
            assert await receive_numbers(layer, channel, 1) == [0]
            await until(lambda: events(caplog))
        await exchange(layer, dsn, processes, 100)
        health = await layer.health()
        assert health["listener"] == "polling"
        assert any("listen_dsn" in problem for problem in health["problems"])
        assert health["round_trip"] is not None
        # Other processes see it in the row of the client.
        await until(lambda: is_without_notifications(direct))
        # After several heartbeats the layer still polls, and has logged nothing more.
        renewed = [lease_end(direct)]
        while len(renewed) < 4:
            renewed.append(
                await until(lambda: lease_end(direct) if lease_end(direct) != renewed[-1] else None)
            )
        await layer.send(channel, {"number": 1})
        assert await receive_numbers(layer, channel, 1) == [1]
        assert events(caplog) == [log_events.POLLING_STARTED]
    await assert_nothing_left(direct)


def is_without_notifications(dsn: str) -> bool:
    """Return whether the only client reports that it receives no notifications."""
    with psycopg.connect(dsn) as conn:
        ((counters,),) = conn.execute("SELECT counters FROM pg_layer_client").fetchall()
    return bool(counters["without_notifications"])


def lease_end(direct: str) -> object:
    """Return when the lease of the only client ends."""
    with psycopg.connect(direct) as connection:
        row = connection.execute("SELECT max(expires_at) FROM pg_layer_client").fetchone()
    assert row is not None
    return row[0]


async def test_pooler_without_listen_dsn_restarted_is_polled_through_again(
    pooler: PgBouncer,
    direct: str,
    processes: Processes,
    caplog: pytest.LogCaptureFixture,
    recovery: Recovery,
) -> None:
    dsn = pooler.dsn(direct)
    async with (
        open_layer(dsn, **OPTIONS) as layer,
        outside_traffic(layer, dsn, processes) as received,
    ):
        await until(lambda: events(caplog))
        await asyncio.to_thread(pooler.stop)
        with recovery("PgBouncer alone is back: until messages arrive at all"):
            await asyncio.to_thread(pooler.start)
            await received.more(5)
    await assert_nothing_left(direct)
    assert len(records(caplog, log_events.POLLING_STARTED)) == 1


async def test_worker_behind_a_pooler_releases_its_jobs_when_it_closes(
    pooler: PgBouncer, direct: str
) -> None:
    dsn = pooler.dsn(direct)
    async with open_layer(direct, **OPTIONS) as other:
        async with open_layer(dsn, **OPTIONS, poll_interval=0.02) as worker:
            for number in range(50):
                await other.send("jobs", {"number": number})
            done = await receive_numbers(worker, "jobs", 10)
        done += await receive_numbers(other, "jobs", 40)
        assert done == list(range(50))
    await assert_nothing_left(direct)


async def test_pooler_in_session_mode_needs_no_options(
    program: str,
    pooled_server: PostgresServer,
    direct: str,
    processes: Processes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with PgBouncer(program, pooled_server, mode="session", pool_size=20) as pooler:
        dsn = pooler.dsn(direct)
        async with open_layer(dsn, **OPTIONS) as layer:
            await exchange(layer, dsn, processes, 100)
            health = await layer.health()
            assert health["listener"] == "listening"
            assert health["problems"] == []
    await assert_nothing_left(direct)
    assert events(caplog) == []


# ---------------------------------------------------------------------- layer.sync


def test_sync_through_a_pooler_sends_in_and_outside_of_transactions(
    direct: str, pooler: PgBouncer
) -> None:
    layer = PostgresChannelLayer(capacity=1000)
    with on_django(layer, default=postgres(direct), pooled=postgres(pooler.dsn(direct))):
        for n in range(20):
            layer.sync.send("jobs", {"number": n}, using="pooled")
            with transaction.atomic(using="pooled"):
                layer.sync.send("jobs", {"number": n}, using="pooled")
        with psycopg.connect(direct) as observer:
            query = "SELECT count(*) FROM pg_layer_message WHERE channel = 'jobs'"
            assert observer.execute(query).fetchone() == (40,)
