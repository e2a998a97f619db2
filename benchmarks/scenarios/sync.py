"""Consecutive group sends from a plain thread, like those of a WSGI view or a Celery task.

They use `async_to_sync`, which works with every layer, and the layer's own synchronous API.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from asgiref.sync import async_to_sync

from benchmarks.scenarios import bare
from benchmarks.scenarios.base import (
    Roles,
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


GroupSend = Callable[[str, dict[str, Any]], None]


def _bridged(stage: Stage) -> GroupSend:
    def group_send(group: str, message: dict[str, Any]) -> None:
        async_to_sync(stage.layer.group_send)(group, message)

    return group_send


def _native(stage: Stage) -> GroupSend:
    # Not getattr: the Redis pub/sub layer resolves unknown attributes on the running loop.
    sync = vars(stage.layer).get("sync")
    return _bridged(stage) if sync is None else cast(GroupSend, sync.group_send)


def _warm_up(stage: Stage, group_send: GroupSend) -> None:
    end = time.monotonic() + _WARM_UP_LIMIT
    while stage.board.warmed(0) < 1:
        if time.monotonic() > end:
            raise TimeoutError("no message reached the receiver")
        group_send(GROUP, warm_up_message())
        time.sleep(0.05)


def _send(stage: Stage, group_send: GroupSend) -> Sent:
    _warm_up(stage, group_send)
    start = stage.board.start()
    end = start + int(stage.sizes.seconds * 1e9)
    number = 0
    while (now := time.monotonic_ns()) < end:
        group_send(GROUP, message(0, number, now))
        number += 1
    return Sent([number], figures={"calls/s": rate(number, start, time.monotonic_ns())})


def _send_bridged(stage: Stage) -> Sent:
    return _send(stage, _bridged(stage))


def _send_native(stage: Stage) -> Sent:
    return _send(stage, _native(stage))


def _send_bare(stage: Stage) -> Sent:
    with bare.sending_in_a_row(stage) as group_send:
        return _send(stage, group_send)


def _summarise(run: Run) -> Outcome:
    return Outcome(
        figures=run.sent.figures,
        tally=tally_receipts(run, lambda process, channel: run.sent.counts),
    )


_SIZES = Sizes(seconds=5)
SYNC = Scenario(
    name="sync",
    title="sync: async_to_sync(layer.group_send) in a row from a plain thread",
    figures=(Figure("calls/s", "calls/s", "higher"),),
    scales={
        "full": _SIZES,
        "quick": replace(_SIZES, seconds=1.5),
        "tiny": replace(_SIZES, seconds=0.3),
    },
    send=_send_bridged,
    receive=receive_untimed,
    expected=to_all_members,
    summarise=_summarise,
    bare=Roles(_send_bare, bare.receive_carried),
)
NATIVE_SYNC = replace(
    SYNC,
    name="native-sync",
    title="native-sync: layer.sync.group_send in a row from a plain thread"
    " (other layers: async_to_sync)",
    send=_send_native,
)
