"""async_to_sync(layer.group_send) in a row from a plain thread, as a WSGI view or a Celery task calls it."""

from __future__ import annotations

import time
from dataclasses import replace

from asgiref.sync import async_to_sync

from benchmarks.scenarios.base import (
    Run,
    Scenario,
    Sent,
    Sizes,
    Stage,
    message,
    tally_receipts,
    warm_up_message,
)
from benchmarks.scenarios.groups import GROUP, receive_untimed, to_all_members
from benchmarks.statistics import Figure, Outcome, rate

_WARM_UP_LIMIT = 20.0


def _warm_up(stage: Stage) -> None:
    end = time.monotonic() + _WARM_UP_LIMIT
    while stage.board.warmed(0) < 1:
        if time.monotonic() > end:
            raise TimeoutError("no message reached the receiver")
        async_to_sync(stage.layer.group_send)(GROUP, warm_up_message())
        time.sleep(0.05)


def _send(stage: Stage) -> Sent:
    _warm_up(stage)
    start = stage.board.start()
    end = start + int(stage.sizes.seconds * 1e9)
    number = 0
    while (now := time.monotonic_ns()) < end:
        async_to_sync(stage.layer.group_send)(GROUP, message(0, number, now))
        number += 1
    return Sent([number], figures={"calls/s": rate(number, start, time.monotonic_ns())})


def _summarise(run: Run) -> Outcome:
    return Outcome(
        figures=run.sent.figures, tally=tally_receipts(run, lambda process, channel: run.sent.counts)
    )


_SIZES = Sizes(seconds=5)
SYNC = Scenario(
    name="sync",
    title="sync: async_to_sync(layer.group_send) in a row from a plain thread",
    figures=(Figure("calls/s", "calls/s", "higher"),),
    scales={"full": _SIZES, "quick": replace(_SIZES, seconds=2), "tiny": replace(_SIZES, seconds=0.3)},
    send=_send,
    receive=receive_untimed,
    expected=to_all_members,
    summarise=_summarise,
)
