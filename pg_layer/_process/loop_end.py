"""The end of event loops that are closed without cancelling their tasks.

`asyncio.run` cancels the tasks of a loop and lets them end before it closes the loop. Code that
calls ``loop.close()`` itself may not. The tasks would keep their connections, and Python would
complain about each of them when it deletes them.
"""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

END_TIMEOUT = 5.0  # seconds for the tasks to end; those of an engine take about half of it
_PACKAGE = str(Path(__file__).parents[1]) + os.sep


def end_tasks_on_close(loop: asyncio.AbstractEventLoop) -> None:
    """Make ``loop.close()`` first cancel the tasks that wait in code of this package.

    These are the layer's own tasks, and tasks of the application in calls of the layer. They end
    before the loop does, as with `asyncio.run`. Until then ``loop.close()`` runs the loop, and with
    it all other tasks and callbacks of the application, for at most `END_TIMEOUT` seconds.

    May be called any number of times.
    """
    if loop.close.__class__ is not _Close:
        with suppress(AttributeError):  # a loop of another library without a dict
            loop.close = _Close(loop)  # type: ignore[method-assign]


class _Close:
    """The replacement of a loop's ``close``."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._close = loop.close
        self._process = os.getpid()

    def __call__(self) -> None:
        loop = self._loop
        # A forked child must not touch the connections of its parent.
        if self._process == os.getpid() and not loop.is_running() and not loop.is_closed():
            tasks = {task for task in asyncio.all_tasks(loop) if _is_in_package(task)}
            if tasks and asyncio._get_running_loop() is None:
                self._end(tasks)
            elif tasks:
                # This code runs on another loop, and a thread runs one loop at a time.
                thread = threading.Thread(target=self._end, args=(tasks,))
                thread.start()
                thread.join()
        self._close()

    def _end(self, tasks: set[asyncio.Task[Any]]) -> None:
        with suppress(Exception):  # the loop must be closed in any case
            ending = self._loop.create_task(_cancelled(tasks))
            ending.add_done_callback(lambda _: self._loop.stop())
            while not ending.done():  # the application may have stopped the loop
                self._loop.run_forever()


async def _cancelled(tasks: set[asyncio.Task[Any]]) -> None:
    """Cancel tasks, and wait for their end."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=END_TIMEOUT)
    for task in tasks:
        if task.done() and not task.cancelled():
            task.exception()  # so that asyncio does not log it
    for _ in range(5):  # tasks that wait for them, such as the caller of asyncio.wait_for()
        await asyncio.sleep(0)


def _is_in_package(task: asyncio.Task[Any]) -> bool:
    awaited: Any = task.get_coro()
    while awaited is not None:
        code = getattr(awaited, "cr_code", None)
        if code is None:
            return False
        if code.co_filename.startswith(_PACKAGE):
            return True
        awaited = awaited.cr_await
    return False
