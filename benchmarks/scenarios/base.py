"""What a scenario is made of: sizes, the roles that its processes play, the reading loop they share."""

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
    """How much of everything; a scenario uses what it needs.

    ``seconds``: how long the sender sends; ``processes``: receiving ones; ``members``: channels in each of
    them; ``tasks``: concurrent ones in the sender; ``rate``: paced sends a second; ``window``: messages in
    flight at most; ``room``: members of one group, of all processes together; ``group_rate``: paced sends to
    a group a second; ``clients``: of the application's, all pgbench's; ``pgbench_scale``: of the
    application's tables, 0 if the scenario does without the application; ``spread``: so many channels over
    all processes, in place of ``members`` in each; ``payload``: characters in a message; ``groups``: how
    many; ``waiting``: messages that wait elsewhere; ``settle``: seconds of quiet before a look at what
    happens at rest.
    """

    seconds: float
    processes: int = 1
    members: int = 1
    tasks: int = 1
    rate: float = 0
    window: int = 0
    room: int = 0
    group_rate: float = 0
    clients: int = 0
    pgbench_scale: int = 0
    spread: int = 0
    payload: int = len(PAYLOAD)
    groups: int = 0
    waiting: int = 0
    settle: float = 0

    def channels(self, process: int) -> int:
        """How many channels this receiving process reads."""
        if not self.spread:
            return self.members
        return self.spread // self.processes + (process < self.spread % self.processes)


@dataclass
class Sent:
    """What the sending process reports: messages by sender, and what only it can know."""

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
    """What one receiving process reports: the streams of each channel.

    Where the scenario asks for them: each message's age in nanoseconds, and every (sender, number) in order.
    """

    streams: list[dict[int, Stream]]
    ages: array[int] = field(default_factory=lambda: array("q"))
    log: list[tuple[int, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """Everything that one measurement yielded."""

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
        """The sender's notes, and whether a receiver could not keep their pace; where there is one."""
        behind = any(fell_behind([age / 1e6 for age in receipt.ages]) for receipt in self.receipts)
        return {**self.sent.notes, "fell behind": int(behind)}


@dataclass
class Stage:
    """What a role is given. ``peers`` is what the receiving processes announced, in order."""

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
    """Who does what. A ``send`` that is a plain function runs in a thread without event loop."""

    send: Send
    receive: Receive | None


@dataclass(frozen=True)
class Curve:
    """Where a scenario lies on a curve: the curve's name, what grows along its axis, and how much of it."""

    name: str
    axis: str
    x: int


@dataclass(frozen=True)
class Scenario:
    """One comparison.

    ``expected`` says how many deliveries a run should see once the sender is done. ``bare``: the roles that
    do the same without a layer; ``in_one_loop``: sender and receivers may be tasks of one event loop.
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
        """The roles for this kind of layer; None if the scenario cannot be played with it."""
        if kind.played == "bare":
            return self.bare
        if kind.played == "in one loop" and not self.in_one_loop:
            return None
        return Roles(self.send, self.receive)


def message(sender: int, number: int, sent_ns: int, payload: str = PAYLOAD) -> dict[str, Any]:
    """The numbered message that every scenario sends. A negative number is a warm-up and is not counted.

    Of a message with the time 0 nobody asks the age.
    """
    return {"type": "bench.message", "s": sender, "n": number, "t": sent_ns, "p": payload}


def warm_up_message() -> dict[str, Any]:
    return message(0, -1, 0)


async def send_retrying(send: Callable[[], Awaitable[None]]) -> int:
    """Send, again after a short wait while the channel is full; returns how often it was."""
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
    """``do(0)``, ``do(1)`` … ``do(count - 1)``, so many at once; their results in no order.

    Raises TimeoutError, which says how many were done of ``what``.
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
    """Call ``send(number, sent_ns)`` ``rate`` times a second for so long, or until there has been ``enough``.

    Returns how many were sent.

    A message's time is when it was handed to the layer, but when it was due if an earlier send held it up, so
    that a layer which stalls shows it in its latency.
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
    """Read each channel in a loop of its own until the runner says stop, and report what came."""
    receipt = Receipt(streams=[{} for _ in channels])
    readers = [
        asyncio.ensure_future(_read(stage, channel, streams, receipt, ages=ages, log=log))
        for channel, streams in zip(channels, receipt.streams, strict=True)
    ]
    await report_at_end(stage, receipt, readers, announce)


async def report_at_end(
    stage: Stage, receipt: Receipt, readers: Sequence[asyncio.Future[None]], announce: Any = None
) -> None:
    """Announce that the readers wait, let them go on until the runner says stop, and report what came."""
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
        if first:  # second copies are counted as such, and neither as speed nor as latency
            if ages and (sent_ns := incoming["t"]):
                receipt.ages.append(now - sent_ns)
            board.deliver(index, now)


async def until_stopped(board: Board) -> None:
    while not board.stopped:  # noqa: ASYNC110  no event reaches across processes
        await asyncio.sleep(_STOP_CHECK)


async def cancel(tasks: Iterable[asyncio.Future[Any]], *, patience: float = 5.0) -> None:
    """Cancel and wait a little; how the layer takes it is not what is measured."""
    pending = list(tasks)
    for task in pending:
        task.cancel()
    done, _ = await asyncio.wait(pending, timeout=patience)
    for task in done:
        if not task.cancelled():
            task.exception()


def tally_receipts(run: Run, sent: Callable[[int, int], Mapping[int, int]]) -> Tally:
    """The balance over all channels; ``sent(process, channel)`` says how many each sender sent there."""
    total = run.sent.tally
    for process, receipt in enumerate(run.receipts):
        for channel, streams in enumerate(receipt.streams):
            total += tally_channel(streams, sent(process, channel))
    return total
