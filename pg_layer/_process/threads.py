"""Event loops in other threads, and coroutines that run on them."""

from __future__ import annotations

import asyncio
import functools
import inspect
import sys
import threading
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from asgiref.sync import AsyncToSync

from pg_layer.exceptions import LayerUnavailable, NotBegun, OutcomeUnknown

T = TypeVar("T")

# Seconds without progress of an event loop after which the error calls it blocked.
BLOCKED_AFTER = 0.5
CHECK_INTERVAL = 0.1  # seconds between two checks whether the other loop still runs


def describe_silent(thread: threading.Thread) -> str:
    """Return the error text for an event loop in a thread that does not answer."""
    return (
        f"The event loop that serves the channel layer, in thread {thread.name}, does not answer."
    )


def describe_blocked(thread: threading.Thread, seconds: float) -> str:
    """Return the error text for an event loop in a thread that has not run for ``seconds``."""
    frame = sys._current_frames().get(thread.ident or 0)
    where = "" if frame is None else f" (now at {frame.f_code.co_filename}, line {frame.f_lineno})"
    return (
        f"The event loop in thread {thread.name} serves the channel layer, and has not run for"
        f" {seconds:.1f} s: code in that thread blocks it{where}."
        " Run such code in another thread, for instance with asgiref's sync_to_async()."
    )


async def run_on(
    loop: asyncio.AbstractEventLoop,
    thread: threading.Thread,
    work: Coroutine[Any, Any, T],
    timeout: float,
    *,
    outlives_caller: bool = False,
    is_read: bool = False,
) -> T:
    """Run a coroutine on another event loop, and wait for it on the current one.

    ``thread``: the thread in which ``loop`` runs.
    ``timeout``: seconds to wait.
    ``outlives_caller``: do not cancel the work if the caller is cancelled or times out.
    ``is_read``: the work changes nothing.

    Raises `NotBegun` if the other loop is stopped or closed, or cancels the work. After
    ``timeout`` seconds raises `OutcomeUnknown`, or `LayerUnavailable` if ``is_read``.
    """
    deadline = time.monotonic() + timeout
    # When the other loop was asked to call `answered`; None if it has called it since.
    asked_at: float | None = None

    def answered() -> None:
        nonlocal asked_at
        asked_at = None

    try:
        answer = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))
    except RuntimeError:  # the loop is closed
        work.close()
        raise NotBegun from None
    try:
        # asyncio gives no notice when a loop stops without cancelling its tasks: check it.
        while not (await asyncio.wait((answer,), timeout=CHECK_INTERVAL))[0]:
            if not loop.is_running():
                raise NotBegun(may_have_begun=True)
            now = time.monotonic()
            if now >= deadline:
                silence = 0.0 if asked_at is None else now - asked_at
                raise _timed_out(thread, silence, is_read=is_read)
            if asked_at is None:
                asked_at = now
                with suppress(RuntimeError):  # the loop is closed
                    loop.call_soon_threadsafe(answered)
        if answer.cancelled():
            raise NotBegun(may_have_begun=True)
        return answer.result()
    finally:
        if loop.is_closed():
            # A closed loop never begins the work. Python warns of coroutines that never began.
            if inspect.getcoroutinestate(work) == inspect.CORO_CREATED:
                work.close()
        elif not outlives_caller:
            answer.cancel()


def _timed_out(thread: threading.Thread, silence: float, *, is_read: bool) -> LayerUnavailable:
    """Return the error for work that did not end in time.

    ``silence``: seconds for which the loop in ``thread`` has not run a callback.
    """
    is_blocked = silence >= BLOCKED_AFTER
    why = describe_blocked(thread, silence) if is_blocked else describe_silent(thread)
    if is_read:
        return LayerUnavailable(why)
    return OutcomeUnknown(f"{why} It is unknown whether the call took effect.")


@functools.cache
def are_threads_real() -> bool:
    """Return whether another thread can run an event loop while one runs in this thread.

    gevent and eventlet replace threads by greenlets. All greenlets share one thread, and so
    asyncio's running loop. While a background loop ran, no other loop could run, and Django
    could not use a database connection.
    """
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(threading.get_native_id()), daemon=True)
    thread.start()
    thread.join()
    return found != [threading.get_native_id()]


def is_single_call_loop(loop: asyncio.AbstractEventLoop) -> bool:
    """Return whether `async_to_sync` made the loop for one call.

    Such a loop can use the background loop. Without real threads there is none, and the
    result is False.
    """
    return loop in getattr(AsyncToSync, "loop_thread_executors", ()) and are_threads_real()
