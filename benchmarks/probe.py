"""The work of a layer's server, from the server's own counters."""

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
    """A separate connection that excludes itself from its counts.

    NaN is the value of what this server or layer does not provide.
    """

    def connections(self) -> float:
        """Return the number of other connections to the server."""

    def commands(self) -> float:
        """Return a counter of other sessions' transactions or commands. Only differences count."""

    def rows(self) -> float:
        """Return a counter of rows written to tables with sequences. Only differences count."""

    def group_send_ms(self, group: str) -> float:
        """Return the median server time of pg_layer's `group_send` statement without commit.

        The statement is executed, measured with the server's clock, and rolled back.
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
        # A session reports its counts with a delay. This one reports them now, so that they can be
        # subtracted.
        self._connection.execute("SELECT pg_stat_force_next_flush()")
        self._own += 1
        committed = self._number(
            "SELECT xact_commit + xact_rollback FROM pg_stat_database"
            " WHERE datname = current_database()"
        )
        own = self._own - 1  # without the transaction of the last reading
        return committed - own

    def rows(self) -> float:
        # Sequences, because they change at once. The statistics of tables may be ten seconds late.
        return self._number("SELECT coalesce(sum(last_value), 0)::float8 FROM pg_sequences")

    def group_send_ms(self, group: str) -> float:
        if self._layer != "pg":
            return math.nan
        from pg_layer._db.queries.send import GROUP_SEND_ONE

        # LATERAL needs the row before it, and OFFSET 0 keeps the planner from merging the
        # subqueries. So the clock is read first, then the function is called, then the clock is
        # read again.
        timed = (
            "SELECT extract(epoch FROM clock_timestamp() - after.since)::float8 * 1000"
            " FROM (SELECT clock_timestamp() AS since OFFSET 0) AS before, LATERAL ("
            f"SELECT called.*, before.since FROM ({GROUP_SEND_ONE.cursor_sql}) AS called OFFSET 0"
            ") AS after"
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
    """The probe for a layer without a server."""

    def connections(self) -> float:
        return math.nan

    commands = rows = connections

    def group_send_ms(self, group: str) -> float:
        return math.nan

    def close(self) -> None:
        pass


def probe(spec: LayerSpec) -> AbstractContextManager[Probe, None]:
    """Yield a probe of the layer's server and close it at the end."""
    server = KINDS[spec.name].server
    if server == "postgres":
        return closing(PostgresProbe(spec))
    if server == "redis":
        return closing(RedisProbe(spec))
    return closing(NoProbe())
