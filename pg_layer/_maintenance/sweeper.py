"""The loop of ``manage.py pg_layer_sweep``, which sweeps from outside the serving processes."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable

import psycopg

from pg_layer._config.options import Config
from pg_layer._db.errors import translated
from pg_layer._db.pool import connection_kwargs
from pg_layer._db.queries import maintenance
from pg_layer._db.queries.maintenance import Swept
from pg_layer.exceptions import PgLayerError


class Sweeper:
    """A loop that removes expired rows in parts, until it is stopped.

    Several sweepers may run at the same time. A pass over the messages continues where the last one
    ended. The first pass, and one each hour, begins with the oldest message. Otherwise a message
    that was written with an expiry in the past would remain. A transaction that was open for a long
    time can write one.

    ``report`` is called with the counts of each pass, ``complain`` with the error that ended a
    pass. After an error the next pass connects again.
    """

    def __init__(
        self,
        config: Config,
        batch_size: int,
        report: Callable[[Swept], None],
        complain: Callable[[Exception], None],
    ) -> None:
        self._config = config
        self._batch_size = batch_size
        self._report = report
        self._complain = complain
        self._conn: psycopg.Connection[tuple[object, ...]] | None = None
        self._is_stopped = False
        self._after = maintenance.START
        self._full_pass_at = time.monotonic()  # when the next full pass begins
        # Not an Event: the thread that a signal interrupts may hold the lock of the Event.
        self._bell, self.ringer = socket.socketpair()  # a byte written to the ringer ends a wait
        self.ringer.setblocking(False)

    def stop(self) -> None:
        """End after the current part. May be called from a signal handler."""
        self._is_stopped = True
        try:
            self.ringer.send(b".")
        except OSError:  # the sweeper has ended, or the buffer is full
            pass

    def run(self, interval: float) -> None:
        """Sweep every ``interval`` seconds, until `stop`."""
        try:
            while not self._is_stopped:
                try:
                    self._report(self._sweep())
                except PgLayerError as error:
                    self._complain(error)
                    self.close()
                if select.select([self._bell], [], [], interval)[0] and not self._is_stopped:
                    self._bell.recv(4096)
        finally:
            self.close()

    def run_once(self) -> Swept:
        """Make one pass and return its counts. Raises `LayerUnavailable` and `NotMigrated`."""
        try:
            return self._sweep()
        finally:
            self.close()

    def look(self) -> Swept:
        """Return how much a sweep would remove. Raises what `run_once` raises."""
        try:
            with translated(self._config):
                return maintenance.sweepable(self._connection(), self._config.prefix)
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection. The next pass opens another."""
        conn, self._conn = self._conn, None
        if conn is not None:
            conn.close()

    def __exit__(self, *error: object) -> None:
        self.close()
        self._bell.close()
        self.ringer.close()

    def __enter__(self) -> Sweeper:
        return self

    def _sweep(self) -> Swept:
        total = Swept(0, 0, 0)
        with translated(self._config):
            conn = self._connection()
            if time.monotonic() >= self._full_pass_at:
                self._after = maintenance.START
                self._full_pass_at = time.monotonic() + maintenance.FULL_PASS
            while not self._is_stopped:
                swept, self._after = maintenance.sweep_now(
                    conn, self._config.prefix, self._batch_size, self._after, self._bell
                )
                total = Swept(*map(sum, zip(total, swept, strict=True)))
                if max(swept) < self._batch_size:
                    break
        return total

    def _connection(self) -> psycopg.Connection[tuple[object, ...]]:
        if self._conn is None or self._conn.closed:
            self._conn = psycopg.connect(**connection_kwargs(self._config, "pool"))
        return self._conn
