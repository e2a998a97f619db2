"""Faults of servers, network and processes, injected in a random order.

Faults follow one another. Only stopped processes overlap with other faults.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

from devtools.postgres import StopMode
from soak.absences import LEASE
from soak.book import Book, now
from soak.cluster import Cluster, Network
from soak.crew import Crew, Member
from soak.records import EVERY_PROCESS, Away, Crash, Fault, Promotion
from soak.roles import Role

T = TypeVar("T")
Way = Callable[["Faults", str], Awaitable[None]]

REST = (0.5, 3.0)  # seconds between two faults
DOWN = (0.0, 0.2, 1.0, 3.0)  # seconds for which the server is down
OUTAGE = (LEASE + 1, LEASE + 6)  # the same for an outage that is longer than a lease
SWALLOW = (0.3, 8.0)  # seconds without forwarding: shorter and longer than send_timeout
LAG = (0.0, 15.0)  # seconds by which a standby lags when it is promoted
STOP = (0.2, 5.0)  # seconds for which a process is stopped
LONG_STOP = (LEASE + 2, LEASE + 8)
MEANWHILE = 0.3  # probability that a process is killed while the server is down
# Seconds until a process notices a closed connection, and one that is dead but not closed.
CLOSED, DEAD = 1.0, 10.0

KILLABLE: tuple[Role, ...] = ("receiver", "worker", "single", "sender", "threads", "clerk")
STOPPABLE: tuple[Role, ...] = (*KILLABLE, "sweeper")
STOPPED_LONG: tuple[Role, ...] = ("receiver", "worker", "single", "clerk")

_TERMINATE = """
    SELECT application_name, pg_terminate_backend(pid) FROM (
        SELECT application_name, pid FROM pg_stat_activity
        WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()
            AND application_name <> '' AND {}
    ) AS a
"""
_LISTENERS = "query ILIKE '%listen%'"  # their last statement


class Faults:
    """The injection of faults. Actions on the servers run in one thread, one at a time."""

    def __init__(
        self,
        cluster: Cluster,
        network: Network,
        crew: Crew,
        chance: random.Random,
        book: Book,
        only: Collection[str] = (),
    ) -> None:
        self._cluster = cluster
        self._network = network
        self._crew = crew
        self._chance = chance
        self._book = book
        self._only = only
        self._thread = ThreadPoolExecutor(1)
        self._deck: list[str] = []
        self._stops: set[asyncio.Task[None]] = set()
        self._is_over = asyncio.Event()
        self.count = 0

    async def run(self) -> None:
        """Inject all kinds equally often until cancelled. The last fault is completed."""
        try:
            while True:
                await asyncio.sleep(self._chance.uniform(*REST))
                if not self._deck:
                    self._deck = self._shuffled()
                kind = self._deck.pop()
                task = asyncio.ensure_future(KINDS[kind](self, kind))
                try:
                    await asyncio.shield(task)
                except asyncio.CancelledError:
                    await task
                    raise
                self.count += 1
        finally:
            self._is_over.set()
            await asyncio.gather(*self._stops)

    def close(self) -> None:
        """Wait until no action on the servers is in progress."""
        self._thread.shutdown()

    def _shuffled(self) -> list[str]:
        deck = [
            kind for kind in KINDS if not self._only or any(text in kind for text in self._only)
        ]
        self._chance.shuffle(deck)
        return deck

    async def _on_server(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    # ------------------------------------------------------------------ server

    async def _terminate(self, kind: str, which: str, most: int | None = None) -> None:
        limit = "" if most is None else f" ORDER BY random() LIMIT {most}"
        began = now()
        hit = await self._on_server(self._cluster.query, _TERMINATE.format(which + limit))
        known = {member.part.name for member in self._crew.members}
        self._away(began, CLOSED, {str(name) for name, _ in hit} & known)
        self._over(kind, began)

    async def _terminate_one(self, kind: str) -> None:
        if members := self._crew.of(*KILLABLE):
            name = self._chance.choice(members).part.name
            await self._terminate(kind, f"application_name = '{name}'")

    async def _outage(self, kind: str) -> None:
        mode: StopMode = self._chance.choice(("fast", "immediate"))
        await self._stop_server(kind, mode, self._chance.uniform(*OUTAGE))

    async def _stop_server(self, kind: str, mode: StopMode, seconds: float | None = None) -> None:
        if seconds is None:
            seconds = self._chance.choice(DOWN)
        began = now()
        await self._on_server(self._cluster.stop, mode)
        stopped = now()
        if mode == "immediate":
            self._book.write(Crash(began, stopped))
        waits: list[Awaitable[None]] = [asyncio.sleep(seconds)]
        if self._chance.random() < MEANWHILE:
            waits.append(self._kill_any())
        await asyncio.gather(*waits)
        await self._on_server(self._cluster.start)
        self._away(began, CLOSED)
        self._over(kind, began)

    async def _fail_over(self, kind: str) -> None:
        """Promote a standby whose replication stopped some seconds before the crash."""
        await self._on_server(self._cluster.add_standby)
        at = now()
        await self._on_server(self._cluster.catch_up)
        await self._on_server(self._cluster.cut_off)
        cut = now()
        await asyncio.sleep(self._chance.uniform(*LAG))
        began = now()
        await self._on_server(self._cluster.stop, "immediate")
        crashed = now()
        await asyncio.sleep(self._chance.choice(DOWN))
        await self._on_server(self._cluster.promote)
        self._book.write(Promotion(at, cut, crashed, now()))
        self._away(began, CLOSED)
        self._over(kind, began)
        await self._on_server(self._cluster.remove_old)

    # ------------------------------------------------------------------ network

    async def _cut(self, kind: str) -> None:
        began = now()
        await asyncio.to_thread(self._network.cut)
        self._away(began, CLOSED, self._crew.behind_network())
        self._over(kind, began)

    async def _swallow(self, kind: str, *, revive: bool) -> None:
        began = now()
        behind = self._crew.behind_network()
        await asyncio.to_thread(self._network.swallow)
        try:
            await asyncio.sleep(self._chance.uniform(*SWALLOW))
        finally:
            await asyncio.to_thread(lambda: self._network.let_go(revive=revive))
        self._away(began, 2 * CLOSED if revive else DEAD, behind)
        self._over(kind, began)

    # ------------------------------------------------------------------ processes

    async def _kill(self, kind: str, role: Role) -> None:
        await self._replace(kind, role, self._crew.kill)

    async def _dismiss(self, kind: str, role: Role) -> None:
        await self._replace(kind, role, self._crew.dismiss)

    async def _die(self, kind: str) -> None:
        await self._replace(kind, "clerk", self._crew.die)

    async def _replace(
        self, kind: str, role: Role, end: Callable[[Member], Awaitable[None]]
    ) -> None:
        if members := self._crew.of(role):
            began = now()
            await end(self._chance.choice(members))
            await self._crew.start(role)
            self._over(kind, began)

    async def _kill_any(self) -> None:
        role = self._chance.choice(KILLABLE)
        await self._kill(f"{role} kill -9", role)

    async def _turn_sweeper(self, kind: str) -> None:
        began = now()
        if sweepers := self._crew.of("sweeper"):
            await self._crew.dismiss(sweepers[0])
        elif not any(member.part.role == "sweeper" for member in self._crew.members):
            await self._crew.start("sweeper")
        self._over(kind, began)

    async def _stop(self, kind: str, role: Role, span: tuple[float, float]) -> None:
        """Stop a process. Other faults continue meanwhile."""
        seconds = self._chance.uniform(*span)

        async def stop(member: Member) -> None:
            began = now()
            await self._crew.stop(member, self._is_over, seconds)
            self._book.write(Fault(began, kind, now(), is_aside=True))

        if members := self._crew.of(role):
            task = asyncio.ensure_future(stop(self._chance.choice(members)))
            self._stops.add(task)
            task.add_done_callback(self._stops.discard)

    # ------------------------------------------------------------------ records

    def _away(self, began: float, notice: float, processes: Iterable[str] | None = None) -> None:
        """Record that these processes, or all, may have lost their connections."""
        ended = now() + notice
        if processes is None:
            self._book.write(Away(began, ended, EVERY_PROCESS, False))
        else:
            for process in processes:
                self._book.write(Away(began, ended, process, True))

    def _over(self, kind: str, began: float) -> None:
        self._book.write(Fault(began, kind, now()))


def _kinds() -> dict[str, Way]:
    kinds: dict[str, Way] = {
        "listener killed": partial(Faults._terminate, which=_LISTENERS, most=1),
        "all listeners killed": partial(Faults._terminate, which=_LISTENERS),
        "one process's backends killed": Faults._terminate_one,
        "all backends killed": partial(Faults._terminate, which="true"),
        "server restarted": partial(Faults._stop_server, mode="fast"),
        "server crashed": partial(Faults._stop_server, mode="immediate"),
        "server away for a lease": Faults._outage,
        "standby promoted": Faults._fail_over,
        "connections cut": Faults._cut,
        "network swallows": partial(Faults._swallow, revive=True),
        "network swallows for good": partial(Faults._swallow, revive=False),
        "sweeper ended or begun": Faults._turn_sweeper,
        "clerk dies before announcing": Faults._die,
    }
    for role in KILLABLE:
        kinds[f"{role} kill -9"] = partial(Faults._kill, role=role)
        kinds[f"{role} SIGTERM"] = partial(Faults._dismiss, role=role)
    for role in STOPPABLE:
        kinds[f"{role} stopped"] = partial(Faults._stop, role=role, span=STOP)
    for role in STOPPED_LONG:
        kinds[f"{role} stopped for a lease"] = partial(Faults._stop, role=role, span=LONG_STOP)
    return kinds


KINDS = _kinds()
