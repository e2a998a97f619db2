"""Other threads: whether they can have an event loop, and running a coroutine on it."""

from __future__ import annotations

import asyncio
import functools
import sys
import threading
import time
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from asgiref.sync import AsyncToSync

from pg_layer.exceptions import LayerUnavailable, NotBegun, OutcomeUnknown

T = TypeVar("T")

HELD_UP = (
    0.5  # seconds without a turn of the loop, after which the caller is told that it is blocked
)
LOOK = 0.1  # seconds between two looks at whether the other loop still runs


def silent(thread: threading.Thread) -> str:
    """What to tell a caller whom the event loop in a thread does not answer."""
    return (
        f"The event loop that serves the channel layer, in thread {thread.name}, does not answer."
    )


def held_up(thread: threading.Thread, seconds: float) -> str:
    """What to tell a caller if the event loop in a thread has not run for so long."""
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
    goes_on: bool = False,
    is_read: bool = False,
) -> T:
    """Run on another loop, which runs in ``thread``, and wait for it on this one.

    ``goes_on``: even if this caller is cancelled or gives up after ``timeout`` seconds. Raises `NotBegun` if
    the other loop cancels the work, is stopped or is closed. After ``timeout`` seconds raises
    `OutcomeUnknown`, or `LayerUnavailable` if it ``is_read``, which changes nothing.
    """
    deadline = time.monotonic() + timeout
    asked_at: float | None = (
        None  # when that loop was asked to run `answered`, which it has not yet
    )

    def answered() -> None:
        nonlocal asked_at
        asked_at = None

    try:
        answer = asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))
    except RuntimeError:  # it is closed
        work.close()
        raise NotBegun from None
    try:
        # asyncio does not tell when a loop stops without cancelling its tasks.
        while not (await asyncio.wait((answer,), timeout=LOOK))[0]:
            if not loop.is_running():
                raise NotBegun(may_have_begun=True)
            now = time.monotonic()
            if now >= deadline:
                silence = 0.0 if asked_at is None else now - asked_at
                why = held_up(thread, silence) if silence >= HELD_UP else silent(thread)
                if is_read:
                    raise LayerUnavailable(why)
                raise OutcomeUnknown(f"{why} It is unknown whether the call took effect.")
            if asked_at is None:
                asked_at = now
                with suppress(RuntimeError):  # it is closed
                    loop.call_soon_threadsafe(answered)
        if answer.cancelled():
            raise NotBegun(may_have_begun=True)
        return answer.result()
    finally:
        if not (goes_on or loop.is_closed()):
            answer.cancel()


@functools.cache
def are_threads_real() -> bool:
    """Whether another thread can have an event loop while one runs here.

    gevent and eventlet replace threads by greenlets, which share one thread, and so asyncio's running loop:
    while the background loop ran, no other could, nor could Django use a database connection.
    """
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(threading.get_native_id()), daemon=True)
    thread.start()
    thread.join()
    return found != [threading.get_native_id()]


def is_passing(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the loop is one that `async_to_sync` made for one call, and can borrow the background loop."""
    return loop in getattr(AsyncToSync, "loop_thread_executors", ()) and are_threads_real()
