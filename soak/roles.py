"""The roles of the processes: what they do and record."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

from asgiref.sync import async_to_sync

from pg_layer import ChannelFull, LayerUnavailable, OutcomeUnknown, PostgresChannelLayer
from soak.absences import HEARTBEAT, LEASE
from soak.book import Book, now
from soak.records import (
    KINDS,
    Begun,
    Cancelled,
    Closed,
    Ended,
    Got,
    Joined,
    Joining,
    Kind,
    Leaving,
    Left,
    Opened,
    Outcome,
)

Role = Literal["sender", "threads", "clerk", "receiver", "worker", "single", "sweeper"]

SENDING: tuple[Role, ...] = ("sender", "threads", "clerk")
ON_DJANGOS_CONNECTION: tuple[Role, ...] = ("clerk",)

GROUPS = ("lobby", "hall", "attic", "cellar")
JOBS, LINE = "jobs", "line"  # normal channels: one with many workers, one with a single reader

# No channel fills and no message expires before it can be received, so a missing message was lost.
# Everything else is faster than usual, so that a short run has many heartbeats, leases and sweeps.
OPTIONS: dict[str, object] = {
    "expiry": 180,
    "capacity": 100_000,
    "heartbeat": HEARTBEAT,
    "lease": LEASE,
    "send_timeout": 5,
    "sweep_interval": 15,
}
SWEEP = 0.5  # seconds between two sweeps of the sweeper

WRITERS = 3  # of a sending process
PAUSE = 0.03  # seconds between two messages of a writer, on average
BURST, BURST_MOST = 0.005, 200  # probability of a burst without pauses, and its length at most
# Most messages fit into a notification. The others must be read from the table.
SIZES, SIZE_WEIGHTS = ((10, 3000, 9000, 300_000), (80, 10, 9, 1))
STEADY = 2  # channels that a receiving process keeps
VISITORS = 2  # channels of a receiving process that are replaced again and again
RETRY = 0.1  # seconds
CALM = 0.5  # seconds for which a channel that has left its groups is still read

# The text of LayerUnavailable if the event loop of another thread may still send the message.
_NO_ANSWER = "does not answer"


@dataclass(frozen=True)
class Part:
    """The parameters of a process. ``takes_network``: its DSN is that of the breaking network."""

    role: Role
    name: str
    dsn: str
    takes_network: bool
    folder: Path
    seed: int


class Player:
    """The base class of a role: a process with a layer that runs until SIGTERM."""

    def __init__(self, part: Part, pipe: Connection, book: Book) -> None:
        self.part = part
        self.book = book
        self.random = random.Random(part.seed)
        self.layer = PostgresChannelLayer(dsn=part.dsn, **OPTIONS)
        self.specific: list[str] = []  # channels that other processes read
        self.groups: tuple[str, ...] = GROUPS
        self.is_quiet = False  # send no more messages and join no more groups
        self.is_ending = False
        self.must_die = False  # kill itself between the next commit and its announcement
        self.end: asyncio.Future[None]
        self._pipe = pipe

    async def run(self) -> None:
        """Play the role until SIGTERM, then close the layer."""
        loop = asyncio.get_running_loop()
        self.end = loop.create_future()
        loop.add_signal_handler(signal.SIGTERM, self._stop)
        loop.add_reader(self._pipe.fileno(), self._read_pipe)
        try:
            await self.play()
        finally:
            loop.remove_reader(self._pipe.fileno())
            await self.layer.close()

    async def play(self) -> None:
        """Do the work of the role until the process is asked to end."""
        raise NotImplementedError

    def on_end(self) -> None:
        """React to the request to end. Called once."""

    def say(self, what: str, value: object = None) -> None:
        """Notify the parent."""
        self._pipe.send((what, value))

    async def pause(self, seconds: float) -> None:
        """Sleep, at most until the process is asked to end."""
        await asyncio.wait({self.end}, timeout=seconds)

    async def join(self, group: str, channel: str) -> None:
        """Call ``group_add`` until it succeeds."""
        if self.is_ending:
            return
        self.book.write(Joining(now(), group, channel))
        while not self.is_ending:
            try:
                await self.layer.group_add(group, channel)
            except LayerUnavailable:
                await self.pause(RETRY)
            else:
                self.book.write(Joined(now(), group, channel))
                return

    async def leave(self, group: str, channel: str) -> None:
        """Call ``group_discard`` until it succeeds."""
        if self.is_ending:
            return
        self.book.write(Leaving(now(), group, channel))
        while not self.is_ending:
            try:
                await self.layer.group_discard(group, channel)
            except LayerUnavailable:
                await self.pause(RETRY)
            else:
                self.book.write(Left(now(), group, channel))
                return

    def _read_pipe(self) -> None:
        try:
            while self._pipe.poll():
                what, value = self._pipe.recv()
                if what == "channels":
                    self.specific = value
                elif what == "quiet":
                    self.is_quiet = True
                elif what == "die":
                    self.must_die = True
        except (EOFError, ConnectionResetError):
            os._exit(1)

    def _stop(self) -> None:
        if not self.is_ending:
            self.is_ending = True
            self.on_end()
            if not self.end.done():  # the cancellation of a task that awaits it also cancels it
                self.end.set_result(None)


# ---------------------------------------------------------------------- sending


class Sending(Player):
    """The base class of roles with writers. A writer sends one message after the other."""

    def plan(self, chance: random.Random) -> Iterator[tuple[Kind, str, float]]:
        """Yield without end what to send where, and how long to pause afterwards."""
        while True:
            kind, stream = self.choose(chance)
            if chance.random() < BURST:
                yield from [(kind, stream, 0.0)] * chance.randrange(BURST_MOST)
            yield kind, stream, chance.expovariate(1 / PAUSE)

    def begin(
        self,
        chance: random.Random,
        writer: str,
        n: int,
        kind: Kind,
        stream: str,
        *,
        in_transaction: bool = False,
    ) -> dict[str, Any]:
        """Record that a message is about to be sent, and return the message."""
        (size,) = chance.choices(SIZES, SIZE_WEIGHTS)
        self.book.write(Begun(now(), writer, n, kind, stream, in_transaction))
        return {"type": "soak", "from": writer, "n": n, "pad": b"." * chance.randrange(size)}

    def choose(self, chance: random.Random) -> tuple[Kind, str]:
        """Choose a kind of stream and one stream of that kind."""
        kind: Kind = chance.choice(KINDS)
        if kind == "specific" and self.specific:
            return kind, chance.choice(self.specific)
        if kind == "normal":
            return kind, JOBS
        if kind == "single":
            return kind, LINE
        return "group", chance.choice(self.groups)


class Sender(Sending):
    """A process that sends from tasks of one event loop."""

    async def play(self) -> None:
        self.groups = (*GROUPS, f"own-{self.part.name}")
        self.say("ready")
        writers = [
            asyncio.ensure_future(
                self._write(f"{self.part.name}.{number}", self.random.getrandbits(32))
            )
            for number in range(WRITERS)
        ]
        await asyncio.gather(self._host(), *writers)
        self.say("quiet")
        await self.end

    async def _write(self, writer: str, seed: int) -> None:
        chance = random.Random(seed)
        for n, (kind, stream, pause) in enumerate(self.plan(chance), 1):
            if self.is_quiet or self.is_ending:
                break
            message = self.begin(chance, writer, n, kind, stream)
            outcome = await _attempt(self.layer, kind, stream, message)
            self.book.write(Ended(now(), writer, n, outcome))
            if pause:
                await self.pause(pause)

    async def _host(self) -> None:
        """Add channels of other processes to a group that only this process sends to."""
        (group,) = set(self.groups) - set(GROUPS)
        while not (self.is_quiet or self.is_ending):
            await self.pause(self.random.uniform(0.2, 1.0))
            if self.specific:
                channel = self.random.choice(self.specific)
                await self.join(group, channel)
                await self.pause(self.random.uniform(0.2, 4.0))
                await self.leave(group, channel)


class Threads(Sending):
    """A process that sends from threads with ``async_to_sync``."""

    async def play(self) -> None:
        self.say("ready")
        await asyncio.gather(
            *(
                asyncio.to_thread(
                    self._write, f"{self.part.name}.{number}", self.random.getrandbits(32)
                )
                for number in range(WRITERS)
            )
        )
        self.say("quiet")
        await self.end

    def _write(self, writer: str, seed: int) -> None:
        chance = random.Random(seed)
        rest = threading.Event()
        attempt: Callable[..., Outcome] = async_to_sync(_attempt)
        for n, (kind, stream, pause) in enumerate(self.plan(chance), 1):
            if self.is_quiet or self.is_ending:
                break
            message = self.begin(chance, writer, n, kind, stream)
            outcome = attempt(self.layer, kind, stream, message)
            self.book.write(Ended(now(), writer, n, outcome))
            rest.wait(pause)


async def _attempt(
    layer: PostgresChannelLayer, kind: Kind, stream: str, message: dict[str, Any]
) -> Outcome:
    try:
        if kind == "group":
            await layer.group_send(stream, message)
        else:
            await layer.send(stream, message)
    except ChannelFull:
        return "refused"
    except OutcomeUnknown:
        return "unknown"
    except LayerUnavailable as error:
        return "unknown" if _NO_ANSWER in str(error) else "refused"
    return "returned"


# ---------------------------------------------------------------------- receiving


class Receiving(Player):
    """The base class of roles that read channels and sometimes cancel ``receive()``."""

    async def next(self, channel: str, timeout: float | None = None) -> bool:
        """Receive and record one message; return False if the receive was cancelled.

        ``timeout``: seconds until it is cancelled, random by default.
        """
        task: asyncio.Future[Any] = asyncio.ensure_future(self.layer.receive(channel))
        if timeout is None:
            timeout = self.random.choice((0.0, self.random.random() / 100, 0.2, 5.0, 5.0, 5.0))
        if timeout == 0.0:
            await asyncio.sleep(0)
        else:
            await asyncio.wait(
                (task, self.end), timeout=timeout, return_when=asyncio.FIRST_COMPLETED
            )
        if not task.done():
            task.cancel()
        try:
            message = await task
        except asyncio.CancelledError:
            self.book.write(Cancelled(now()))
            return False
        self.book.write(Got(now(), channel, message["from"], message["n"]))
        return True


class Receiver(Receiving):
    """A process that reads its own channels, which join and leave groups."""

    async def play(self) -> None:
        self._open: set[str] = set()
        ready = asyncio.gather(*(self._steady() for _ in range(STEADY)))
        visitors = asyncio.gather(*(self._visitors() for _ in range(VISITORS)))
        self.say("ready")
        await asyncio.gather(ready, visitors)

    def on_end(self) -> None:
        for channel in list(self._open):
            self._close(channel)

    async def _steady(self) -> None:
        channel = await self._open_one()
        reading = asyncio.ensure_future(self._read(channel))
        groups = self.random.sample(GROUPS, 2)
        for group in groups:
            await self.join(group, channel)
        while not self.is_ending:
            await self.pause(self.random.uniform(0.5, 4.0))
            if self.is_quiet or self.is_ending:
                break
            index = self.random.randrange(len(groups))
            await self.leave(groups[index], channel)
            groups[index] = self.random.choice(
                [g for g in GROUPS if g not in groups or g == groups[index]]
            )
            await self.join(groups[index], channel)
        await reading

    async def _visitors(self) -> None:
        while not (self.is_quiet or self.is_ending):
            channel = await self._open_one()
            group = self.random.choice(GROUPS)
            reading = asyncio.ensure_future(self._read(channel))
            await self.join(group, channel)
            await self.pause(self.random.uniform(0.2, 5.0))
            await self.leave(group, channel)
            self.say("closed", channel)
            await self.pause(CALM)
            self._close(channel)
            await reading

    async def _open_one(self) -> str:
        channel = await self.layer.new_channel()
        self._open.add(channel)
        self.book.write(Opened(now(), channel))
        self.say("opened", channel)
        return channel

    def _close(self, channel: str) -> None:
        if channel in self._open:
            self._open.discard(channel)
            self.book.write(Closed(now(), channel))

    async def _read(self, channel: str) -> None:
        while channel in self._open:
            await self.next(channel)


class Worker(Receiving):
    """One of several readers of jobs. It is sometimes slow, so prefetched jobs are released."""

    channel = JOBS
    readers = 2

    async def play(self) -> None:
        self.say("ready")
        await asyncio.gather(*(self._work() for _ in range(self.readers)))

    async def _work(self) -> None:
        while not self.is_ending:
            if await self.next(self.channel) and self.random.random() < 0.05:
                await self.pause(self.random.uniform(0.02, 0.3))


class Single(Worker):
    """The only reader of its channel, which receives the jobs in order."""

    channel = LINE
    readers = 1
