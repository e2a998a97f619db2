"""The course of a run: all start, faults for a while, all are quiet, what is on its way arrives."""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import psycopg

from devtools.postgres import PostgresServer
from soak.book import Book, Counter, now, read_books
from soak.crew import Crew
from soak.faults import Faults
from soak.ledger import UNEXPLAINED, Ledger, settle
from soak.roles import Role
from tests.faults.proxy import Proxy

CREW: tuple[Role, ...] = (
    *("receiver", "receiver", "receiver"),
    *("worker", "worker", "worker"),
    "single",
    *("sender", "sender", "threads"),
    "sweeper",
)
MIGRATIONS = Path(__file__).parents[1] / "migrations"
PROGRESS = 10.0  # seconds between two lines
CALM = 2.0  # seconds in which nothing comes any more: a second copy would have
DRAIN_MOST = 45.0


def soak(seconds: float, seed: int, say: Callable[[str], None], keep: Path | None = None) -> Ledger:
    """Run for so long, and settle the ledger. ``keep``: a folder that gets the books."""
    # Whatever else happens: fsync as in production, and what a crash may lose is lost.
    with PostgresServer(fsync=True, max_connections=200) as server:
        dsn = server.create_database("soak")
        with psycopg.connect(dsn) as connection:
            for file in sorted(MIGRATIONS.glob("*.sql")):
                if not file.stem.endswith("_reverse"):
                    connection.execute(file.read_bytes())
        folder = server.folder / "books"  # which goes with it, in whatever way this process ends
        folder.mkdir()
        with Proxy(dsn) as proxy:
            try:
                asyncio.run(_run(server, dsn, proxy, folder, seconds, seed, say))
            finally:
                if keep is not None:
                    shutil.copytree(folder, keep, dirs_exist_ok=True)
                    shutil.copy(server.log_path, keep)
        return settle(read_books(folder))


async def _run(
    server: PostgresServer,
    dsn: str,
    proxy: Proxy,
    folder: Path,
    seconds: float,
    seed: int,
    say: Callable[[str], None],
) -> None:
    chance = random.Random(seed)
    book = Book(folder, "faults")
    crew = Crew(folder, (dsn, proxy.dsn()), chance, book)
    faults = Faults(server, "soak", proxy, crew, chance, book)
    counter = Counter(folder)
    tasks: list[asyncio.Task[None]] = []
    try:
        await asyncio.gather(*(crew.start(role) for role in CREW))
        start = time.monotonic()
        harm = asyncio.ensure_future(faults.run())
        report = asyncio.ensure_future(_report(counter, faults, start, say))
        tasks = [harm, report]
        await asyncio.wait({harm}, timeout=seconds)
        if harm.done():
            await harm  # it failed
        harm.cancel()
        await asyncio.wait({harm})
        if not harm.cancelled():
            await harm
        await crew.hush()
        await _drain(folder, counter)
        await crew.end()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        crew.close()
        faults.close()
        book.close()


async def _drain(folder: Path, counter: Counter) -> None:
    """Until everything that must come has come, and a little longer for what must not."""
    deadline = now() + DRAIN_MOST
    calm_since = now()
    counter.look()
    while now() < deadline:
        await asyncio.sleep(0.2)
        if counter.look():
            calm_since = now()
        elif now() - calm_since >= CALM:
            if not any(tally.lost[UNEXPLAINED] for tally in settle(read_books(folder)).tallies.values()):
                return
            calm_since = now()


async def _report(counter: Counter, faults: Faults, start: float, say: Callable[[str], None]) -> None:
    while True:
        await asyncio.sleep(PROGRESS)
        counter.look()
        say(
            f"{time.monotonic() - start:5.0f} s   {counter.sent} sent   {counter.received} received"
            f"   {faults.count} faults"
        )
