"""WebSockets end to end: clients of uvicorn servers with Channels consumers talk in rooms.

The servers are the receiving processes. All clients are in the sending process, whose clock
measures both ends.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import count

import psutil
from websockets.asyncio.client import ClientConnection, connect

from benchmarks.board import warm_up
from benchmarks.chat import ServedAt, serve
from benchmarks.ledger import Ledger, Said
from benchmarks.resources import Processes, raise_file_limit, server_of
from benchmarks.scenarios.base import Run, Scenario, Sent, Sizes, Stage, cancel, pace
from benchmarks.scenarios.point import AGES
from benchmarks.statistics import Figure, Outcome, fell_behind, percentile, rate

#: At most so many clients connect at once.
_AT_ONCE = 20
_CONNECT_LIMIT = 20.0
_CLOSE_LIMIT = 5.0
#: Seconds after which a message counts as lost and its room continues.
_TIMEOUT = 2.0
#: Seconds after the last send for which the clients keep listening to late messages.
_DRAIN_LIMIT = 15.0
#: Seconds after the last expected message in which a second copy may arrive.
_SETTLE = 0.3
#: Number of consecutive messages of one client without a pause. They could overtake each other.
_IN_A_ROW = 10


async def _send(stage: Stage) -> Sent:
    raise_file_limit()
    sizes = stage.sizes
    ledger = Ledger(stage.board, sizes.processes * sizes.members, sizes.room)
    async with _connected(stage, ledger) as sockets:
        measuring = asyncio.ensure_future(_measure(stage, ledger, sockets))
        listening = [
            asyncio.ensure_future(_listen(ledger, client, socket))
            for client, socket in enumerate(sockets)
        ]
        try:
            done, _ = await asyncio.wait(
                [measuring, *listening], return_when=asyncio.FIRST_COMPLETED
            )
            for task in done - {measuring}:  # a listener ends only by a failure
                task.result()
            return measuring.result()
        finally:
            await cancel([measuring, *listening])


@asynccontextmanager
async def _connected(stage: Stage, ledger: Ledger) -> AsyncIterator[Sequence[ClientConnection]]:
    """Connect a socket for each client to its server and its room."""
    gate = asyncio.Semaphore(_AT_ONCE)

    async def join(client: int) -> ClientConnection:
        served: ServedAt = stage.peers[ledger.server_of(client)]
        async with gate:
            return await connect(
                f"ws://127.0.0.1:{served.port}/{ledger.room_of(client)}",
                compression=None,
                max_queue=None,
                ping_interval=None,
                open_timeout=_CONNECT_LIMIT,
                close_timeout=_CLOSE_LIMIT,
                proxy=None,
            )

    clients = range(stage.sizes.processes * stage.sizes.members)
    sockets = await asyncio.wait_for(asyncio.gather(*map(join, clients)), _CONNECT_LIMIT)
    try:
        yield sockets
    finally:
        await asyncio.gather(*(socket.close() for socket in sockets), return_exceptions=True)


async def _listen(ledger: Ledger, client: int, socket: ClientConnection) -> None:
    async for text in socket:
        ledger.hear(client, str(text), time.monotonic_ns())
    raise ConnectionError("a server closed the connection of a client")


async def _measure(stage: Stage, ledger: Ledger, sockets: Sequence[ClientConnection]) -> Sent:
    async def greet() -> None:
        for sender, text in ledger.greet():
            await sockets[sender].send(text)

    await warm_up(stage.board, [stage.sizes.members] * stage.sizes.processes, greet)
    while not ledger.calm():  # noqa: ASYNC110  surplus greetings must not count
        await asyncio.sleep(_SETTLE)
    servers = Processes([psutil.Process(served.pid) for served in stage.peers])
    database = server_of(stage.spec)
    stage.board.start()

    before = servers.cpu(), database.cpu()
    late = await _talk_paced(stage, ledger, sockets)
    after = servers.cpu(), database.cpu()
    await asyncio.sleep(_SETTLE)
    ages = [age / 1e6 for age in ledger.ages]
    costs = [_per_thousand(now - then, len(ages)) for then, now in zip(before, after, strict=True)]

    ledger.begin()
    start = time.monotonic_ns()
    late += await _talk_flat_out(stage, ledger, sockets)
    await asyncio.sleep(_SETTLE)
    figures = {
        "p50": percentile(ages, 50),
        "p99": percentile(ages, 99),
        "msg/s": rate(ledger.deliveries, start, ledger.latest_ns),
        "server cpu": costs[0],
        "database cpu": costs[1],
        "server memory": servers.memory() / 1e6,
        "database memory": database.memory() / 1e6,
    }
    notes: dict[str, float] = {"written off": late, "fell behind": int(fell_behind(ages))}
    return Sent(figures=figures, tally=ledger.tally(), notes=notes)


async def _talk_paced(stage: Stage, ledger: Ledger, sockets: Sequence[ClientConnection]) -> int:
    """Let rooms and their clients take turns; return how many messages did not return in time."""
    said: list[Said] = []

    async def send(number: int, sent_ns: int) -> None:
        turn, room = divmod(number, len(ledger.rooms))
        sender = ledger.rooms[room][turn % len(ledger.rooms[room])]
        said.append(ledger.say(sender, sent_ns))
        await sockets[sender].send(said[-1].text)

    await pace(stage.sizes.seconds, stage.sizes.rate, send)
    return await _drain(ledger, said)


async def _talk_flat_out(stage: Stage, ledger: Ledger, sockets: Sequence[ClientConnection]) -> int:
    """Send the next when all clients of the room have the last; return how many were late."""
    end = time.monotonic_ns() + int(stage.sizes.seconds * 1e9)
    late: list[Said] = []

    async def talk(senders: Iterator[int]) -> None:
        while (now := time.monotonic_ns()) < end:
            sender = next(senders)
            said = ledger.say(sender, now)
            await sockets[sender].send(said.text)
            _, missing = await asyncio.wait([said.heard], timeout=_TIMEOUT)
            if missing:
                late.append(said)

    talks = []
    for room in ledger.rooms:
        senders = in_turn(room)
        talks += [talk(senders) for _ in range(stage.sizes.window)]
    await asyncio.gather(*talks)
    await _drain(ledger, late)
    return len(late)


async def _drain(ledger: Ledger, said: Sequence[Said]) -> int:
    """Wait until all are received or none arrives any more; return how many are missing."""
    missing = {each.heard for each in said}
    end = time.monotonic() + _DRAIN_LIMIT
    while missing and time.monotonic() < end:
        seen = ledger.deliveries
        _, missing = await asyncio.wait(missing, timeout=_TIMEOUT)
        if ledger.deliveries == seen:
            break
    return len(missing)


def in_turn(room: Sequence[int]) -> Iterator[int]:
    return (room[number // _IN_A_ROW % len(room)] for number in count())


def _per_thousand(seconds: float, deliveries: int) -> float:
    """Return CPU milliseconds for a thousand deliveries."""
    return seconds * 1e6 / deliveries if deliveries else math.nan


def _none(sent: Sent, sizes: Sizes) -> int:
    return 0


def _summarise(run: Run) -> Outcome:
    return Outcome(figures=run.sent.figures, tally=run.sent.tally, notes=run.sent.notes)


_ROOMS = Sizes(seconds=5, processes=2, members=250, rate=50, window=2, room=10)
WEBSOCKETS = Scenario(
    name="websockets",
    title="websockets: 500 clients of 2 uvicorn servers in 50 rooms",
    figures=(
        *AGES,
        Figure("msg/s", "msg/s", "higher"),
        Figure("server cpu", "ms/1000", "lower"),
        Figure("database cpu", "ms/1000", "lower"),
        Figure("server memory", "MB", "lower"),
        Figure("database memory", "MB", "lower"),
    ),
    scales={
        "full": _ROOMS,
        "quick": replace(_ROOMS, seconds=1.5),
        "tiny": replace(_ROOMS, seconds=0.5, members=10, rate=200),
    },
    send=_send,
    receive=serve,
    expected=_none,
    summarise=_summarise,
)

_ONE_ROOM = replace(_ROOMS, rate=2, window=4, room=500)
WEBSOCKETS_ROOM = replace(
    WEBSOCKETS,
    name="websockets-room",
    title="websockets-room: 500 clients of 2 uvicorn servers in one room",
    scales={
        "full": _ONE_ROOM,
        "quick": replace(_ONE_ROOM, seconds=1.5),
        "tiny": replace(_ONE_ROOM, seconds=0.5, members=10, rate=100, room=20),
    },
)
