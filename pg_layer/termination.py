"""The end of the process: its layers take leave of the database, also where SIGTERM ends it."""

from __future__ import annotations

import atexit
import os
import signal
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, Protocol

LEAVE_TIMEOUT = 5.0  # seconds


class Leaver(Protocol):
    """Something that takes leave at the end, once."""

    def leave(self) -> None: ...


_leavers: weakref.WeakSet[Leaver] = weakref.WeakSet()


def remember(leaver: Leaver) -> None:
    """Have this take leave at the end of the process."""
    _leavers.add(leaver)


def leavers() -> list[Leaver]:
    """All that are remembered."""
    return list(_leavers)


def heed_sigterm() -> None:
    """See to it that SIGTERM, too, lets the process take leave. Does nothing but on the main thread.

    By default SIGTERM ends a process on the spot. A server such as uvicorn catches it and stops in order,
    and then sends it to itself once more, which by default ends it before anybody could say goodbye.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    handler = signal.getsignal(signal.SIGTERM)
    try:
        if handler is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _leave_and_die)
        elif callable(handler) and handler is not _leave_and_die and not isinstance(handler, _Postponed):
            signal.signal(signal.SIGTERM, _Postponed(handler))
    except ValueError:  # an interpreter within another's process, whose signals are not ours
        pass


class _Postponed:
    """Another's handler, after which this thread is spared further SIGTERMs until it has taken leave."""

    is_blocking = False

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self.handler = handler

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        self.handler(signum, frame)
        _Postponed.is_blocking = True
        # Only those that the thread sends itself: one from outside finds another thread, or waits until then.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})


def _leave_and_die(signum: int, frame: FrameType | None) -> None:
    # In a thread of its own: this one may have been interrupted while it held a lock that leaving needs.
    thread = threading.Thread(target=_leave_all, name="pg_layer-farewell", daemon=True)
    thread.start()
    thread.join(LEAVE_TIMEOUT)
    signal.signal(signum, signal.SIG_DFL)
    os.kill(os.getpid(), signum)
    os._exit(128 + signum)  # the first process of a container is spared what has its default effect


def _leave_all() -> None:
    for leaver in leavers():
        leaver.leave()


@atexit.register
def _end() -> None:
    _leave_all()
    # A SIGTERM that was kept waiting tells the parent what ended this process.
    _unblock()


def _unblock() -> None:
    if _Postponed.is_blocking and threading.current_thread() is threading.main_thread():
        _Postponed.is_blocking = False
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def _after_fork() -> None:
    """A child has nothing to take leave of yet: SIGTERM does there what it did before."""
    handler = signal.getsignal(signal.SIGTERM)
    if handler is _leave_and_die:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    elif isinstance(handler, _Postponed):
        signal.signal(signal.SIGTERM, handler.handler)
    _unblock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
