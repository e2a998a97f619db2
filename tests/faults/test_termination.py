"""SIGTERM in a process that receives: the handler of a server, and child processes."""

from __future__ import annotations

import asyncio
import signal

import pytest

from devtools.postgres.server import free_port
from tests.components import require_module
from tests.conftest import Observer
from tests.faults.test_processes import joined, receiving_pids
from tests.processes import until
from tests.project.commands import run, started, succeeded

# Stop as uvicorn does: its handler records the first SIGTERM. When it has restored the default
# effect, it sends itself SIGTERM again.
SERVER = """
import asyncio, signal, subprocess, sys
from pg_layer import PostgresChannelLayer

layer = PostgresChannelLayer(dsn=sys.argv[1])

def child():
    command = ["cat", "/proc/self/status"]
    status = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    [blocked] = [line.split()[1] for line in status.splitlines() if line.startswith("SigBlk")]
    print("child", int(blocked, 16), flush=True)

def stop(number, frame):
    print("stop", flush=True)
    child()

async def main():
    before = signal.signal(signal.SIGTERM, stop)
    channel = await layer.new_channel()
    await layer.send(channel, {"type": "hello"})
    await layer.receive(channel)
    signal.raise_signal(signal.SIGTERM)
    child()
    await asyncio.to_thread(child)
    signal.raise_signal(signal.SIGTERM)
    print("end", flush=True)
    signal.signal(signal.SIGTERM, before)
    signal.raise_signal(signal.SIGTERM)

asyncio.run(main())
"""


def test_sigterm_reaches_the_handler_of_the_server_and_is_not_blocked_in_children(
    migrated_dsn: str, observer: Observer
) -> None:
    with started(migrated_dsn, "-c", SERVER, migrated_dsn) as server:
        assert server.end() == -signal.SIGTERM
    stop = ["stop", "child 0"]
    assert (server.errors, server.output) == ([], [*stop, "child 0", "child 0", *stop, "end"])
    assert receiving_pids(observer) == set()


WITHOUT_HANDLER = """
import asyncio, os, signal, sys
from pg_layer import PostgresChannelLayer

layer = PostgresChannelLayer(dsn=sys.argv[1], handle_sigterm=False)
set_handler = signal.signal

async def main():
    channel = await layer.new_channel()
    await layer.send(channel, {"type": "hello"})
    await layer.receive(channel)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert signal.signal is set_handler
    print("default", flush=True)
    signal.raise_signal(signal.SIGTERM)

asyncio.run(main())
"""


def test_sigterm_with_handle_sigterm_false_keeps_its_default_effect(
    migrated_dsn: str, observer: Observer
) -> None:
    with started(migrated_dsn, "-c", WITHOUT_HANDLER, migrated_dsn) as process:
        assert process.end() == -signal.SIGTERM
    assert (process.errors, process.output) == ([], ["default"])
    assert receiving_pids(observer) == {process.pid}


FORKS = """
import asyncio, os, signal, sys
from pg_layer import PostgresChannelLayer

layer = PostgresChannelLayer(dsn=sys.argv[1])

async def main():
    channel = await layer.new_channel()
    await layer.send(channel, {"type": "hello"})
    await layer.receive(channel)
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    child = os.fork()
    if not child:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os._exit(0 if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL else 1)
    print(os.waitpid(child, 0)[1])
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    await layer.close()

asyncio.run(main())
"""


def test_sigterm_in_a_forked_child_that_does_not_receive_has_its_default_effect(
    migrated_dsn: str,
) -> None:
    assert succeeded(run(migrated_dsn, "-c", FORKS, migrated_dsn)) == "0"


@pytest.mark.granian
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
async def test_granian_worker_stopped_by_a_signal_removes_its_rows(
    migrated_dsn: str, observer: Observer, number: signal.Signals
) -> None:
    """The workers are forked by ``multiprocessing``: they run no functions of ``atexit``."""
    require_module("granian", component="granian")
    port = free_port()
    options = (
        "--interface",
        "asginl",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--log-level",
        "error",
    )
    with started(
        migrated_dsn, "-m", "granian", *options, "tests.project.asgi:application"
    ) as server:
        async with await joined(f"ws://127.0.0.1:{port}/async/"):
            await until(lambda: receiving_pids(observer))
            assert server.pid not in receiving_pids(observer)
            status = await asyncio.to_thread(server.end, number)
    assert (status, server.errors) == (0, [])
    assert receiving_pids(observer) == set()
    assert observer.execute("SELECT count(*) FROM pg_layer_membership").fetchone() == (0,)
