"""A time limit for calls: psycopg's cursors wait for an answer without a limit."""

from __future__ import annotations

import os
import threading
import time
from typing import Any

from psycopg import Connection

from pg_layer._db.session import Session

INTERVAL = 0.1  # seconds after which the thread notices new calls, at the latest


class Watch:
    """A call on a connection, with a deadline of `time.monotonic`."""

    __slots__ = ("conn", "deadline", "is_cut")

    def __init__(self, conn: Connection[Any], deadline: float) -> None:
        self.conn = conn
        self.deadline = deadline
        self.is_cut = False


class Watchdog:
    """A thread that cuts connections whose calls exceed their deadline.

    The process has one such thread. It starts with a call, and ends when no call is under way. A
    thread for each call would cost 70 µs, and much more while other threads compute.

    Any thread may call the methods.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watches: set[Watch] = set()
        self._is_running = False

    def watch(self, conn: Connection[Any], deadline: float) -> Watch:
        """Cut the connection at the deadline, unless `end` is called before."""
        watch = Watch(conn, deadline)
        with self._lock:
            self._watches.add(watch)
            must_start = not self._is_running
            self._is_running = True
        if must_start:
            try:
                threading.Thread(target=self._run, name="pg_layer-watchdog", daemon=True).start()
            except RuntimeError:
                # The interpreter is ending, or the process has too many threads. The call continues
                # without a limit. A failure would lose the message.
                self._is_running = False
        return watch

    def end(self, watch: Watch) -> None:
        """Stop watching. The connection is not cut after this returns."""
        with self._lock:
            self._watches.discard(watch)

    def _run(self) -> None:
        while True:
            with self._lock:
                now = time.monotonic()
                for watch in [each for each in self._watches if each.deadline <= now]:
                    self._watches.discard(watch)
                    watch.is_cut = True
                    # The thread of the call reads the end of the stream.
                    Session(watch.conn).cut()
                if not self._watches:
                    self._is_running = False
                    return
                left = min(watch.deadline for watch in self._watches) - now
            # A call that begins meanwhile may have an earlier deadline.
            time.sleep(min(left, INTERVAL))


watchdog = Watchdog()

if hasattr(os, "register_at_fork"):
    # The thread does not run in the child, and a thread of the parent may have held the lock.
    os.register_at_fork(after_in_child=watchdog.__init__)  # type: ignore[misc]
