"""Processes that are killed, or stopped by a signal: what others observe, and the rows left."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

from devtools.postgres.server import free_port
from pg_layer import PostgresChannelLayer
from tests.conftest import MakeLayer, Observer
from tests.processes import TIMEOUT, Link, Processes, listen, open_layer, receive, until
from tests.project.commands import Process, manage, started, succeeded

Recovery = Callable[[str], AbstractContextManager[None]]

# No process sweeps by itself: the tests run the command.
SHORT_LEASE: dict[str, object] = {
    "lease": 2,
    "heartbeat": 0.5,
    "sweep_interval": 0,
    "capacity": 100_000,
}


def count_rows(observer: Observer, table: str, address: str) -> int:
    query = f"SELECT count(*) FROM pg_layer_{table} WHERE address = %s".encode()
    [(number,)] = observer.execute(query, (address,)).fetchall()
    return int(number)


def address_of(observer: Observer, pid: int) -> str:
    """Return the address of the client of a receiving process."""
    [(address,)] = observer.execute(
        "SELECT address FROM pg_layer_client WHERE pid = %s", (pid,)
    ).fetchall()
    return str(address)


def receiving_pids(observer: Observer) -> set[int]:
    """Return the ids of the processes that have a lease."""
    rows = observer.execute("SELECT pid FROM pg_layer_client WHERE expires_at > clock_timestamp()")
    return {pid for (pid,) in rows}


class EndlessSends:
    """A sender of numbers to a group and to channels, in turn. Each receiver gets all numbers."""

    def __init__(self, layer: PostgresChannelLayer, channels: list[str]) -> None:
        self._layer = layer
        self._channels = channels
        self.sent = 0

    async def run(self) -> None:
        while True:
            await self.one()

    async def one(self) -> None:
        message = {"number": self.sent}
        if self.sent % 2:
            await self._layer.group_send("room", message)
        else:
            await asyncio.gather(
                *(self._layer.send(channel, message) for channel in self._channels)
            )
        self.sent += 1

    async def more(self, count: int) -> None:
        """Return when ``count`` more sends have begun and ended after this call."""
        enough = self.sent + 1 + count
        await until(lambda: self.sent >= enough)


@asynccontextmanager
async def sending_all_the_time(
    layer: PostgresChannelLayer, channels: list[str]
) -> AsyncIterator[EndlessSends]:
    """Send while the block runs. A send that fails raises at the end of the block."""
    traffic = EndlessSends(layer, channels)
    stop = asyncio.Event()

    async def run() -> None:
        while not stop.is_set():
            await traffic.one()

    running = asyncio.create_task(run())
    try:
        yield traffic
    finally:
        stop.set()
        await running


# ---------------------------------------------------------------------- kill -9


async def join_and_receive(link: Link, dsn: str) -> list[int]:
    """Join the room, report the channel, and return the numbers up to None. Runs in a process."""
    async with open_layer(dsn, **SHORT_LEASE) as layer:
        channel = await layer.new_channel()
        await listen(layer)
        await layer.group_add("room", channel)
        link.say(channel)
        numbers = []
        while (number := (await receive(layer, channel))["number"]) is not None:
            numbers.append(number)
        return numbers


async def test_member_killed_is_not_counted_after_its_lease_and_harms_no_other(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    observer: Observer,
    recovery: Recovery,
) -> None:
    """The member is counted until its lease is over, and a sweep removes its membership.

    A group message is one row all the time. Messages to the member's channel stay until they
    expire.
    """
    layer = make_layer(capacity=100_000)
    killed, *living = (processes.start(join_and_receive, migrated_dsn) for _ in range(3))
    channels = [await process.hear() for process in (killed, *living)]
    address = address_of(observer, killed.pid)
    async with sending_all_the_time(layer, channels) as traffic:
        await traffic.more(20)
        assert await layer.group_count("room") == 3
        killed.kill()
        with recovery("kill -9 of a member, lease of 2 s: until it does not count"):
            while await layer.group_count("room") > 2:
                await traffic.more(1)
        assert sorted(await layer.group_channels("room")) == sorted(channels[1:])
        waiting = count_rows(observer, "message", address)
        assert waiting > 0
        assert count_rows(observer, "membership", address) == 1
        await traffic.more(40)
        command = await asyncio.to_thread(manage, migrated_dsn, "pg_layer_sweep", "--once")
        words = succeeded(command).split()
        assert (words[1], words[3], words[5]) == ("0", "1", "0")
        assert count_rows(observer, "membership", address) == 0
        assert count_rows(observer, "message", address) > waiting
        await traffic.more(40)
    assert count_rows(observer, "message", "asgi!@room") == traffic.sent // 2
    for channel in channels:
        await layer.send(channel, {"number": None})
    for process in living:
        assert await process.result() == list(range(traffic.sent))


# ---------------------------------------------------------------------- servers stopped by a signal


@pytest.fixture
def exit_stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def start_server(
    stack: ExitStack, dsn: str, *options: str, settings: Mapping[str, Any] | None = None
) -> tuple[Process, str]:
    """Start uvicorn with the test project, as users do. Return the process and its address."""
    port = free_port()
    arguments = ("--host", "127.0.0.1", "--port", str(port), "--log-level", "warning", *options)
    command = ("-m", "uvicorn", "tests.project.asgi:application", *arguments)
    process = stack.enter_context(started(dsn, *command, settings=settings))
    return process, f"ws://127.0.0.1:{port}"


async def joined(address: str) -> ClientConnection:
    """Return a connection to the server, as soon as it accepts any."""
    deadline = asyncio.get_running_loop().time() + TIMEOUT
    while True:
        try:
            return await connect(address, open_timeout=TIMEOUT, proxy=None)
        except OSError:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.05)


async def numbers_until_closed(connection: ClientConnection) -> list[int]:
    numbers = []
    with suppress(ConnectionClosed):
        while True:
            numbers.append(int(await connection.recv()))
    return numbers


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
@pytest.mark.parametrize("consumer_path", ["async/", "declared/"])
async def test_server_stopped_by_a_signal_removes_its_rows_at_once(
    migrated_dsn: str,
    make_layer: MakeLayer,
    observer: Observer,
    exit_stack: ExitStack,
    number: signal.Signals,
    consumer_path: str,
) -> None:
    layer = make_layer(capacity=100_000)
    own = await layer.new_channel()
    await listen(layer)
    await layer.group_add("chat", own)
    [own_pid] = receiving_pids(observer)
    server, address = start_server(exit_stack, migrated_dsn)
    clients = [await joined(f"{address}/{consumer_path}") for _ in range(3)]
    members = "SELECT count(*) FROM pg_layer_membership WHERE group_name = 'chat'"
    await until(lambda: observer.execute(members.encode()).fetchone() == (4,))
    await until(lambda: server.pid in receiving_pids(observer))
    address = address_of(observer, server.pid)

    sent = 0
    is_over = asyncio.Event()

    async def chat() -> None:
        nonlocal sent
        while not is_over.is_set():
            await layer.group_send("chat", {"type": "chat.message", "text": str(sent)})
            sent += 1

    chatting = asyncio.create_task(chat())
    heard = [asyncio.create_task(numbers_until_closed(client)) for client in clients]
    await until(lambda: sent > 50)
    await asyncio.to_thread(server.end, number)
    # Look at once: rows that the process has not removed by now stay until its lease is over.
    left_at_once = (receiving_pids(observer), count_rows(observer, "membership", address))
    enough = sent + 2
    await until(lambda: sent >= enough)
    rows = count_rows(observer, "message", address)
    enough = sent + 20
    await until(lambda: sent >= enough)
    more = count_rows(observer, "message", address) - rows
    is_over.set()
    await chatting
    for client in clients:
        await client.close()
    for numbers in await asyncio.gather(*heard):
        assert numbers == list(range(len(numbers)))
        assert numbers
    assert [int((await receive(layer, own))["text"]) for _ in range(sent)] == list(range(sent))
    assert not [line for line in server.errors if "Traceback" in line or "pg_layer" in line]
    assert left_at_once == ({own_pid}, 0)
    assert more == 0


# ---------------------------------------------------------------------- workers stopped by a signal

# A job takes 1 ms, so that the reader counts as quick and is given jobs ahead.
# The handler cancels the task. It must not raise instead: an exception from a handler may interrupt
# asyncio between the end of a future and the wake-up of its task. Then nothing can wake or cancel
# that task, and `asyncio.run` never ends.
WORKER = """
import asyncio, signal, sys
from pg_layer import PostgresChannelLayer

layer = PostgresChannelLayer(dsn=sys.argv[1], capacity=10_000)

async def main():
    if sys.argv[2] == "in order":
        cancel = asyncio.current_task().cancel
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, cancel)
    while True:
        print((await layer.receive("jobs"))["number"], flush=True)
        await asyncio.sleep(0.001)

try:
    asyncio.run(main())
except asyncio.CancelledError:
    sys.exit(7)
"""


@pytest.mark.parametrize("ending", ["in order", "as Python does"])
async def test_worker_stopped_by_sigterm_releases_its_claimed_jobs(
    migrated_dsn: str, make_layer: MakeLayer, observer: Observer, exit_stack: ExitStack, ending: str
) -> None:
    layer, successor = make_layer(capacity=10_000), make_layer(capacity=10_000)
    worker = exit_stack.enter_context(started(migrated_dsn, "-c", WORKER, migrated_dsn, ending))
    await until(lambda: receiving_pids(observer) == {worker.pid})
    address = address_of(observer, worker.pid)
    total = 600
    for number in range(300):
        await layer.send("jobs", {"number": number})
    sending = asyncio.create_task(_send_jobs(layer, range(300, total)))
    # Wait until the worker holds jobs that it has not begun.
    has_claimed = (
        b"SELECT count(*) >= 5 FROM pg_layer_message WHERE address = %s AND channel = 'jobs'"
    )
    await until(lambda: observer.execute(has_claimed, (address,)).fetchone() == (True,))
    status = await asyncio.to_thread(worker.end, signal.SIGTERM)
    assert status == (7 if ending == "in order" else -signal.SIGTERM)
    done = [int(line) for line in worker.output]
    left_at_once = count_rows(observer, "message", address)
    await sending
    rest = await _receive_all_jobs(successor)
    assert not [number for number, times in Counter(done + rest).items() if times > 1]
    # If SIGTERM has its default effect, one job may be received and its line not written.
    assert len(set(range(total)) - set(done) - set(rest)) <= (0 if ending == "in order" else 1)
    assert left_at_once == 0
    assert receiving_pids(observer) <= {os.getpid()}
    assert rest == sorted(rest)


async def _send_jobs(layer: PostgresChannelLayer, numbers: range) -> None:
    for number in numbers:
        await layer.send("jobs", {"number": number})


async def _receive_all_jobs(layer: PostgresChannelLayer) -> list[int]:
    """Return all waiting jobs: those before one that is sent last."""
    await layer.send("jobs", {"number": None})
    found: list[int] = []
    while (number := (await receive(layer, "jobs"))["number"]) is not None:
        found.append(number)
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_runworker_stopped_by_a_signal_removes_its_rows_at_once(
    migrated_dsn: str,
    make_layer: MakeLayer,
    observer: Observer,
    exit_stack: ExitStack,
    number: signal.Signals,
) -> None:
    observer.execute("CREATE TABLE job (number integer, pid integer)")
    layer = make_layer(capacity=10_000)

    def start() -> Process:
        ignored = "ignore:async_to_sync was passed a non-async-marked callable:UserWarning"
        command = ("-W", ignored, "-m", "tests.project.manage", "runworker", "thumbnails")
        return exit_stack.enter_context(started(migrated_dsn, *command))

    async def send() -> None:
        for job in range(300):
            await layer.send("thumbnails", {"type": "thumbnails.make", "number": job})

    def done() -> list[int]:
        return [job for (job,) in observer.execute("SELECT number FROM job").fetchall()]

    worker = start()
    await until(lambda: receiving_pids(observer) == {worker.pid})
    address = address_of(observer, worker.pid)
    sending = asyncio.create_task(send())
    await until(lambda: len(done()) >= 30)
    await asyncio.to_thread(worker.end, number)
    left_at_once = (receiving_pids(observer), count_rows(observer, "message", address))
    await sending
    # Channels' own worker receives jobs faster than it does them. Those that it has received and
    # not done are lost with it.
    [(waiting,)] = observer.execute(
        "SELECT count(*) FROM pg_layer_message WHERE address = 'asgi!:thumbnails'"
    ).fetchall()
    before = len(done())
    start()
    await until(lambda: len(done()) >= before + waiting)
    assert max(Counter(done()).values()) == 1
    assert left_at_once == (set(), 0)
