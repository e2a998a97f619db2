"""Async functions of the tests, run in processes of their own.

    async def double(link: Link, number: int) -> int: ...

    process = processes.start(double, 21)
    assert await process.result() == 42

`link` leads to the test: both ends say and hear whatever can be pickled. They are forked from a clean
process that has the modules loaded already: as separate as freshly started ones, but there at once.
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

from pg_layer import PostgresChannelLayer

T = TypeVar("T")
P = ParamSpec("P")

Message = dict[str, Any]

PATIENCE = 30.0  # seconds for what should take an instant, on a machine that has much else to do

# Nothing heals by a heartbeat's second look, unless a test is about that.
UNHURRIED: dict[str, object] = {"lease": 3600, "heartbeat": 1200}

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["hypothesis", "psycopg", "pytest", "tests.processes"])


class ProcessFailed(Exception):
    """The function in the other process raised, leaked, or the process ended in the middle of it."""


class _Said(NamedTuple):
    what: Any


class _Returned(NamedTuple):
    value: Any


class _Failed(NamedTuple):
    why: str


class Link:
    """One end of the line between a test and its process. Belongs to one event loop."""

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
        """Send to the other end."""
        self._connection.send(_Said(what))

    async def hear(self) -> Any:
        """What the other end said next."""
        return (await self.next()).what

    async def next(self) -> Any:
        return await asyncio.wait_for(self._heard.get(), PATIENCE)

    def pretend(self, last: object) -> None:
        """As if the other end had sent it."""
        self._heard.put_nowait(last)

    def close(self) -> None:
        self._loop.remove_reader(self._connection.fileno())
        self._connection.close()


class Process(Generic[T]):
    """A process that runs ``function(link, *args)``. Made on the test's event loop."""

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
        """Let the function hear something."""
        self._link.say(what)

    async def hear(self) -> Any:
        """What the function said next. Raises `ProcessFailed` if it failed or ended instead."""
        said = await self._next()
        if isinstance(said, _Returned):
            raise ProcessFailed(
                f"The function returned {said.value!r} instead of saying something."
            )
        return said.what

    async def result(self) -> T:
        """What the function returned. Raises `ProcessFailed` if it failed, or says something instead."""
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
        """End it as `kill -9` does; returns when it is gone."""
        self._process.kill()
        self._process.join()

    def close(self) -> None:
        self.kill()
        self._process.close()
        self._link.close()


class Processes:
    """Starts processes, and ends those that still run when it is closed."""

    def __init__(self) -> None:
        self._all: list[Process[Any]] = []

    def start(
        self,
        function: Callable[Concatenate[Link, P], Coroutine[Any, Any, T]],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Process[T]:
        """Run an async function of a test module in a process of its own."""
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
        # A test that is gone takes its processes with it.
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
    """A layer with these options of CONFIG, to be closed by the caller."""
    return PostgresChannelLayer(**{"dsn": dsn, **UNHURRIED, **options})


@contextlib.asynccontextmanager
async def open_layer(dsn: str, **options: object) -> AsyncIterator[PostgresChannelLayer]:
    """A layer that is closed in the end."""
    layer = new_layer(dsn, **options)
    try:
        yield layer
    finally:
        await layer.close()


async def until(check: Callable[[], T], patience: float = PATIENCE) -> T:
    """Look until ``check`` returns something true, and return that. For what announces itself nowhere."""
    deadline = time.monotonic() + patience
    while not (found := check()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"Still not after {patience:g} seconds.")
        await asyncio.sleep(0.02)
    return found


# ---------------------------------------------------------------------- functions that many tests run


async def receive(layer: PostgresChannelLayer, channel: str) -> Message:
    """The next message of a channel; raises `TimeoutError` rather than wait for ever."""
    return await asyncio.wait_for(layer.receive(channel), PATIENCE)


async def write(
    link: Link, /, dsn: str, channel: str, messages: Iterable[Message], **options: object
) -> None:
    """Send messages to a channel, one after the other."""
    async with open_layer(dsn, **options) as layer:
        for message in messages:
            await layer.send(channel, message)


async def read(link: Link, /, dsn: str, count: int, **options: object) -> list[Message]:
    """Say the name of a new channel once it is listened to, then receive ``count`` messages on it."""
    async with open_layer(dsn, **options) as layer:
        channel = await layer.new_channel()
        await listen(layer)
        link.say(channel)
        return [await receive(layer, channel) for _ in range(count)]


async def listen(layer: PostgresChannelLayer) -> None:
    """Have the layer listen: afterwards messages come by doorbell."""
    channel = await layer.new_channel()
    await layer.send(channel, {"type": "hello"})
    await receive(layer, channel)
