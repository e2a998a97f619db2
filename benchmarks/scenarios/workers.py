"""Two processes compete for the jobs of one normal channel, each with one receive() loop."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from functools import partial

from benchmarks.board import Window, warm_up
from benchmarks.scenarios import bare
from benchmarks.scenarios.base import (
    Run,
    Scenario,
    Sent,
    Sizes,
    Stage,
    message,
    read_all,
    send_retrying,
    warm_up_message,
)
from benchmarks.statistics import Figure, Outcome, rate, tally_competing

CHANNEL = "bench-jobs"
_WARM_UP_LIMIT = 5.0


async def _receive(stage: Stage) -> None:
    await read_all(stage, [CHANNEL], log=True)


async def _send(stage: Stage) -> Sent:
    layer, board, sizes = stage.layer, stage.board, stage.sizes

    async def warm() -> None:
        jobs = range(max(sizes.tasks, sizes.processes))
        await asyncio.gather(*(layer.send(CHANNEL, warm_up_message()) for _ in jobs))

    try:
        await warm_up(board, [1] * sizes.processes, warm, time_limit=_WARM_UP_LIMIT)
    except TimeoutError:
        if not any(board.warmed(process) for process in range(sizes.processes)):
            raise  # a layer may leave a worker without jobs
    sent = Sent([0] * sizes.tasks)
    full = 0
    end = board.start() + int(sizes.seconds * 1e9)

    async def sender(index: int, window: Window) -> None:
        nonlocal full
        number = 0
        while True:
            await window.take()
            if (now := time.monotonic_ns()) >= end:
                return
            job = message(index, number, now)
            full += await send_retrying(partial(layer.send, CHANNEL, job))
            number += 1
            sent.by_sender[index] = number

    async with Window(sizes.window, lambda: board.deliveries) as window:
        await asyncio.gather(*(sender(index, window) for index in range(sizes.tasks)))
        sent.notes["written off"] = window.written_off
    sent.notes["full"] = full
    return sent


def _once(sent: Sent, sizes: Sizes) -> int:
    return sent.total


def _summarise(run: Run) -> Outcome:
    tally = tally_competing([receipt.log for receipt in run.receipts], run.sent.counts)
    jobs = run.sent.total - tally.lost
    idle = sum(not receipt.log for receipt in run.receipts)
    return Outcome(
        figures={"msg/s": rate(jobs, run.start_ns, run.latest_ns)},
        # No layer promises an order among competing readers, so this is a note and no error.
        tally=replace(tally, disorder=0),
        notes={**run.sent.notes, "out of order": tally.disorder, "without work": idle},
    )


_SIZES = Sizes(seconds=5, processes=2, tasks=20, window=200)
WORKERS = Scenario(
    name="workers",
    title="workers: 2 processes compete for one normal channel (each message counted once)",
    figures=(Figure("msg/s", "msg/s", "higher"),),
    scales={
        "full": _SIZES,
        "quick": replace(_SIZES, seconds=1.5),
        "tiny": replace(_SIZES, seconds=0.3, tasks=3, window=20),
    },
    send=_send,
    receive=_receive,
    expected=_once,
    summarise=_summarise,
    bare=bare.WORKERS,
    in_one_loop=True,
)
