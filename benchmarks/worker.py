"""One process of a measurement: creates its layer, plays its role, reports through a pipe."""

from __future__ import annotations

import asyncio
import cProfile
import inspect
import logging
import os
import sys
import threading
import traceback
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, cast

from benchmarks.board import Board
from benchmarks.layers import KINDS, LayerSpec, configure_django
from benchmarks.scenarios import EVERY
from benchmarks.scenarios.base import Receipt, Receive, Roles, Sent, Sizes, Stage

# Messages to the runner: ("ready", announced), ("report", Receipt or Sent) or ("error", text).

_CLOSE_LIMIT = 5.0
#: The number of messages of a logger that are shown.
_RECORDS = 3


class FirstFew(logging.Filter):
    """A filter that bounds a layer's log, which would slow it down and hide other output."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        self._seen[record.name] += 1
        return self._seen[record.name] <= _RECORDS


@dataclass(frozen=True)
class Part:
    """The scenario, layer and role of a process. ``profile`` is a folder for cProfile's files.

    "all": the sender and every receiver, as tasks of one event loop around one layer.
    """

    role: Literal["send", "receive", "all"]
    index: int
    scenario: str
    spec: LayerSpec
    sizes: Sizes
    profile: str | None = None

    @property
    def label(self) -> str:
        return f"{self.scenario}-{self.spec.name}-{self.role}-{self.index}"

    @property
    def roles(self) -> Roles:
        """Return the roles. Raises ValueError if the scenario has none for this layer."""
        roles = EVERY[self.scenario].roles(KINDS[self.spec.name])
        if roles is None:
            raise ValueError(f"{self.scenario} cannot be played with {self.spec.name}")
        return roles


def play(part: Part, board: Board, pipe: Connection) -> None:
    """Run a spawned process: its entry point. The sender waits for the receivers' announcements."""
    logging.basicConfig(
        level=logging.WARNING, format=f"{part.label}: %(levelname)s %(name)s %(message)s"
    )
    logging.getLogger().handlers[0].addFilter(FirstFew())
    profiler = cProfile.Profile() if part.profile else None
    try:
        layer = _create(part.spec)
        peers = pipe.recv() if part.role == "send" else ()
        threading.Thread(target=end_with, args=(pipe,), daemon=True).start()
        stage = Stage(
            spec=part.spec,
            layer=layer,
            sizes=part.sizes,
            board=board,
            index=part.index,
            peers=peers,
            announce=lambda value: pipe.send(("ready", value)),
            report=lambda receipt: pipe.send(("report", receipt)),
        )
        if profiler:
            profiler.enable()
        if part.role == "receive":
            _receive(stage, part)
        elif part.role == "all":
            asyncio.run(_then_close(stage, play_all(stage, part.roles, pipe)))
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


def end_with(pipe: Connection) -> None:
    """End this process when the other end of the pipe is closed, because the runner has ended."""
    with suppress(OSError, EOFError):
        pipe.recv_bytes()  # the runner sends nothing more
    os._exit(1)


def _create(spec: LayerSpec) -> Any:
    kind = KINDS[spec.name]
    configure_django(spec.address if kind.app else None, kind.app)
    return kind.create(spec.address)


def _receive(stage: Stage, part: Part) -> None:
    receive = part.roles.receive
    if receive is None:
        raise ValueError(f"{part.scenario} has no receivers")
    asyncio.run(_then_close(stage, receive(stage)))


def _send(stage: Stage, part: Part, pipe: Connection) -> None:
    send = part.roles.send
    if inspect.iscoroutinefunction(send):
        asyncio.run(_then_close(stage, _send_async(stage, send, pipe)))
    else:
        pipe.send(("report", _in_thread(cast("Callable[[Stage], Sent]", send), stage)))


async def _send_async(
    stage: Stage, send: Callable[[Stage], Awaitable[Sent]], pipe: Connection
) -> None:
    pipe.send(("report", await send(stage)))


async def play_all(stage: Stage, roles: Roles, pipe: Connection) -> None:
    """Report in place of the sender and then, in order, of the receivers."""
    loop = asyncio.get_running_loop()
    send = cast("Callable[[Stage], Awaitable[Sent]]", roles.send)
    announced: list[asyncio.Future[Any]] = []
    receipts: list[asyncio.Future[Receipt]] = []
    readers: list[asyncio.Future[None]] = []
    for index in range(stage.sizes.processes if roles.receive else 0):
        announced.append(loop.create_future())
        receipts.append(loop.create_future())
        own = replace(
            stage, index=index, announce=announced[-1].set_result, report=receipts[-1].set_result
        )
        readers.append(asyncio.ensure_future(cast("Receive", roles.receive)(own)))

    async def sender() -> None:
        pipe.send(("report", await send(replace(stage, peers=await asyncio.gather(*announced)))))
        for receipt in receipts:
            pipe.send(("report", await receipt))

    await asyncio.gather(sender(), *readers)  # the first error ends all of them


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
