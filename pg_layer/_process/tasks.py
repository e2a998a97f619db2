"""Tasks that go on after an error. No I/O."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from pg_layer._state.failures import Failures

Work = Callable[[], Coroutine[Any, Any, None]]
# Runs work in a task, by its name, until it has succeeded.
Spawn = Callable[[str, Work], object]

PAUSE = 1.0  # seconds before what failed is tried again


class Tasks:
    """The tasks of an engine. They end when their work is done, or are cancelled with the engine.

    No exception ends one, or the work would never be done: it is noted in `Failures`, and the work is tried
    again from its beginning. So what says that work is under way is withdrawn when the work is done, and not
    if it raises. That is the last that the work does: what follows is other work, with a task of its own.
    """

    def __init__(self, failures: Failures, is_over: Callable[[], bool] = lambda: False) -> None:
        # is_over: whether the engine has ended, so that an error says nothing
        self._failures = failures
        self._is_over = is_over
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def running(self) -> set[asyncio.Task[Any]]:
        """The tasks that have not ended."""
        return set(self._tasks)

    def add(self, task: asyncio.Task[Any]) -> None:
        """Cancel a task that was made elsewhere with the others."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def spawn(self, what: str, work: Work) -> None:
        """Do it in a task."""
        if not self._is_over():
            self.add(self._loop.create_task(self.succeed(what, work)))

    def every(self, seconds: float, what: str, work: Work) -> None:
        """Do it again and again in a task, after so many seconds each time."""

        async def again_and_again() -> None:
            while True:
                await asyncio.sleep(seconds)
                await self.succeed(what, work)

        self.spawn(what, again_and_again)

    async def succeed(self, what: str, work: Work) -> None:
        """Do it, again after a pause for as long as it raises. ``what``: begins a sentence in the log."""
        task = object()
        is_done = False
        try:
            while not is_done:
                try:
                    await work()
                    is_done = True
                except Exception as error:
                    if self._is_over():
                        return
                    self._failures.begin(task, what, error)
                    await asyncio.sleep(PAUSE)
        finally:
            self._failures.end(task, is_done=is_done)
