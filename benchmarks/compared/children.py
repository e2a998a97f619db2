"""The forked processes of a measurement, which start quickly and share memory."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
import traceback
from array import array
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from benchmarks.board import Board, Window, warm_up
from benchmarks.scenarios.base import cancel, pace
from pg_layer import PostgresChannelLayer

GROUP = "compared.room"
PAYLOAD = "x" * 200
#: Large enough that no channel is ever full.
CAPACITY = 1_000_000

_FORK = multiprocessing.get_context("fork")
_TIMEOUT = 600.0

Role = Callable[..., Any]


class Failed(Exception):
    """A process of the measurement failed; the message gives the reason."""


class Child:
    """A forked process that runs a role: a function with a pipe to this process."""

    def __init__(self, role: Role, *args: object) -> None:
        self._pipe, child_end = _FORK.Pipe()
        arguments = (self._pipe, child_end, role, args)
        self._process = _FORK.Process(target=_play, args=arguments, daemon=True)
        self._process.start()
        child_end.close()

    def send(self, value: object) -> None:
        self._pipe.send(value)

    def receive(self, timeout: float = _TIMEOUT) -> Any:
        """Return the role's answer. Raise ``Failed`` if it failed or did not answer in time."""
        if not self._pipe.poll(timeout):
            raise Failed(f"a process sent nothing for {timeout:g} s")
        try:
            value = self._pipe.recv()
        except EOFError:
            raise Failed("a process ended before its time") from None
        if isinstance(value, Failed):
            raise value
        return value

    def request(self, value: object, timeout: float = _TIMEOUT) -> Any:
        self.send(value)
        return self.receive(timeout)

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def join(self) -> None:
        self._process.join(_TIMEOUT)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def _signal(self, signum: signal.Signals) -> None:
        if self._process.pid is not None:
            os.kill(self._process.pid, signum)


class Children:
    """A set of children, which are killed at the end of the ``with`` block."""

    def __init__(self) -> None:
        self._children: list[Child] = []

    def __enter__(self) -> Children:
        return self

    def __exit__(self, *error: object) -> None:
        for child in self._children:
            child.kill()

    def start(self, role: Role, *args: object) -> Child:
        child = Child(role, *args)
        self._children.append(child)
        return child


@contextmanager
def paused(children: Sequence[Child]) -> Iterator[None]:
    for child in children:
        child.pause()
    try:
        yield
    finally:
        for child in children:
            child.resume()


def message(number: int, sent_ns: int = 0) -> dict[str, Any]:
    """Return a message of 200 characters.

    A negative number marks a warm-up. The age of a message with the time 0 is not measured.
    """
    return {"type": "bench.message", "n": number, "t": sent_ns, "p": PAYLOAD}


# ----------------------------------------------------------------------- roles


async def receive(pipe: Connection, dsn: str, board: Board, index: int, members: int) -> None:
    """Join the group with some channels, send their names, and read.

    Answer each "report" with the ages in nanoseconds since the last one. End at anything else.
    """
    # Memberships of a killed process last as long as its lease.
    layer = PostgresChannelLayer(dsn=dsn, capacity=CAPACITY, lease=600)
    ages = array("q")

    async def read(channel: str) -> None:
        warm = False
        while True:
            received = await layer.receive(channel)
            now = time.monotonic_ns()
            if received["n"] < 0:
                if not warm:
                    board.warm(index)
                warm = True
                continue
            if received["t"]:
                ages.append(now - received["t"])
            board.deliver(index, now)

    async def answer() -> None:
        while await asyncio.to_thread(pipe.recv) == "report":
            pipe.send(ages[:])
            del ages[:]

    channels = [await layer.new_channel() for _ in range(members)]
    await asyncio.gather(*(layer.group_add(GROUP, channel) for channel in channels))
    readers = [asyncio.create_task(read(channel)) for channel in channels]
    pipe.send(channels)
    answering = asyncio.create_task(answer())
    done, _ = await asyncio.wait([answering, *readers], return_when=asyncio.FIRST_COMPLETED)
    for task in done:
        task.result()
    await cancel(readers)
    await layer.close()


async def send(pipe: Connection, dsn: str, board: Board, members: int, expiry: float) -> None:
    """Warm up until all members in all processes have received a message. Then obey orders.

    ``("flood", at_once, count, seconds, window)``: ``at_once`` tasks send to the group, each the
    next message when ``group_send`` has returned. They stop after ``count`` messages or after
    ``seconds``. With a ``window`` other than 0 they are at most so many messages ahead of the
    slowest process.

    ``("pace", channel, seconds, rate)``: send ``rate`` messages a second, one after the other, to
    the channel, or to the group if the channel is "".

    Answer with the number of messages sent and the seconds that it took. End at None.
    """
    layer = PostgresChannelLayer(dsn=dsn, capacity=CAPACITY, expiry=expiry)
    orders: dict[str, Callable[..., Awaitable[int]]] = {"flood": _flood, "pace": _pace}

    async def greet() -> None:
        await asyncio.gather(*(layer.group_send(GROUP, message(-1)) for _ in range(10)))

    await warm_up(board, [members] * board.readers, greet, time_limit=60)
    pipe.send("ready")
    while order := await asyncio.to_thread(pipe.recv):
        start = board.start()
        sent = await orders[order[0]](layer, board, members, *order[1:])
        pipe.send((sent, (time.monotonic_ns() - start) / 1e9))
    await layer.close()


async def _flood(
    layer: PostgresChannelLayer,
    board: Board,
    members: int,
    at_once: int,
    count: int,
    seconds: float,
    window: int,
) -> int:
    end = time.monotonic_ns() + int(seconds * 1e9)
    before = [board.delivered(reader) for reader in range(board.readers)]
    numbers = iter(range(count))
    sent = 0

    def arrived() -> int:
        now = [board.delivered(reader) for reader in range(board.readers)]
        return min((new - old) // members for new, old in zip(now, before, strict=True))

    async def work(room: Window) -> None:
        nonlocal sent
        for number in numbers:
            if window:
                await room.take()
            if (now := time.monotonic_ns()) >= end:
                return
            await layer.group_send(GROUP, message(number, now))
            sent += 1

    async with Window(window or count, arrived) as room:
        await asyncio.gather(*(work(room) for _ in range(at_once)))
    return sent


async def _pace(
    layer: PostgresChannelLayer,
    board: Board,
    members: int,
    channel: str,
    seconds: float,
    rate: float,
) -> int:
    async def one(number: int, sent_ns: int) -> None:
        if channel:
            await layer.send(channel, message(number, sent_ns))
        else:
            await layer.group_send(GROUP, message(number, sent_ns))

    return await pace(seconds, rate, one)


def sweep(pipe: Connection) -> None:
    """Run ``manage.py pg_layer_sweep --once``."""
    from django.conf import settings
    from django.core.management import call_command

    settings.CHANNEL_LAYERS = {"default": {"BACKEND": "pg_layer.PostgresChannelLayer"}}
    call_command("pg_layer_sweep", "--once", verbosity=0)


def _play(own_end: Connection, child_end: Connection, role: Role, args: tuple[object, ...]) -> None:
    own_end.close()  # the role must notice the end of this process
    try:
        if asyncio.iscoroutinefunction(role):
            asyncio.run(role(child_end, *args))
        else:
            role(child_end, *args)
    except BaseException:
        child_end.send(Failed(traceback.format_exc()))
