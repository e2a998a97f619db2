"""A run: start the processes, inject faults, stop the senders, drain, account."""

from __future__ import annotations

import asyncio
import random
import shutil
import signal
import time
from collections.abc import Callable, Collection, Coroutine
from pathlib import Path
from typing import Any

from soak.book import Book, Counter, now, read_books
from soak.cluster import Cluster, Network
from soak.crew import Crew
from soak.faults import Faults
from soak.ledger import UNEXPLAINED, Ledger, settle
from soak.roles import Role

CREW: tuple[Role, ...] = (
    *("receiver", "receiver", "receiver"),
    *("worker", "worker", "worker"),
    "single",
    *("sender", "sender", "threads"),
    *("clerk", "clerk"),
    "sweeper",
)
PROGRESS = 10.0  # seconds between two progress lines
CALM = 2.0  # seconds without a message after which a second copy would have arrived
DRAIN_MOST = 45.0  # seconds without a message


def soak(
    seconds: float,
    seed: int,
    say: Callable[[str], None],
    keep: Path | None = None,
    only: Collection[str] = (),
) -> Ledger:
    """Inject faults for so many seconds and return the ledger.

    ``say`` gets the progress lines. ``keep`` is a folder to which the books are copied. ``only``
    has parts of names: only matching faults are injected. Raises ``KeyboardInterrupt`` on SIGTERM.
    """
    with Cluster() as cluster, Network(cluster) as network:
        folder = cluster.folder / "books"
        folder.mkdir()
        try:
            asyncio.run(_until_sigterm(_run(cluster, network, folder, seconds, seed, say, only)))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            if keep is not None:
                shutil.copytree(folder, keep, dirs_exist_ok=True)
                shutil.copy(cluster.server.log_path, keep)
        return settle(read_books(folder))


async def _until_sigterm(run: Coroutine[Any, Any, None]) -> None:
    """Cancel the run on SIGTERM. A handler that raised could do so in any task."""
    task = asyncio.ensure_future(run)
    loop, before = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)
    loop.add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        await task
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
        signal.signal(signal.SIGTERM, before)


async def _run(
    cluster: Cluster,
    network: Network,
    folder: Path,
    seconds: float,
    seed: int,
    say: Callable[[str], None],
    only: Collection[str],
) -> None:
    chance = random.Random(seed)
    book = Book(folder, "faults")
    crew = Crew(folder, (cluster.dsn_by(cluster.ports), network.dsn()), chance, book)
    faults = Faults(cluster, network, crew, chance, book, only)
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
            await harm  # raises its error
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
    """Wait until all messages that must arrive have arrived, and `CALM` seconds more."""
    progress_at = calm_since = now()
    counter.update()
    while now() - progress_at < DRAIN_MOST:
        await asyncio.sleep(0.2)
        if counter.update():
            progress_at = calm_since = now()
        elif now() - calm_since >= CALM:
            if not any(
                tally.lost[UNEXPLAINED] for tally in settle(read_books(folder)).tallies.values()
            ):
                return
            calm_since = now()


async def _report(
    counter: Counter, faults: Faults, start: float, say: Callable[[str], None]
) -> None:
    while True:
        await asyncio.sleep(PROGRESS)
        counter.update()
        say(
            f"{time.monotonic() - start:5.0f} s   {counter.sent} sent   {counter.received} received"
            f"   {faults.count} faults"
        )
