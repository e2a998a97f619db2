"""What the server behind a layer does, by its own counters: what messages alone do not tell."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, closing
from typing import Protocol

from benchmarks.layers import KINDS, LayerSpec
from benchmarks.servers import PostgresObserver, RedisObserver
from benchmarks.statistics import median

_REPEATS = 20
_PREFIX = "asgi"
_MESSAGE = b"x" * 150


class Probe(Protocol):
    """A connection of the harness's own, which leaves itself out of what it counts.

    NaN is what cannot be known of this server or this layer.
    """

    def connections(self) -> float:
        """How many connections others hold to the server."""

    def commands(self) -> float:
        """Others' transactions or commands so far; only the difference of two readings means anything."""

    def rows(self) -> float:
        """Rows written so far into tables that number their rows; only a difference means anything."""

    def group_send_ms(self, group: str) -> float:
        """The median time in the server of what pg_layer's `group_send` executes, without its commit.

        It is executed, measured by the server's clock, and rolled back.
        """

    def close(self) -> None: ...


class PostgresProbe(PostgresObserver):
    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec.address)
        self._layer = spec.name
        self._own = 0

    def connections(self) -> int:
        self._own += 1
        return super().connections()

    def commands(self) -> float:
        # A session hands its counts in only now and then. This one does so now: they can be taken off.
        self._connection.execute("SELECT pg_stat_force_next_flush()")
        self._own += 1
        committed = self._number(
            "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
        )
        own = self._own - 1  # without the one that has just read
        return committed - own

    def rows(self) -> float:
        # Sequences, because they tell at once; the statistics of the tables may come ten seconds late.
        return self._number("SELECT coalesce(sum(last_value), 0)::float8 FROM pg_sequences")

    def group_send_ms(self, group: str) -> float:
        if self._layer != "pg":
            return math.nan
        from pg_layer._db.queries.send import GROUP_SEND_ONE

        # LATERAL needs the row before it, and OFFSET 0 keeps the planner from merging them: so first comes
        # the clock, then the function, then the clock again.
        timed = (
            "SELECT extract(epoch FROM clock_timestamp() - after.since)::float8 * 1000"
            " FROM (SELECT clock_timestamp() AS since OFFSET 0) AS before, LATERAL ("
            f"SELECT called.*, before.since FROM ({GROUP_SEND_ONE.cursor_sql}) AS called OFFSET 0) AS after"
        ).encode()
        values = (_PREFIX, group, _MESSAGE, 60.0, None, True, False)
        parameters = GROUP_SEND_ONE.parameters(values)
        times = []
        for _ in range(_REPEATS + 1):
            with self._connection.transaction(force_rollback=True):
                row = self._connection.execute(timed, parameters).fetchone()
            self._own += 1
            times.append(float(row[0]) if row else math.nan)
        return median(times[1:])  # the first one also plans

    def _number(self, query: str) -> float:
        row = self._connection.execute(query.encode()).fetchone()
        self._own += 1
        return float(row[0]) if row else math.nan


class RedisProbe(RedisObserver):
    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec.address)
        self._own = 0

    def connections(self) -> int:
        self._own += 1
        return super().connections()

    def commands(self) -> float:
        processed = int(self._client.info("stats")["total_commands_processed"])
        self._own += 1
        return processed - self._own

    def rows(self) -> float:
        return math.nan

    def group_send_ms(self, group: str) -> float:
        return math.nan


class NoProbe:
    """For a layer without a server that could be asked."""

    def connections(self) -> float:
        return math.nan

    commands = rows = connections

    def group_send_ms(self, group: str) -> float:
        return math.nan

    def close(self) -> None:
        pass


def probe(spec: LayerSpec) -> AbstractContextManager[Probe, None]:
    """A probe of the layer's server, closed at the end of the ``with`` block."""
    server = KINDS[spec.name].server
    if server == "postgres":
        return closing(PostgresProbe(spec))
    if server == "redis":
        return closing(RedisProbe(spec))
    return closing(NoProbe())
