"""The parts of a scenario: sizes, the roles of its processes, and their reading loop."""

from __future__ import annotations

import asyncio
import time
from array import array
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from channels.exceptions import ChannelFull

from benchmarks.board import Board
from benchmarks.layers import Layer, LayerKind, LayerSpec
from benchmarks.statistics import Figure, Outcome, Stream, Tally, fell_behind, tally_channel

Scale = Literal["full", "quick", "tiny"]
T = TypeVar("T")

PAYLOAD = "x" * 100
_STOP_CHECK = 0.05
_FULL_WAIT = 0.005


@dataclass(frozen=True)
class Sizes:
    """The sizes of a scenario, which uses those that it needs."""

    seconds: float  # how long the sender sends
    processes: int = 1  # receiving processes
    members: int = 1  # channels in each receiving process
    tasks: int = 1  # concurrent tasks in the sender
    rate: float = 0  # paced sends a second
    window: int = 0  # messages in flight at most
    room: int = 0  # members of one group in all processes together
    group_rate: float = 0  # paced sends to a group a second
    clients: int = 0  # clients of pgbench
    pgbench_scale: int = 0  # scale of the application's tables, 0 without an application
    spread: int = 0  # channels over all processes, instead of ``members`` in each
    payload: int = len(PAYLOAD)  # characters in a message
    groups: int = 0
    waiting: int = 0  # messages that wait in other channels
    settle: float = 0  # seconds of quiet before idle costs are measured

    def channels(self, process: int) -> int:
        """Return how many channels this receiving process reads."""
        if not self.spread:
            return self.members
        return self.spread // self.processes + (process < self.spread % self.processes)


@dataclass
class Sent:
    """The report of the sending process: messages by sender, and what only it knows."""

    by_sender: list[int] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)
    notes: dict[str, float] = field(default_factory=dict)
    tally: Tally = field(default_factory=Tally)

    @property
    def counts(self) -> dict[int, int]:
        return dict(enumerate(self.by_sender))

    @property
    def total(self) -> int:
        return sum(self.by_sender)


@dataclass
class Receipt:
    """The report of a receiving process: the streams of each channel.

    If the scenario needs them: the ages of messages in nanoseconds, and every (sender, number) in
    order.
    """

    streams: list[dict[int, Stream]]
    ages: array[int] = field(default_factory=lambda: array("q"))
    log: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """All reports of one measurement."""

    sizes: Sizes
    sent: Sent
    receipts: Sequence[Receipt]
    deliveries: int
    start_ns: int
    latest_ns: int

    @property
    def ages_ms(self) -> list[float]:
        return [age / 1e6 for receipt in self.receipts for age in receipt.ages]

    @property
    def pace_notes(self) -> dict[str, float]:
        """Return the sender's notes, and a note if a receiver could not keep the pace."""
        behind = any(fell_behind([age / 1e6 for age in receipt.ages]) for receipt in self.receipts)
        return {**self.sent.notes, "fell behind": int(behind)}


@dataclass
class Stage:
    """The arguments of a role. ``peers`` has the receiving processes' announcements in order."""

    spec: LayerSpec
    layer: Layer
    sizes: Sizes
    board: Board
    index: int = 0
    peers: Sequence[Any] = ()
    announce: Callable[[Any], None] = lambda value: None
    report: Callable[[Receipt], None] = lambda receipt: None


Send = Callable[[Stage], Awaitable[Sent]] | Callable[[Stage], Sent]
Receive = Callable[[Stage], Awaitable[None]]


@dataclass(frozen=True)
class Roles:
    """The roles. A ``send`` that is a plain function runs in a thread without event loop."""

    send: Send
    receive: Receive | None


@dataclass(frozen=True)
class Curve:
    """A point of a curve: the curve's name, what grows along its axis, and its value."""

    name: str
    axis: str
    x: int


@dataclass(frozen=True)
class Scenario:
    """One comparison.

    ``expected`` returns how many deliveries a run should see when the sender is done. ``bare``: the
    roles that do the same without a layer. ``in_one_loop``: sender and receivers may be tasks of
    one event loop.
    """

    name: str
    title: str
    figures: Sequence[Figure]
    scales: Mapping[Scale, Sizes]
    send: Send
    receive: Receive | None
    expected: Callable[[Sent, Sizes], int]
    summarise: Callable[[Run], Outcome]
    bare: Roles | None = None
    in_one_loop: bool = False
    curve: Curve | None = None

    def roles(self, kind: LayerKind) -> Roles | None:
        """Return the roles for this kind of layer, or None if the scenario excludes it."""
        if kind.played == "bare":
            return self.bare
        if kind.played == "in one loop" and not self.in_one_loop:
            return None
        return Roles(self.send, self.receive)


def message(sender: int, number: int, sent_ns: int, payload: str = PAYLOAD) -> dict[str, Any]:
    """Return the numbered message of all scenarios. A negative number marks a warm-up.

    The age of a message with the time 0 is not measured.
    """
    return {"type": "bench.message", "s": sender, "n": number, "t": sent_ns, "p": payload}


def warm_up_message() -> dict[str, Any]:
    return message(0, -1, 0)


async def send_retrying(send: Callable[[], Awaitable[None]]) -> int:
    """Send, again after a short wait while the channel is full; return the number of waits."""
    full = 0
    while True:
        try:
            await send()
        except ChannelFull:
            full += 1
            await asyncio.sleep(_FULL_WAIT)
        else:
            return full


async def do_many(
    do: Callable[[int], Awaitable[T]],
    count: int,
    what: str,
    *,
    at_once: int = 200,
    time_limit: float = 60.0,
) -> list[T]:
    """Run ``do(0)`` to ``do(count - 1)``, ``at_once`` concurrently; results are unordered.

    Raises TimeoutError, whose message contains how many of ``what`` were done.
    """
    results: list[T] = []
    indexes = iter(range(count))

    async def work() -> None:
        for index in indexes:
            results.append(await do(index))

    try:
        await asyncio.wait_for(
            asyncio.gather(*(work() for _ in range(min(at_once, count)))), time_limit
        )
    except asyncio.TimeoutError:
        done = len(results)
        raise TimeoutError(f"{what}: only {done:,} of {count:,} within {time_limit:g} s") from None
    return results


async def pace(
    seconds: float,
    rate: float,
    send: Callable[[int, int], Awaitable[None]],
    *,
    enough: Callable[[], bool] = lambda: False,
) -> int:
    """Call ``send(number, sent_ns)`` ``rate`` times a second, for a time or until ``enough``.

    Return how many were sent.

    The time of a message is when it was passed to the layer. If an earlier send delayed it, its
    time is its due time, so that the latency shows a layer that stalls.
    """
    start = time.monotonic_ns()
    count = max(int(seconds * rate), 1)
    for number in range(count):
        due = start + int(number * 1e9 / rate)
        wait = due - time.monotonic_ns()
        if wait > 0:
            await asyncio.sleep(wait / 1e9)
            due = time.monotonic_ns()
        if enough():
            return number
        await send(number, due)
    return count


async def read_all(
    stage: Stage,
    channels: Sequence[str],
    *,
    ages: bool = False,
    log: bool = False,
    announce: Any = None,
) -> None:
    """Read each channel in its own loop until the runner stops it; report what arrived."""
    receipt = Receipt(streams=[{} for _ in channels])
    readers = [
        asyncio.ensure_future(_read(stage, channel, streams, receipt, ages=ages, log=log))
        for channel, streams in zip(channels, receipt.streams, strict=True)
    ]
    await report_at_end(stage, receipt, readers, announce)


async def report_at_end(
    stage: Stage, receipt: Receipt, readers: Sequence[asyncio.Future[None]], announce: Any = None
) -> None:
    """Announce that the readers wait, run them until the runner stops them, and report."""
    stopped = asyncio.ensure_future(until_stopped(stage.board))
    await asyncio.sleep(0)
    stage.announce(announce)
    try:
        done, _ = await asyncio.wait([stopped, *readers], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        stage.report(receipt)
    finally:
        await cancel([stopped, *readers])


async def _read(
    stage: Stage,
    channel: str,
    streams: dict[int, Stream],
    receipt: Receipt,
    *,
    ages: bool,
    log: bool,
) -> None:
    board, index, receive = stage.board, stage.index, stage.layer.receive
    warm = False
    while True:
        incoming = await receive(channel)
        number = incoming["n"]
        if number < 0:
            if not warm:
                warm = True
                board.warm(index)
            continue
        now = time.monotonic_ns()
        sender = incoming["s"]
        if sender not in streams:
            streams[sender] = Stream()
        first = streams[sender].see(number)
        if log:
            receipt.log.append((sender, number))
        if first:  # second copies count as copies, but neither in throughput nor in latency
            if ages and (sent_ns := incoming["t"]):
                receipt.ages.append(now - sent_ns)
            board.deliver(index, now)


async def until_stopped(board: Board) -> None:
    while not board.stopped:  # noqa: ASYNC110  no event reaches across processes
        await asyncio.sleep(_STOP_CHECK)


async def cancel(tasks: Iterable[asyncio.Future[Any]], *, timeout: float = 5.0) -> None:
    """Cancel tasks and wait a little. Errors of the layer are not measured here."""
    pending = list(tasks)
    for task in pending:
        task.cancel()
    done, _ = await asyncio.wait(pending, timeout=timeout)
    for task in done:
        if not task.cancelled():
            task.exception()


def tally_receipts(run: Run, sent: Callable[[int, int], Mapping[int, int]]) -> Tally:
    """Return the tally of all channels. ``sent(process, channel)`` has each sender's count."""
    total = run.sent.tally
    for process, receipt in enumerate(run.receipts):
        for channel, streams in enumerate(receipt.streams):
            total += tally_channel(streams, sent(process, channel))
    return total
