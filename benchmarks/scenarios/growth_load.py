"""send to one process: with more tasks, larger messages, and more messages that wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

from benchmarks.board import Board
from benchmarks.scenarios import bare
from benchmarks.scenarios.base import (
    Curve,
    Run,
    Scale,
    Scenario,
    Sent,
    Sizes,
    Stage,
    do_many,
    message,
    send_retrying,
)
from benchmarks.scenarios.growth_fanout import scales
from benchmarks.scenarios.point import (
    AGES,
    THROUGHPUT,
    flood_channels,
    one_each,
    pace_channel,
    receive_timed,
    tally_own_channels,
    warm_up_channels,
)
from benchmarks.statistics import NOT_FILLED, Figure, Outcome, Tally, percentile, rate

_OF_SIZE = (
    Figure("msg/s", "msg/s", "higher"),
    Figure("MB/s", "MB/s", "higher"),
    Figure("p50", "ms", "lower"),
)
_OF_WAITING = (Figure("msg/s", "msg/s", "higher"), *AGES)
_TASKS = 10
_RATE = 25
#: Bytes in flight at most, so that a slow receiver does not fill the memory.
_BYTES_AHEAD = 32_000_000
#: At most so many messages wait in one channel: half of its capacity.
_WAIT_IN_A_CHANNEL = 5_000
#: Long enough for a million messages; short enough that the first has not expired at the end.
_FILL_LIMIT = 45.0
_LOOK_AT = 10
_LOOK_LIMIT = 5.0
_TIMEOUT = 2.0
_ARRIVAL_LIMIT = 20.0


async def _send(stage: Stage) -> Sent:
    """Send at full speed without ages, then at a pace on one more channel with ages."""
    board, tasks = stage.board, stage.sizes.tasks
    if stage.sizes.waiting:
        await _fill(stage)
    await warm_up_channels(stage)
    sent = Sent([0] * (tasks + 1))
    await flood_channels(stage, sent, timed=False)
    await _arrival(board, sent.total)
    speed = rate(board.deliveries, board.start_ns, board.latest_ns)
    sent.figures |= {"msg/s": speed, "MB/s": speed * stage.sizes.payload / 1e6}
    await pace_channel(stage, sent, tasks)
    if stage.sizes.waiting:
        sent.tally += await _look(stage)
    return sent


async def _arrival(board: Board, count: int) -> None:
    """Wait for so many deliveries, without those that are lost."""
    limit = time.monotonic() + _ARRIVAL_LIMIT
    seen, since = -1, time.monotonic()
    while (deliveries := board.deliveries) < count and (now := time.monotonic()) < limit:
        if deliveries > seen:
            seen, since = deliveries, now
        elif now - since > _TIMEOUT:
            return
        await asyncio.sleep(0.005)


def _full_channels(waiting: int) -> int:
    return -(-waiting // _WAIT_IN_A_CHANNEL)


def _waiting_channel(index: int) -> str:
    return f"bench.waiting.{index}"


async def _fill(stage: Stage) -> None:
    """Store the messages that wait, on channels without a reader, as fast as possible.

    Raises TimeoutError if that takes too long.
    """
    layer, waiting = cast(Any, stage.layer), stage.sizes.waiting
    if hasattr(layer, "send_many"):

        async def fill(index: int) -> None:
            first = index * _WAIT_IN_A_CHANNEL
            numbers = range(min(_WAIT_IN_A_CHANNEL, waiting - first))
            channel = _waiting_channel(index)
            taken = await layer.send_many([(channel, message(0, number, 0)) for number in numbers])
            if not all(taken):
                raise RuntimeError(f"{channel} is full already")

        await do_many(
            fill,
            _full_channels(waiting),
            f"{NOT_FILLED}: channels",
            at_once=2,
            time_limit=_FILL_LIMIT,
        )
        return

    async def put(index: int) -> None:
        channel = _waiting_channel(index // _WAIT_IN_A_CHANNEL)
        body = message(0, index % _WAIT_IN_A_CHANNEL, 0)
        await send_retrying(partial(layer.send, channel, body))

    await do_many(put, waiting, f"{NOT_FILLED}: messages", time_limit=_FILL_LIMIT)


async def _look(stage: Stage) -> Tally:
    """Verify that the messages still wait: receive a few from the last channel.

    Raises RuntimeError if there are none, because the measurement then had no waiting messages.
    """
    waiting = stage.sizes.waiting
    last = _full_channels(waiting) - 1
    channel = _waiting_channel(last)
    wanted = min(_LOOK_AT, waiting - last * _WAIT_IN_A_CHANNEL)
    found: list[int] = []

    async def take() -> None:
        while len(found) < wanted:
            found.append((await stage.layer.receive(channel))["n"])

    try:
        await asyncio.wait_for(take(), _LOOK_LIMIT)
    except asyncio.TimeoutError:
        if not found:
            raise RuntimeError("no message waited in a channel without a reader") from None
    return Tally(lost=wanted - len(found), twice=len(found) - len(set(found)))


def _summarise(figures: Sequence[Figure], run: Run) -> Outcome:
    ages = run.ages_ms
    known = {**run.sent.figures, "p50": percentile(ages, 50), "p99": percentile(ages, 99)}
    return Outcome(
        figures={figure.name: known[figure.name] for figure in figures},
        tally=tally_own_channels(run),
        notes=run.pace_notes,
    )


def _sizes(**more: int) -> dict[Scale, Sizes]:
    return scales(Sizes(seconds=2, members=_TASKS + 1, tasks=_TASKS, rate=_RATE, **more))


def _size(count: int, label: str) -> Scenario:
    return Scenario(
        name=f"growth-size/{count}",
        title=f"growth: send of {label} by {_TASKS} tasks; then {_RATE} a second",
        figures=_OF_SIZE,
        scales=_sizes(payload=count, window=max(_TASKS, min(1_000, _BYTES_AHEAD // count))),
        send=_send,
        receive=receive_timed,
        expected=one_each,
        summarise=partial(_summarise, _OF_SIZE),
        curve=Curve("growth-size", "bytes in a message", count),
    )


def _waiting(count: int) -> Scenario:
    return Scenario(
        name=f"growth-waiting/{count}",
        title=f"growth: send by {_TASKS} tasks, then {_RATE} a second,"
        f" while {count:,} wait elsewhere",
        figures=_OF_WAITING,
        scales=_sizes(waiting=count, window=1_000),
        send=_send,
        receive=receive_timed,
        expected=one_each,
        summarise=partial(_summarise, _OF_WAITING),
        curve=Curve("growth-waiting", "messages that wait elsewhere", count),
    )


def _tasks(count: int) -> Scenario:
    return replace(
        THROUGHPUT,
        name=f"growth-tasks/{count}",
        title=f"growth: send by {count} tasks of one process to {count} channels of another",
        scales=scales(Sizes(seconds=3, members=count, tasks=count)),
        bare=bare.SERIAL if count == 1 else bare.THROUGHPUT,
        curve=Curve("growth-tasks", "tasks that send at once", count),
    )


TASKS = [_tasks(count) for count in (1, 3, 10, 30, 100)]
SIZE = [
    _size(100, "100 B"),
    _size(1_000, "1 kB"),
    _size(10_000, "10 kB"),
    _size(100_000, "100 kB"),
    _size(1_000_000, "1 MB"),
]
WAITING = [_waiting(count) for count in (0, 1_000, 10_000, 100_000, 1_000_000)]
