"""One process of a measurement: builds its own layer, plays its role, reports through a pipe."""

from __future__ import annotations

import asyncio
import cProfile
import inspect
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, cast

from benchmarks.board import Board
from benchmarks.layers import KINDS, LayerSpec, configure_django
from benchmarks.scenarios import EVERY
from benchmarks.scenarios.base import Sent, Sizes, Stage

#: What a process says: ("ready", announced), ("report", Receipt or Sent) or ("error", text).
Word = tuple[Literal["ready", "report", "error"], Any]

_CLOSE_LIMIT = 5.0


@dataclass(frozen=True)
class Part:
    """Which role to play in which scenario on which layer. ``profile`` is a folder for cProfile's files."""

    role: Literal["send", "receive"]
    index: int
    scenario: str
    spec: LayerSpec
    sizes: Sizes
    profile: str | None = None

    @property
    def label(self) -> str:
        return f"{self.scenario}-{self.spec.name}-{self.role}-{self.index}"


def play(part: Part, board: Board, pipe: Connection) -> None:
    """The entry point of a spawned process. The sender first waits for what the receivers announced."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the runner ends its processes itself
    logging.basicConfig(level=logging.WARNING, format=f"{part.label}: %(levelname)s %(name)s %(message)s")
    profiler = cProfile.Profile() if part.profile else None
    try:
        stage = Stage(
            spec=part.spec,
            layer=_create(part.spec),
            sizes=part.sizes,
            board=board,
            index=part.index,
            peers=pipe.recv() if part.role == "send" else (),
            announce=lambda value: pipe.send(("ready", value)),
            report=lambda receipt: pipe.send(("report", receipt)),
        )
        if profiler:
            profiler.enable()
        if part.role == "receive":
            _receive(stage, part)
        else:
            _send(stage, part, pipe)
    except BaseException as error:
        detail = "".join(traceback.format_exception(error))
        print(f"{part.label}: {detail}", file=sys.stderr)
        with suppress(OSError):
            pipe.send(("error", f"{part.role}: {type(error).__name__}: {error}"))
    finally:
        if profiler and part.profile:
            profiler.disable()
            profiler.dump_stats(Path(part.profile, f"{part.label}.prof"))


def _create(spec: LayerSpec) -> Any:
    kind = KINDS[spec.name]
    configure_django(spec.address if kind.server == "postgres" else None)
    return kind.create(spec.address)


def _receive(stage: Stage, part: Part) -> None:
    receive = EVERY[part.scenario].receive
    if receive is None:
        raise ValueError(f"{part.scenario} has no receivers")
    asyncio.run(_then_close(stage, receive(stage)))


def _send(stage: Stage, part: Part, pipe: Connection) -> None:
    send = EVERY[part.scenario].send
    if inspect.iscoroutinefunction(send):
        asyncio.run(_then_close(stage, _send_async(stage, send, pipe)))
    else:
        pipe.send(("report", _in_thread(cast("Callable[[Stage], Sent]", send), stage)))


async def _send_async(stage: Stage, send: Callable[[Stage], Awaitable[Sent]], pipe: Connection) -> None:
    pipe.send(("report", await send(stage)))


async def _then_close(stage: Stage, role: Awaitable[None]) -> None:
    try:
        await role
    finally:
        with suppress(Exception):
            await asyncio.wait_for(KINDS[stage.spec.name].close(stage.layer), _CLOSE_LIMIT)


def _in_thread(send: Callable[[Stage], Sent], stage: Stage) -> Sent:
    result: list[Sent] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            result.append(send(stage))
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]
