"""The cost of group_send as members, processes and groups grow."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping
from dataclasses import replace

from benchmarks.board import Window, warm_up
from benchmarks.probe import probe
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
    pace,
    read_all,
    tally_receipts,
    warm_up_message,
)
from benchmarks.scenarios.groups import (
    GROUP,
    group_window,
    receive_timed,
    send_flat_out,
    to_all_members,
    warm_up_group,
)
from benchmarks.scenarios.point import one_each
from benchmarks.statistics import Figure, Outcome, median, percentile, rate

_CHANNELS = 100

# ------------------------------------------------------------------ members of one group


async def _send_one_by_one(stage: Stage) -> Sent:
    """Send at a pace, but only after all members have the last message: no queue is measured."""
    layer = stage.layer
    took: list[float] = []

    async def send(number: int, sent_ns: int) -> None:
        await window.take()
        begin = time.monotonic_ns()
        await layer.group_send(GROUP, message(0, number, begin))
        took.append((time.monotonic_ns() - begin) / 1e6)

    with probe(stage.spec) as server:
        await warm_up_group(stage)
        before = server.rows()
        stage.board.start()
        async with group_window(stage) as window:
            count = await pace(stage.sizes.seconds, stage.sizes.rate, send)
            await window.take()  # the last message has arrived, so no other process needs the cores
            figures = {
                "send": median(took),
                "rows": (server.rows() - before) / count,
                "in database": server.group_send_ms(GROUP),
            }
            return Sent([count], figures, {"written off": window.written_off})


def _summarise_one_by_one(run: Run) -> Outcome:
    return Outcome(
        figures={**run.sent.figures, "delivered p50": percentile(run.ages_ms, 50)},
        tally=tally_receipts(run, lambda process, channel: run.sent.counts),
        notes=run.sent.notes,
    )


def _members(count: int) -> Scenario:
    a_second = max(0.5, min(5.0, 20_000 / count))
    sizes = Sizes(seconds=max(3, 3 / a_second), processes=4, spread=count, rate=a_second, window=1)
    return Scenario(
        name=f"growth-members/{count}",
        title=f"growth: group_send to {count:,} members in 4 processes",
        figures=(
            Figure("send", "ms", "lower"),
            Figure("in database", "ms", "lower"),
            Figure("rows", "rows", "lower"),
            Figure("delivered p50", "ms", "lower"),
        ),
        scales=scales(sizes, quick=max(1, 2 / a_second)),
        send=_send_one_by_one,
        receive=receive_timed,
        expected=to_all_members,
        summarise=_summarise_one_by_one,
        curve=Curve("growth-members", "members of the group", count),
    )


# ------------------------------------------------------------------ receiving processes


async def _send_flat_out(stage: Stage) -> Sent:
    with probe(stage.spec) as server:
        sent = await send_flat_out(stage)
        sent.figures["held"] = server.connections()
    return sent


def _summarise_flat_out(run: Run) -> Outcome:
    return Outcome(
        figures={
            "deliveries/s": rate(run.deliveries, run.start_ns, run.latest_ns),
            "p50": percentile(run.ages_ms, 50),
            **run.sent.figures,
        },
        tally=tally_receipts(run, lambda process, channel: run.sent.counts),
        notes=run.sent.notes,
    )


def _processes(count: int) -> Scenario:
    return Scenario(
        name=f"growth-processes/{count}",
        title=f"growth: group_send to {count} processes x 10 members",
        figures=(
            Figure("deliveries/s", "deliveries/s", "higher"),
            Figure("p50", "ms", "lower"),
            Figure("held", "connections", "lower"),
        ),
        scales=scales(Sizes(seconds=3, processes=count, members=10, tasks=4, window=8)),
        send=_send_flat_out,
        receive=receive_timed,
        expected=to_all_members,
        summarise=_summarise_flat_out,
        curve=Curve("growth-processes", "receiving processes", count),
    )


# ------------------------------------------------------------------ groups


def _group(index: int) -> str:
    return f"bench.group.{index}"


async def _receive_groups(stage: Stage) -> None:
    """Join a few channels to all groups in turn, so that each group has one member."""
    layer, sizes = stage.layer, stage.sizes
    channels = [await layer.new_channel() for _ in range(sizes.members)]

    async def join(index: int) -> None:
        await layer.group_add(_group(index), channels[index % sizes.members])

    await do_many(join, sizes.groups, "groups joined")
    await read_all(stage, channels, ages=True)


async def _send_to_groups(stage: Stage) -> Sent:
    """Number each task's messages by channel: sender ``task * channels + channel``."""
    layer, board, sizes = stage.layer, stage.board, stage.sizes

    async def warm() -> None:
        groups = map(_group, range(sizes.members))
        await asyncio.gather(*(layer.group_send(group, warm_up_message()) for group in groups))

    await warm_up(board, [sizes.members], warm)
    sent = Sent([0] * (sizes.tasks * sizes.members))
    end = board.start() + int(sizes.seconds * 1e9)

    async def sender(task: int, window: Window) -> None:
        choose = random.Random(task).randrange
        while True:
            await window.take()
            if (now := time.monotonic_ns()) >= end:
                return
            index = choose(sizes.groups)
            number = task * sizes.members + index % sizes.members
            await layer.group_send(_group(index), message(number, sent.by_sender[number], now))
            sent.by_sender[number] += 1

    async with Window(sizes.window, lambda: board.deliveries) as window:
        await asyncio.gather(*(sender(task, window) for task in range(sizes.tasks)))
        sent.notes["written off"] = window.written_off
    return sent


def _summarise_groups(run: Run) -> Outcome:
    channels = run.sizes.members

    def sent(process: int, channel: int) -> Mapping[int, int]:
        return {
            sender: count
            for sender, count in run.sent.counts.items()
            if sender % channels == channel
        }

    return Outcome(
        figures={
            "msg/s": rate(run.deliveries, run.start_ns, run.latest_ns),
            "p50": percentile(run.ages_ms, 50),
        },
        tally=tally_receipts(run, sent),
        notes=run.sent.notes,
    )


def _groups(count: int) -> Scenario:
    channels = min(count, _CHANNELS)
    return Scenario(
        name=f"growth-groups/{count}",
        title=f"growth: group_send to random ones of {count:,} groups, by 20 tasks",
        figures=(Figure("msg/s", "msg/s", "higher"), Figure("p50", "ms", "lower")),
        scales=scales(Sizes(seconds=3, members=channels, groups=count, tasks=20, window=100)),
        send=_send_to_groups,
        receive=_receive_groups,
        expected=one_each,
        summarise=_summarise_groups,
        curve=Curve("growth-groups", "groups", count),
    )


def scales(full: Sizes, *, quick: float = 1) -> dict[Scale, Sizes]:
    """Return the sizes of a point, which is as large in each scale but sends for other times."""
    return {"full": full, "quick": replace(full, seconds=quick), "tiny": replace(full, seconds=0.3)}


MEMBERS = [_members(count) for count in (10, 100, 1_000, 10_000, 100_000)]
PROCESSES = [_processes(count) for count in (1, 2, 4, 8, 16, 32)]
GROUPS = [_groups(count) for count in (10, 100, 1_000, 10_000, 100_000)]
