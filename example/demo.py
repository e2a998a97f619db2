"""``python -m example.demo``: the chat in two server processes, with its own PostgreSQL.

Set ``PG_LAYER_DSN`` to use an existing database. Ctrl-C ends the demo and removes what it created.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import itertools
import os
import shlex
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

from devtools.postgres import PostgresServer, PostgresServerError
from example import commands

T = TypeVar("T")

HOST = "127.0.0.1"
FIRST_PORT = 8001
ROOT = Path(__file__).resolve().parent.parent
READY_WITHIN = 60.0  # seconds within which both servers must answer
STOP_WITHIN = 10.0  # seconds after which a child is killed


class Stopped(Exception):
    """A signal has asked the demo to end."""


class Failed(Exception):
    """The demo cannot continue. The text gives the reason."""


def say(line: str = "") -> None:
    # If the terminal has closed, the demo must still clean up.
    with contextlib.suppress(OSError):
        print(line, flush=True)


def choose_ports(first: int, count: int) -> list[int]:
    """Return ``count`` free ports, from ``first`` on; any free ports if ``first`` is 0."""
    chosen: list[int] = []
    with contextlib.ExitStack() as held:
        for port in range(first, 65536) if first else itertools.repeat(0):
            probe = held.enter_context(socket.socket())
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind((HOST, port))
                chosen.append(probe.getsockname()[1])
            if len(chosen) == count:
                return chosen
    raise Failed(f"There are no {count} free ports from {first} on.")


def wait_for_end(pid: int) -> None:
    """Wait for a child of this process without reaping it."""
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


class Child:
    """A process of the demo. The terminal shows its output after its name."""

    def __init__(self, name: str, process: asyncio.subprocess.Process) -> None:
        self.name = name
        self.process = process
        self.last_lines: deque[str] = deque(maxlen=20)
        self.ended = asyncio.create_task(self._copy_until_end())

    @classmethod
    async def start(cls, name: str, command: list[str], **environment: str) -> Child:
        """Start ``command`` in its own session, so that Ctrl-C reaches only the demo."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "example.tied", str(os.getpid())),
            *(sys.executable, *command[1:]),
            cwd=ROOT,
            env={
                **os.environ,
                "DJANGO_SETTINGS_MODULE": "example.settings",
                "PYTHONUNBUFFERED": "1",
                **environment,
            },
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        return cls(name, process)

    async def _copy_until_end(self) -> int:
        output = self.process.stdout
        assert output is not None
        while True:
            try:
                line = await output.readline()
            except ValueError:  # skip a line that is longer than the reader's buffer
                continue
            if not line:
                return await self.process.wait()
            text = line.decode(errors="replace").rstrip()
            self.last_lines.append(text)
            say(f"{self.name:>8} | {text}")

    def describe_end(self) -> str:
        code = self.process.returncode or 0
        how = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
        output = "\n".join(f"    {line}" for line in self.last_lines) or "    (nothing)"
        return f"{self.name} ended {how}. Its last output:\n{output}"

    async def stop(self) -> None:
        """Terminate the process; kill it after `STOP_WITHIN` seconds."""
        for request in (signal.SIGTERM, signal.SIGKILL):
            if self.ended.done():
                return
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, request)
            await asyncio.wait({self.ended}, timeout=STOP_WITHIN)


class Demo:
    """The steps of the demo. During each step it observes signals and the end of processes."""

    def __init__(self, ports: list[int]) -> None:
        self.ports = dict(zip(("server A", "server B"), ports, strict=True))
        self.stopped = asyncio.Event()
        self.children: list[Child] = []
        self.deaths: dict[asyncio.Future[Any], Callable[[], str]] = {}

    async def run(self) -> None:
        """Run the demo until it raises ``Stopped`` or ``Failed``, and clean up."""
        async with self.database() as dsn:
            try:
                await self.migrate(dsn)
                await self.serve(dsn)
                await self.meanwhile(asyncio.get_running_loop().create_future())
            finally:
                if self.children:
                    say("Stopping the servers")
                await asyncio.gather(*(child.stop() for child in self.children))

    @contextlib.asynccontextmanager
    async def database(self) -> AsyncIterator[str]:
        """Yield the DSN of the environment's database, or of a temporary database."""
        if dsn := os.environ.get("PG_LAYER_DSN"):
            say("Using the PostgreSQL that PG_LAYER_DSN names")
            yield dsn
            return
        say("Starting a PostgreSQL server, which is removed when the demo ends")
        server = PostgresServer(fsync=False)
        try:
            # This must not be interrupted. A signal is handled afterwards.
            await asyncio.to_thread(server.start)
            dsn = await asyncio.to_thread(server.create_database, "chat")
            if hasattr(os, "waitid"):  # macOS has it since Python 3.13
                death = asyncio.ensure_future(asyncio.to_thread(wait_for_end, server.pid))
                self.deaths[death] = lambda: (
                    f"PostgreSQL ended. Its log ends with:\n{server.log_tail()}"
                )
            yield dsn
        except PostgresServerError as error:
            if self.stopped.is_set():
                raise Stopped from error
            raise Failed(str(error)) from error
        finally:
            say("Stopping PostgreSQL")
            await asyncio.to_thread(server.close)

    async def start(self, name: str, command: list[str], **environment: str) -> Child:
        child = await Child.start(name, command, **environment)
        self.children.append(child)
        return child

    async def migrate(self, dsn: str) -> None:
        say(f"Creating the tables: {shlex.join(commands.MIGRATE)}")
        child = await self.start("migrate", commands.MIGRATE, PG_LAYER_DSN=dsn)
        if await self.meanwhile(asyncio.shield(child.ended)):
            raise Failed("The tables could not be created. See the output above.")

    async def serve(self, dsn: str) -> None:
        """Start all processes, and print their addresses when they answer."""
        say("Starting two servers, and the sweeper that deletes expired rows")
        addresses = {name: f"http://{HOST}:{port}" for name, port in self.ports.items()}
        servers = []
        for name, port in self.ports.items():
            [other] = (address for owner, address in addresses.items() if owner != name)
            environment = {"PG_LAYER_DSN": dsn, "DEMO_NAME": name, "DEMO_OTHER_URL": other}
            servers.append(await self.start(name, commands.serve(HOST, port), **environment))
        sweeper = await self.start("sweeper", commands.SWEEP, PG_LAYER_DSN=dsn)
        self.deaths |= {child.ended: child.describe_end for child in (*servers, sweeper)}
        for server in servers:
            await self.meanwhile(answers(server, self.ports[server.name]))
        say()
        for name, address in addresses.items():
            say(f"    {name}: {address}/")
        say()
        say(
            "Open both side by side: text in one window appears in the other. Ctrl-C ends the demo."
        )
        say()

    async def meanwhile(self, awaitable: Awaitable[T]) -> T:
        """Return the result of ``awaitable``, unless a signal or a process's end comes first."""
        result = asyncio.ensure_future(awaitable)
        stop = asyncio.ensure_future(self.stopped.wait())
        try:
            await asyncio.wait({result, stop, *self.deaths}, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                raise Stopped
            for death, describe in self.deaths.items():
                if death.done():
                    raise Failed(describe())
            return await result
        finally:
            stop.cancel()
            result.cancel()


async def answers(server: Child, port: int) -> None:
    """Return when ``server``, and no other process, serves a page on ``port``."""
    deadline = time.monotonic() + READY_WITHIN
    while await asyncio.to_thread(serving_pid, port) != str(server.process.pid):
        if time.monotonic() > deadline:
            raise Failed(f"{server.name} does not answer on port {port} after {READY_WITHIN:g} s.")
        await asyncio.sleep(0.05)  # an opened port sends no event


def serving_pid(port: int) -> str | None:
    """Return the process id that the page on ``port`` shows, if there is such a page."""
    connection = http.client.HTTPConnection(HOST, port, timeout=5)
    try:
        connection.request("GET", "/")
        response = connection.getresponse()
        return response.headers["X-Demo-Pid"] if response.status == 200 else None
    except (OSError, http.client.HTTPException):
        return None
    finally:
        connection.close()


async def run(ports: list[int]) -> int:
    demo = Demo(ports)
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if (
            signum == signal.SIGINT or signal.getsignal(signum) is not signal.SIG_IGN
        ):  # as nohup sets it
            loop.add_signal_handler(signum, demo.stopped.set)
    try:
        await demo.run()
    except Failed as error:
        say(f"\n{error}")
        return 1
    except Stopped:
        say("Stopped. Nothing is left behind.")
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Run the command line. Return the exit status: 0 after a signal, 1 after an error."""
    parser = argparse.ArgumentParser(
        prog="python -m example.demo",
        description="A chat in two server processes that communicate through PostgreSQL only.",
        epilog="PG_LAYER_DSN names the database. Without it, the demo starts a database.",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=FIRST_PORT,
        help="the first server's port, or the next free one; 0 for any (default: %(default)s)",
    )
    parser.add_argument(
        "--no-browser",
        action="store_true",
        default=True,
        help="open no browser (always so: the demo never does)",
    )
    options = parser.parse_args(arguments)
    if not 0 <= options.port < 65535:
        parser.error(f"--port {options.port}: a number from 0 to 65534 expected")
    try:
        ports = choose_ports(options.port, 2)
    except Failed as error:
        say(str(error))
        return 1
    return asyncio.run(run(ports))


if __name__ == "__main__":
    sys.exit(main())
