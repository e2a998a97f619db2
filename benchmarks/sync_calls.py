"""``python -m benchmarks.sync_calls``: the cost of sending from synchronous code.

It compares single sends with one `send_many`, and a transaction that saves a row with one that also
sends. All take turns within one run. No process receives.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Callable

from django.db import connection, transaction

from benchmarks.layers import CAPACITY, configure_django
from benchmarks.servers import postgres_server

MESSAGE = {"type": "x", "p": "x" * 60}
MANY = 1000


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _repeat(times: int, work: Callable[[], object]) -> None:
    for _ in range(times):
        work()


def _save(*, and_send: Callable[[], object] | None) -> None:
    with transaction.atomic(), connection.cursor() as cursor:
        cursor.execute("INSERT INTO note VALUES ('x')")
        if and_send is not None:
            and_send()


def measure(rounds: int, transactions: int) -> dict[str, list[float]]:
    """Return the seconds of each kind of work, by round."""
    from pg_layer import PostgresChannelLayer

    layer = PostgresChannelLayer(capacity=CAPACITY)
    sync = layer.sync
    with connection.cursor() as cursor:
        cursor.execute("CREATE TABLE note (text text)")

    async def singles() -> None:
        for _ in range(MANY):
            await layer.send("jobs", MESSAGE)
        await layer.close()

    async def many() -> None:
        await layer.send_many([("jobs", MESSAGE)] * MANY)
        await layer.close()

    works: dict[str, Callable[[], object]] = {
        "1,000 send": lambda: asyncio.run(singles()),
        "send_many of 1,000": lambda: asyncio.run(many()),
        "1,000 sync.send": lambda: _repeat(MANY, lambda: sync.send("jobs", MESSAGE)),
        "sync.send_many of 1,000": lambda: sync.send_many([("jobs", MESSAGE)] * MANY),
        "transactions": lambda: _repeat(transactions, lambda: _save(and_send=None)),
        "transactions that send": lambda: _repeat(
            transactions, lambda: _save(and_send=lambda: sync.group_send("room", MESSAGE))
        ),
        "select 1": lambda: _repeat(transactions, _select),
    }
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            seconds = _seconds(work)
            if number:  # the first round is the warm-up
                found[name].append(seconds)
            with connection.cursor() as cursor:
                cursor.execute("TRUNCATE pg_layer_message, note")
    return found


def _select() -> None:
    with connection.cursor() as cursor:
        cursor.execute("SELECT 1")


def main() -> None:
    """Print the medians and their ratios."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sync_calls", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transactions", type=int, default=500, help="in each round")
    parser.add_argument("--dsn", help="use this PostgreSQL server")
    options = parser.parse_args()
    with postgres_server(options.dsn) as dsn:
        configure_django(dsn)
        found = measure(options.rounds, options.transactions)
        connection.close()
    median = {name: statistics.median(seconds) for name, seconds in found.items()}
    for name, seconds in median.items():
        count = (
            options.transactions
            if name in ("transactions", "transactions that send", "select 1")
            else MANY
        )
        print(f"{name:26} {1e6 * seconds / count:8.1f} µs each")
    print(f"send_many: {median['1,000 send'] / median['send_many of 1,000']:.1f}x as fast")
    ratio = median["1,000 sync.send"] / median["sync.send_many of 1,000"]
    print(f"sync.send_many: {ratio:.1f}x as fast")
    more = (median["transactions that send"] - median["transactions"]) / options.transactions
    trip = median["select 1"] / options.transactions
    print(
        f"sending in a transaction: {1e6 * more:.0f} µs more;"
        f" a round trip of Django takes {1e6 * trip:.0f}"
    )


if __name__ == "__main__":
    main()
