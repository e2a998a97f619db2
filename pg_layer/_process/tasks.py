"""Tasks that continue after an unexpected error. No I/O."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from pg_layer._state.failures import Failures

Work = Callable[[], Coroutine[Any, Any, None]]
# Runs work in a task until it succeeds. The first argument is the name of the work.
Spawn = Callable[[str, Work], object]

PAUSE = 1.0  # seconds before failed work is tried again


class Tasks:
    """The tasks of an engine. A task ends when its work is done, or is cancelled with the engine.

    An exception does not end a task, because its work would never be done. `Failures` records the
    exception, and the work starts again from its beginning. Therefore a flag for work under way
    must be reset at the end of the work, and not if it raises. No code of the work may follow the
    reset: later work is another task.
    """

    def __init__(self, failures: Failures, is_over: Callable[[], bool] = lambda: False) -> None:
        # is_over: whether the engine has ended; errors are then expected and ignored
        self._failures = failures
        self._is_over = is_over
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[Any]] = set()

    @property
    def running(self) -> set[asyncio.Task[Any]]:
        """The tasks that have not ended."""
        return set(self._tasks)

    def add(self, task: asyncio.Task[Any]) -> None:
        """Add a task that was created elsewhere, so that it is cancelled with the others."""
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def spawn(self, what: str, work: Work) -> None:
        """Run work in a task until it succeeds. ``what``: the name of the work."""
        if not self._is_over():
            self.add(self._loop.create_task(self.succeed(what, work)))

    def every(self, seconds: float, what: str, work: Work) -> None:
        """Run work repeatedly in a task, after a pause of ``seconds`` each time."""

        async def repeat() -> None:
            while True:
                await asyncio.sleep(seconds)
                await self.succeed(what, work)

        self.spawn(what, repeat)

    async def succeed(self, what: str, work: Work) -> None:
        """Run work until it succeeds, with a pause after each error.

        ``what``: the name of the work, at the beginning of a sentence in the log.
        """
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
