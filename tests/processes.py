"""Run async functions of the tests in other processes.

    async def double(link: Link, number: int) -> int: ...

    process = processes.start(double, 21)
    assert await process.result() == 42

`link` connects the function with the test: both ends send and receive objects that can be pickled.
The processes are forked from a clean process that has imported the modules. They are as isolated as
new processes, but start at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import multiprocessing
import os
import sys
import time
import traceback
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from multiprocessing.connection import Connection
from typing import Any, Concatenate, Generic, NamedTuple, ParamSpec, TypeVar

import psutil
import psycopg

from pg_layer import PostgresChannelLayer

T = TypeVar("T")
P = ParamSpec("P")

Message = dict[str, Any]

TIMEOUT = 30.0  # seconds: a limit for short operations that holds on a busy machine

# A heartbeat repairs missed notifications. Without heartbeats a test cannot pass because of one.
UNHURRIED: dict[str, object] = {"lease": 3600, "heartbeat": 1200}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["hypothesis", "psycopg", "pytest", "tests.processes"])


class ProcessFailed(Exception):
    """The function in the other process raised or leaked, or its process ended early."""


class _Said(NamedTuple):
    what: Any


class _Returned(NamedTuple):
    value: Any


class _Failed(NamedTuple):
    why: str


class Link:
    """One end of the connection between a test and its process. Belongs to one event loop."""

    def __init__(self, connection: Connection, on_end: Callable[[], None]) -> None:
        self._connection = connection
        self._on_end = on_end
        self._heard: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(connection.fileno(), self._readable)

    def _readable(self) -> None:
        try:
            while self._connection.poll():
                self._heard.put_nowait(self._connection.recv())
        except (EOFError, ConnectionResetError):
            self._loop.remove_reader(self._connection.fileno())
            self._on_end()

    def say(self, what: object) -> None:
        """Send an object to the other end."""
        self._connection.send(_Said(what))

    async def hear(self) -> Any:
        """Return the next object that the other end sends with `say`."""
        return (await self.next()).what

    async def next(self) -> Any:
        """Return the next message of any kind. Raises `TimeoutError`."""
        return await asyncio.wait_for(self._heard.get(), TIMEOUT)

    def pretend(self, last: object) -> None:
        """Append a last message, in place of one from the other end."""
        self._heard.put_nowait(last)

    def close(self) -> None:
        self._loop.remove_reader(self._connection.fileno())
        self._connection.close()


class Process(Generic[T]):
    """A process that runs ``function(link, *args)``. Created on the test's event loop."""

    def __init__(
        self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any, **kwargs: Any
    ) -> None:
        here, there = _context.Pipe()
        self._process = _context.Process(
            target=_main, args=(there, function, args, kwargs), daemon=True
        )
        self._process.start()
        there.close()
        gone = _Failed("The process ended before the function did.")
        self._link = Link(here, on_end=lambda: self._link.pretend(gone))

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def say(self, what: object = None) -> None:
        """Send an object to the function."""
        self._link.say(what)

    async def hear(self) -> Any:
        """Return the next object from the function. Raises `ProcessFailed` if it ends instead."""
        said = await self._next()
        if isinstance(said, _Returned):
            raise ProcessFailed(
                f"The function returned {said.value!r} instead of saying something."
            )
        return said.what

    async def result(self) -> T:
        """Return the result of the function.

        Raises `ProcessFailed` if the function fails or sends an object instead.
        """
        said = await self._next()
        if not isinstance(said, _Returned):
            raise ProcessFailed(f"The function said {said.what!r} instead of returning.")
        result: T = said.value
        return result

    async def _next(self) -> Any:
        said = await self._link.next()
        if isinstance(said, _Failed):
            raise ProcessFailed(said.why)
        return said

    def kill(self) -> None:
        """Send SIGKILL and wait until the process has ended."""
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        self.kill()
        self._process.close()
        self._link.close()


class Processes:
    """A set of processes; `close` kills those that still run."""

    def __init__(self) -> None:
        self._all: list[Process[Any]] = []

    def start(
        self,
        function: Callable[Concatenate[Link, P], Coroutine[Any, Any, T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Process[T]:
        """Run an async function of a test module in a new process."""
        process = Process(function, *args, **kwargs)
        self._all.append(process)
        return process

    def close(self) -> None:
        for process in self._all:
            process.close()


def _main(
    connection: Connection,
    function: Callable[..., Coroutine[Any, Any, object]],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    warnings.simplefilter("error")
    leaks: list[str] = []
    sys.unraisablehook = lambda args: leaks.append(
        f"{args.err_msg}: {args.exc_value!r} in {args.object!r}"
    )

    async def run() -> object:
        # If the test ends without close(), its processes end too.
        link = Link(connection, on_end=lambda: os._exit(1))
        try:
            return await function(link, *args, **kwargs)
        finally:
            asyncio.get_running_loop().remove_reader(connection.fileno())

    last: object
    try:
        result = asyncio.run(run())
        gc.collect()
        last = _Failed("\n".join(leaks)) if leaks else _Returned(result)
    except BaseException:
        last = _Failed(traceback.format_exc())
    with contextlib.suppress(BrokenPipeError):
        connection.send(last)


def new_layer(dsn: str, **options: object) -> PostgresChannelLayer:
    """Return a layer with options of CONFIG. The caller must close it."""
    return PostgresChannelLayer(**{"dsn": dsn, **UNHURRIED, **options})


@contextlib.asynccontextmanager
async def open_layer(dsn: str, **options: object) -> AsyncIterator[PostgresChannelLayer]:
    """Yield a layer and close it at the end."""
    layer = new_layer(dsn, **options)
    try:
        yield layer
    finally:
        await layer.close()


async def until(check: Callable[[], T], timeout: float = TIMEOUT) -> T:
    """Poll ``check`` until its result is true and return it, if no event reports the change.

    Raises `TimeoutError` after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    while not (found := check()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"Still not after {timeout:g} seconds.")
        await asyncio.sleep(0.02)
    return found


def terminate_backends(connection: psycopg.Connection[Any], condition: str) -> list[int]:
    """Terminate the server's processes that meet an SQL condition. Return when they are gone.

    ``pg_terminate_backend(pid, timeout)`` returns a moment before a process closes its socket.
    """
    pids = [
        pid
        for (pid, _) in connection.execute(
            f"SELECT pid, pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE {condition}"
        )
    ]
    deadline = time.monotonic() + TIMEOUT
    while any(map(psutil.pid_exists, pids)):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return pids


# ------------------------------------------------------------------ shared functions


async def receive(layer: PostgresChannelLayer, channel: str) -> Message:
    """Return the next message of a channel. Raises `TimeoutError` after `TIMEOUT` seconds."""
    return await asyncio.wait_for(layer.receive(channel), TIMEOUT)


async def write(
    link: Link, /, dsn: str, channel: str, messages: Iterable[Message], **options: object
) -> None:
    """Send messages to a channel one after the other."""
    async with open_layer(dsn, **options) as layer:
        for message in messages:
            await layer.send(channel, message)


async def read(link: Link, /, dsn: str, count: int, **options: object) -> list[Message]:
    """Say the name of a new channel when the layer listens to it; return ``count`` messages."""
    async with open_layer(dsn, **options) as layer:
        channel = await layer.new_channel()
        await listen(layer)
        link.say(channel)
        return [await receive(layer, channel) for _ in range(count)]


async def listen(layer: PostgresChannelLayer) -> None:
    """Make the layer listen, so that later messages arrive by notification."""
    channel = await layer.new_channel()
    await layer.send(channel, {"type": "hello"})
    await receive(layer, channel)
