"""`run_on`: coroutines on the event loop of another thread."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

from pg_layer._process.threads import run_on
from pg_layer.exceptions import NotBegun


async def test_run_on_a_loop_closed_before_it_begins_leaves_no_coroutine_that_never_ran() -> None:
    """Warnings are errors in the tests."""
    loop = asyncio.new_event_loop()  # never runs, as one that is about to be closed
    began = False

    async def work() -> None:
        nonlocal began
        began = True

    running = asyncio.ensure_future(
        run_on(loop, threading.current_thread(), work(), timeout=30)  # checks the loop in 0.1 s
    )
    await asyncio.sleep(0)
    loop.close()
    with pytest.raises(NotBegun):
        await running
    del running
    gc.collect()
    assert not began
