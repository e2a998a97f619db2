"""The wait for cancelled tasks. No I/O."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

# Seconds after which a task that still runs has swallowed its cancellation.
_SWALLOWED_AFTER = 0.2


async def wait_for_cancelled(tasks: Iterable[asyncio.Task[Any]], timeout: float) -> None:
    """Wait for the end of tasks that were cancelled just now, about ``timeout`` seconds.

    Before Python 3.12 `asyncio.wait_for` may swallow a cancellation, and psycopg waits on it
    while it connects. So cancel the tasks that still run after a pause once more. Without the
    pause, the second cancellation would interrupt the `finally` blocks of the tasks.
    """
    waited = set(tasks)
    if not waited:
        return
    late: set[asyncio.Task[Any]]
    _, late = await asyncio.wait(waited, timeout=_SWALLOWED_AFTER)
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late, timeout=timeout)
