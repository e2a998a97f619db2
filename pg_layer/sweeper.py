"""Sweeping from outside the serving processes: the loop behind ``manage.py pg_layer_sweep``."""

from __future__ import annotations

import select
import socket
from collections.abc import Callable

import psycopg

from pg_layer import store
from pg_layer.config import Config
from pg_layer.connections import connection_kwargs
from pg_layer.exceptions import PgLayerError
from pg_layer.faults import translated
from pg_layer.store import Swept


class Sweeper:
    """Removes what expired, in batches, until told to stop.

    Several may run at once. ``report`` is given what each round removed, ``complain`` why a round could not
    be made; a database that is away is tried again in the next round.
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
        # Not an Event: its lock may be held by the very thread that a signal interrupts.
        self._bell, self.ringer = socket.socketpair()  # what is written into the ringer ends a wait
        self.ringer.setblocking(False)

    def stop(self) -> None:
        """End after the batch that runs. May be called from a signal handler."""
        self._is_stopped = True
        try:
            self.ringer.send(b".")
        except OSError:  # it has ended already, or was rung enough
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
        """Sweep all there is; raises `LayerUnavailable` and `NotMigrated`."""
        try:
            return self._sweep()
        finally:
            self.close()

    def look(self) -> Swept:
        """What sweeping would remove."""
        try:
            with translated(self._config):
                return store.sweepable(self._connection(), self._config.prefix)
        finally:
            self.close()

    def close(self) -> None:
        """Close the connection; the next sweep makes another."""
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
        total, place = Swept(0, 0, 0), store.START
        with translated(self._config):
            conn = self._connection()
            while not self._is_stopped:
                swept, place = store.sweep_now(conn, self._config.prefix, self._batch_size, place, self._bell)
                total = Swept(*map(sum, zip(total, swept, strict=True)))
                if max(swept) < self._batch_size:
                    break
        return total

    def _connection(self) -> psycopg.Connection[tuple[object, ...]]:
        if self._conn is None or self._conn.closed:
            self._conn = psycopg.connect(**connection_kwargs(self._config, "pool"))
        return self._conn
