"""The end of the process: its layers take leave of the database, also where SIGTERM ends it."""

from __future__ import annotations

import atexit
import math
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable
from functools import wraps
from types import FrameType
from typing import Any, Protocol

LEAVE_TIMEOUT = 5.0  # seconds
STOPPING_MOST = 300.0  # seconds in which a server stops
END_PRIORITY = -1000  # among the finalizers of multiprocessing: last


class Leaver(Protocol):
    """Something that takes leave at the end, once."""

    def leave(self) -> None: ...


_leavers: weakref.WeakSet[Leaver] = weakref.WeakSet()
_heeded_child: int | None = None  # the process in which `heed_end_of_child` was called
_stopping_since = -math.inf  # by time.monotonic()


def is_stopping() -> bool:
    """Whether a SIGTERM has asked this process to end. A process that is still there later lives on."""
    return time.monotonic() - _stopping_since < STOPPING_MOST


def _begin_to_stop() -> None:
    global _stopping_since
    _stopping_since = time.monotonic()


def remember(leaver: Leaver) -> None:
    """Have this take leave at the end of the process."""
    _leavers.add(leaver)


def leavers() -> list[Leaver]:
    """All that are remembered."""
    return list(_leavers)


def heed_end_of_child() -> None:
    """Close the clients at the end of a child of `multiprocessing`, too.

    A forked one does not run the functions that its parent has registered with `atexit`.
    """
    global _heeded_child
    if multiprocessing.parent_process() is not None and _heeded_child != os.getpid():
        _heeded_child = os.getpid()
        multiprocessing.util.Finalize(None, _end_of_child, exitpriority=END_PRIORITY)


def _end_of_child() -> None:
    # Not before other threads end, which may use a layer. Python joins them after this, and ours as well.
    others = [thread for thread in threading.enumerate() if not thread.daemon]
    others = [thread for thread in others if thread is not threading.current_thread()]
    if others:
        threading.Thread(
            target=_leave_after, args=(others,), name="pg_layer-farewell", daemon=False
        ).start()
    else:
        _leave_all()


def _leave_after(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join()
    _leave_all()


_Handler = Callable[[int, FrameType | None], Any] | int | None
_is_heeding = False
_set_handler: Callable[[int, _Handler], _Handler] | None = None  # signal.signal, as it was


def heed_sigterm() -> None:
    """Have SIGTERM close the clients where it would end the process on the spot. On the main thread only.

    A server's own handler stays, also for a second SIGTERM; `is_stopping` tells when it was called. But
    uvicorn, once it has stopped, restores the default effect and sends SIGTERM to itself, and then nothing of
    Python runs. So from here on `signal.signal` sets our handler instead of the default effect. Blocking the
    signal until the exit would not do: processes that the application starts meanwhile would inherit that.
    """
    global _is_heeding, _set_handler
    if threading.current_thread() is not threading.main_thread():
        return
    try:
        handler = signal.getsignal(signal.SIGTERM)
        if handler is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _leave_and_die)
        elif (
            callable(handler)
            and handler is not _leave_and_die
            and not isinstance(handler, _Noticed)
        ):
            signal.signal(signal.SIGTERM, _Noticed(handler))
    except ValueError:  # an interpreter within another's process, whose signals are not ours
        return
    _is_heeding = True
    if _set_handler is None:  # once: another library may have wrapped ours since
        _set_handler = signal.signal
        signal.signal = wraps(_set_handler)(_set_ours_for_default)


class _Noticed:
    """A server's handler, of which we know when it is called."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self.handler = handler

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        _begin_to_stop()
        self.handler(signum, frame)


def _set_ours_for_default(signalnum: int, handler: _Handler) -> _Handler:
    assert _set_handler is not None
    if _is_heeding and signalnum == signal.SIGTERM and handler == signal.SIG_DFL:
        handler = _leave_and_die
    return _set_handler(signalnum, handler)


def _restore_default() -> None:
    """Let SIGTERM do what it does without us."""
    global _is_heeding
    _is_heeding = False
    handler = signal.getsignal(signal.SIGTERM)
    if handler is _leave_and_die:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    elif isinstance(handler, _Noticed):
        signal.signal(signal.SIGTERM, handler.handler)


def _leave_and_die(signum: int, frame: FrameType | None) -> None:
    _begin_to_stop()
    # In a thread of its own: this one may have been interrupted while it held a lock that leaving needs.
    thread = threading.Thread(target=_leave_all, name="pg_layer-farewell", daemon=True)
    thread.start()
    thread.join(LEAVE_TIMEOUT)
    _restore_default()
    os.kill(os.getpid(), signum)
    os._exit(128 + signum)  # the first process of a container is spared what has its default effect


def _leave_all() -> None:
    for leaver in leavers():
        leaver.leave()


@atexit.register
def _end() -> None:
    _leave_all()


def _after_fork() -> None:
    """A child has nothing to close yet: SIGTERM does there what it did before."""
    global _stopping_since
    _stopping_since = -math.inf
    _restore_default()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
