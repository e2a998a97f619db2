"""The close of the layers at the end of the process, also if SIGTERM ends it."""

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

CLOSE_TIMEOUT = 5.0  # seconds
MAX_STOPPING = 300.0  # seconds; a process that runs longer after SIGTERM is not stopping
EXIT_PRIORITY = -1000  # the last of the finalizers of multiprocessing


class Closable(Protocol):
    """An object that must be closed at the end of the process."""

    def close_at_exit(self) -> None: ...


_closables: set[weakref.ref[Closable]] = set()
_prepared_child: int | None = None  # the process in which `close_at_end_of_child` was called
_stopping_since = -math.inf  # by time.monotonic()


def is_stopping() -> bool:
    """Return whether SIGTERM has asked this process to end.

    If the process still runs after `MAX_STOPPING` seconds, it is assumed to continue.
    """
    return time.monotonic() - _stopping_since < MAX_STOPPING


def _begin_to_stop() -> None:
    global _stopping_since
    _stopping_since = time.monotonic()


def register(closable: Closable) -> None:
    """Close an object at the end of the process. Keeps only a weak reference."""
    _closables.add(weakref.ref(closable, _closables.discard))


def registered() -> list[Closable]:
    """Return the registered objects that still exist. From any thread."""
    # One step of the interpreter copies the set. During a loop over a WeakSet, another thread could
    # register an object, or a finaliser in this one: Python raises a RuntimeError then.
    references = _closables.copy()
    return [closable for each in references if (closable := each()) is not None]


def close_at_end_of_child() -> None:
    """Close the registered objects also at the end of a child of `multiprocessing`.

    A forked child does not run the functions that its parent has registered with `atexit`.
    """
    global _prepared_child
    if multiprocessing.parent_process() is not None and _prepared_child != os.getpid():
        _prepared_child = os.getpid()
        multiprocessing.util.Finalize(None, _end_of_child, exitpriority=EXIT_PRIORITY)


def _end_of_child() -> None:
    # Other threads may still use a layer. Python joins them after this function returns, so wait
    # for them in another thread, which Python also joins.
    others = [thread for thread in threading.enumerate() if not thread.daemon]
    others = [thread for thread in others if thread is not threading.current_thread()]
    if others:
        threading.Thread(
            target=_close_after, args=(others,), name="pg_layer-close", daemon=False
        ).start()
    else:
        _close_all()


def _close_after(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.join()
    _close_all()


_Handler = Callable[[int, FrameType | None], Any] | int | None
_handles_sigterm = False
_set_handler: Callable[[int, _Handler], _Handler] | None = None  # the original signal.signal


def close_on_sigterm() -> None:
    """Close the registered objects when SIGTERM ends the process.

    Takes effect on the main thread only, and only if SIGTERM has its default effect. A server's own
    handler remains, also for a second SIGTERM; a wrapper around it notes when it is called. uvicorn
    restores the default effect after it has stopped, and sends itself SIGTERM. Then no Python code
    would run. Therefore `signal.signal` is replaced: it installs this module's handler instead of
    the default effect.

    Blocking the signal until the exit is no alternative: processes that the application starts
    meanwhile would inherit the blocked signal.
    """
    global _handles_sigterm, _set_handler
    if threading.current_thread() is not threading.main_thread():
        return
    try:
        handler = signal.getsignal(signal.SIGTERM)
        if handler is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, _close_and_die)
        elif (
            callable(handler)
            and handler is not _close_and_die
            and not isinstance(handler, _NotingHandler)
        ):
            signal.signal(signal.SIGTERM, _NotingHandler(handler))
    except ValueError:  # a subinterpreter cannot handle signals
        return
    _handles_sigterm = True
    if _set_handler is None:  # once: another library may have wrapped the replacement since
        _set_handler = signal.signal
        signal.signal = wraps(_set_handler)(_replace_default)


class _NotingHandler:
    """A wrapper of a server's handler that notes that the process is stopping."""

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self.handler = handler

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        _begin_to_stop()
        self.handler(signum, frame)


def _replace_default(signalnum: int, handler: _Handler) -> _Handler:
    assert _set_handler is not None
    if _handles_sigterm and signalnum == signal.SIGTERM and handler == signal.SIG_DFL:
        handler = _close_and_die
    return _set_handler(signalnum, handler)


def _restore_default() -> None:
    """Restore the effect that SIGTERM has without this module."""
    global _handles_sigterm
    _handles_sigterm = False
    handler = signal.getsignal(signal.SIGTERM)
    if handler is _close_and_die:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
    elif isinstance(handler, _NotingHandler):
        signal.signal(signal.SIGTERM, handler.handler)


def _close_and_die(signum: int, frame: FrameType | None) -> None:
    _begin_to_stop()
    # Close in another thread: the signal may have interrupted this one while it holds a lock.
    thread = threading.Thread(target=_close_all, name="pg_layer-close", daemon=True)
    thread.start()
    thread.join(CLOSE_TIMEOUT)
    _restore_default()
    os.kill(os.getpid(), signum)
    os._exit(128 + signum)  # the kernel ignores the default effect for process 1 of a container


def _close_all() -> None:
    for closable in registered():
        closable.close_at_exit()


@atexit.register
def _at_exit() -> None:
    _close_all()


def _after_fork() -> None:
    """Restore SIGTERM in a child, which has nothing to close yet."""
    global _stopping_since
    _stopping_since = -math.inf
    _restore_default()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
