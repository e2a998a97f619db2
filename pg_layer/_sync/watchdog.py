"""A time limit for calls: psycopg's cursors wait for an answer without a limit."""

from __future__ import annotations

import os
import socket
import threading
import time
from contextlib import suppress
from typing import Any

import psycopg
from psycopg import Connection

INTERVAL = 0.1  # seconds after which the thread notices new calls, at the latest


class Watch:
    """A call on a connection, with a deadline of `time.monotonic`.

    Made by the thread of the call, which must pass it to `Watchdog.end`.
    """

    __slots__ = ("_fd", "deadline", "is_cut")

    def __init__(self, conn: Connection[Any], deadline: float) -> None:
        self.deadline = deadline
        self.is_cut = False
        # Not the number of the socket itself: libpq closes the socket when the connection dies, and
        # then another file of the process may get the number.
        self._fd = -1
        # If the connection is lost, the statement raises the reason. If the process has too many
        # open files, the call has no limit.
        with suppress(OSError, psycopg.OperationalError):
            self._fd = os.dup(conn.fileno())

    def cut(self) -> None:
        """Shut the socket down: the thread of the call reads the end of the stream."""
        if self._fd < 0:
            return
        self.is_cut = True
        with suppress(OSError):
            duplicate = socket.socket(fileno=self._fd)
            try:
                duplicate.shutdown(socket.SHUT_RDWR)
            finally:
                duplicate.detach()

    def close(self) -> None:
        """Release the duplicate of the socket."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


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

    def begin(self, watch: Watch) -> None:
        """Cut the connection at the deadline, unless `end` is called before.

        A signal handler may raise in this method: call `end` in any case.
        """
        with self._lock:
            self._watches.add(watch)
            must_start = not self._is_running
            self._is_running = True
        if must_start:
            try:
                threading.Thread(target=self._run, name="pg_layer-watchdog", daemon=True).start()
            except BaseException as error:
                # The next call starts a thread. If this one has started after all, both end.
                self._is_running = False
                # RuntimeError: the interpreter is ending, or the process has too many threads. The
                # call continues without a limit. A failure would lose the message.
                if not isinstance(error, RuntimeError):
                    raise

    def end(self, watch: Watch) -> None:
        """Stop watching. The connection is not cut after this returns."""
        with self._lock:
            self._watches.discard(watch)
            watch.close()

    def _run(self) -> None:
        while True:
            with self._lock:
                now = time.monotonic()
                for watch in [each for each in self._watches if each.deadline <= now]:
                    self._watches.discard(watch)
                    watch.cut()
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
