"""SIGTERM in a process that receives: the handler of a server, and child processes."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
from pathlib import Path

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


HOST = "127.0.0.1"
APPLICATION = "tests.project.asgi:application"


PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "deploying.md"


def serving(server: str, port: int) -> list[str]:
    """Return the arguments for Python that start a server, by the command in the page."""
    page = PAGE.read_text(encoding="utf-8")
    (command,) = re.findall(rf"^\| {server} \| `(.+)` \|$", page, re.MULTILINE)
    for documented, used in {
        "mysite.asgi:application": APPLICATION,
        "0.0.0.0": HOST,
        "8000": str(port),
        "--workers 4": "--workers 2",
    }.items():
        command = command.replace(documented, used)
    return ["-m", *command.split()]


@pytest.mark.servers
@pytest.mark.parametrize("module", ["daphne", "granian", "gunicorn", "hypercorn", "uvicorn"])
async def test_worker_of_a_server_stopped_by_sigterm_removes_its_rows(
    migrated_dsn: str, observer: Observer, module: str
) -> None:
    require_module(module, component="servers")
    port = free_port()
    with started(migrated_dsn, *serving(module, port)) as server:
        await until(lambda: is_listening(port))
        async with await joined(f"ws://{HOST}:{port}/async/"):
            await until(lambda: receiving_pids(observer))
            status = await asyncio.to_thread(server.end, signal.SIGTERM)
    assert status == 0, server.errors
    assert receiving_pids(observer) == set()
    assert observer.execute("SELECT count(*) FROM pg_layer_membership").fetchone() == (0,)


def is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0
