"""What is done to server, network and processes, one after the other in a random order."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from devtools.postgres import PostgresServer, StopMode
from soak.book import Book, now
from soak.crew import Crew, Member
from soak.ledger import Crash, Fault
from soak.roles import Role
from tests.faults.proxy import Proxy

T = TypeVar("T")

REST = (0.5, 3.0)  # seconds between two faults
DOWN = (0.0, 0.2, 1.0, 3.0)  # seconds for which the server is away
SWALLOW = (0.3, 8.0)  # seconds for which the network swallows: less and more than send_timeout
MEANWHILE = 0.3  # how likely somebody is killed while the server is away

_TERMINATE = """
    SELECT pg_terminate_backend(pid) FROM (
        SELECT pid FROM pg_stat_activity
        WHERE backend_type = 'client backend' AND pid <> pg_backend_pid() AND {}
    ) AS a
"""
_LISTENERS = "query LIKE '%pg_layer_%listen%'"  # the last thing they said


class Faults:
    """Does harm. What it does to the server runs in a thread, one thing at a time."""

    def __init__(
        self,
        server: PostgresServer,
        database: str,
        proxy: Proxy,
        crew: Crew,
        chance: random.Random,
        book: Book,
    ) -> None:
        self._server = server
        self._database = database
        self._proxy = proxy
        self._crew = crew
        self._chance = chance
        self._book = book
        self._thread = ThreadPoolExecutor(1)
        self._sweeper: Member | None = None
        self._deck: list[tuple[str, Callable[[str], Awaitable[None]]]] = []
        self.count = 0

    async def run(self) -> None:
        """One after the other, every kind as often as any, until cancelled: then the last is over."""
        while True:
            await asyncio.sleep(self._chance.uniform(*REST))
            if not self._deck:
                self._deck = self._shuffled()
            kind, fault = self._deck.pop()
            task = asyncio.ensure_future(fault(kind))
            try:
                await asyncio.shield(task)
            except asyncio.CancelledError:
                await task
                raise
            self.count += 1

    def close(self) -> None:
        """Returns when the server is left alone."""
        self._thread.shutdown()

    def _shuffled(self) -> list[tuple[str, Callable[[str], Awaitable[None]]]]:
        kinds: dict[str, Callable[[str], Awaitable[None]]] = {
            "listener killed": lambda kind: self._terminate(kind, _LISTENERS, 1),
            "all listeners killed": lambda kind: self._terminate(kind, _LISTENERS),
            "all backends killed": lambda kind: self._terminate(kind, "true"),
            "server restarted": lambda kind: self._stop_server(kind, "fast"),
            "server crashed": lambda kind: self._stop_server(kind, "immediate"),
            "connections cut": self._cut,
            "network swallows": lambda kind: self._swallow(kind, revive=True),
            "network swallows for good": lambda kind: self._swallow(kind, revive=False),
            "sweeper ended or begun": self._turn_sweeper,
        }
        roles: tuple[Role, ...] = ("receiver", "worker", "single", "sender", "threads")
        for role in roles:
            kinds[f"{role} kill -9"] = lambda kind, role=role: self._kill(kind, role)  # type: ignore[misc]
            kinds[f"{role} SIGTERM"] = lambda kind, role=role: self._dismiss(kind, role)  # type: ignore[misc]
        deck = list(kinds.items())
        self._chance.shuffle(deck)
        return deck

    async def _on_server(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work, *args)

    # ------------------------------------------------------------------ server

    async def _terminate(self, kind: str, whom: str, most: int | None = None) -> None:
        limit = "" if most is None else f" ORDER BY random() LIMIT {most}"
        began = now()
        await self._on_server(
            lambda: self._server.execute(_TERMINATE.format(whom + limit), dbname=self._database)
        )
        self._over(kind, began)

    async def _stop_server(self, kind: str, mode: StopMode) -> None:
        began = now()
        await self._on_server(self._server.stop, mode)
        stopped = now()
        meanwhile = self._kill_somebody() if self._chance.random() < MEANWHILE else _nothing()
        await asyncio.gather(asyncio.sleep(self._chance.choice(DOWN)), meanwhile)
        if mode == "immediate":
            self._book.write(Crash(began, stopped))
        await self._on_server(self._server.start)
        self._over(kind, began)

    # ------------------------------------------------------------------ network

    async def _cut(self, kind: str) -> None:
        began = now()
        await asyncio.to_thread(self._proxy.cut)
        self._over(kind, began)

    async def _swallow(self, kind: str, *, revive: bool) -> None:
        began = now()
        await asyncio.to_thread(self._proxy.swallow)
        try:
            await asyncio.sleep(self._chance.uniform(*SWALLOW))
        finally:
            await asyncio.to_thread(lambda: self._proxy.let_go(revive=revive))
        self._over(kind, began)

    # ------------------------------------------------------------------ processes

    async def _kill(self, kind: str, role: Role) -> None:
        if members := self._crew.of(role):
            began = now()
            await self._crew.kill(self._chance.choice(members))
            await self._crew.start(role)
            self._over(kind, began)

    async def _dismiss(self, kind: str, role: Role) -> None:
        if members := self._crew.of(role):
            began = now()
            await self._crew.dismiss(self._chance.choice(members))
            await self._crew.start(role)
            self._over(kind, began)

    async def _kill_somebody(self) -> None:
        role: Role = self._chance.choice(("receiver", "worker", "single", "sender", "threads"))
        await self._kill(f"{role} kill -9", role)

    async def _turn_sweeper(self, kind: str) -> None:
        began = now()
        if sweepers := self._crew.of("sweeper"):
            await self._crew.dismiss(sweepers[0])
        else:
            await self._crew.start("sweeper")
        self._over(kind, began)

    def _over(self, kind: str, began: float) -> None:
        self._book.write(Fault(began, kind, now()))


def _nothing() -> Coroutine[Any, Any, None]:
    return asyncio.sleep(0)
