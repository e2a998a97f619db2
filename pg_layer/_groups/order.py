"""The order of the calls of this process that concern one group: ``docs/protocols.md``, section 4.

Two kinds of calls do not commute: changes of the members, and calls that use them (`group_send`,
`group_channels` and the like). A call waits for the earlier calls of the other kind. Calls of one
kind do not wait for each other: the batchers keep their order. No I/O.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Collection

from pg_layer._process.threads import CHECK_INTERVAL


class Turn:
    """The place of a call in the lines of its groups.

    ``blocked``: the number of its groups in which an earlier call of the other kind has not ended.
    """

    __slots__ = ("blocked", "groups", "is_change", "is_over", "loop", "waiter")

    def __init__(
        self, groups: Collection[str], loop: asyncio.AbstractEventLoop, *, is_change: bool
    ) -> None:
        self.groups = groups
        self.loop = loop  # the caller's
        self.is_change = is_change
        self.blocked = 0
        self.is_over = False
        self.waiter: asyncio.Future[None] | None = None

    def unblock(self) -> None:
        """Note that the calls ahead in one of the groups have ended. From any thread."""
        self.blocked -= 1
        if not self.blocked and self.waiter is not None:
            try:
                self.loop.call_soon_threadsafe(_resolve, self.waiter)
            except RuntimeError:  # the loop is closed: no task waits
                pass


class _Phase:
    """Calls of one kind that need not wait for each other, and that have not ended."""

    __slots__ = ("is_change", "turns")

    def __init__(self, turn: Turn) -> None:
        self.is_change = turn.is_change
        self.turns = {turn}


class GroupOrder:
    """A line of phases for each group that a call concerns now. Thread-safe.

    The calls of the first phase run. A call of the other kind begins a new phase at the end, and
    later calls queue up behind it. So a call waits for finitely many others, and the calls of
    unrelated groups do not meet.
    """

    def __init__(self) -> None:
        # A call enters all of its lines in one step. So no two calls wait for each other.
        self._lock = threading.Lock()
        self._lines: dict[str, deque[_Phase]] = {}
        # Calls that have ended and are still in line. Python may delete the coroutine of a call
        # anywhere, also where this thread holds the lock: `end` must not wait for it.
        self._ended: deque[Turn] = deque()

    def __len__(self) -> int:
        return len(self._lines)

    def begin(
        self, groups: Collection[str], loop: asyncio.AbstractEventLoop, *, is_change: bool
    ) -> Turn:
        """Enter a call. If its turn is ``blocked``, it must `wait`. It must `end` in any case.

        ``groups``: without duplicates. ``loop``: the running loop. ``is_change``: the call changes
        the members of the groups.
        """
        turn = Turn(groups, loop, is_change=is_change)
        lines = self._lines
        with self._lock:
            for group in groups:
                line = lines.get(group)
                if line is None:
                    lines[group] = deque((_Phase(turn),))
                    continue
                if line[-1].is_change == is_change:
                    line[-1].turns.add(turn)
                else:
                    line.append(_Phase(turn))
                if len(line) > 1:
                    turn.blocked += 1
        if self._ended:
            self._remove_ended()
        return turn

    async def wait(self, turn: Turn, deadline: float) -> None:
        """Return when the earlier calls of the other kind have ended, or at the deadline.

        ``deadline``: by time.monotonic(). Calls on loops that do not run are not waited for.
        """
        while turn.blocked and (left := deadline - time.monotonic()) > 0:
            turn.waiter = turn.loop.create_future()
            if turn.blocked:  # it may have been unblocked before there was a waiter
                await asyncio.wait((turn.waiter,), timeout=min(CHECK_INTERVAL, left))
            if turn.blocked:
                self._end_stopped(turn)

    def end(self, turn: Turn) -> None:
        """Let the later calls proceed. From any thread."""
        self._ended.append(turn)
        self._remove_ended()

    def _remove_ended(self) -> None:
        # If another thread has the lock, it removes these turns when it has released the lock.
        while self._ended and self._lock.acquire(blocking=False):
            try:
                while self._ended:
                    self._remove(self._ended.popleft())
            finally:
                self._lock.release()

    def _remove(self, turn: Turn) -> None:
        if turn.is_over:
            return
        turn.is_over = True
        for group in turn.groups:
            line = self._lines[group]
            for phase in line:
                if turn in phase.turns:
                    phase.turns.discard(turn)
                    break
            while line and not line[0].turns:
                line.popleft()
                if line:
                    for each in line[0].turns:
                        each.unblock()
            if not line:
                del self._lines[group]

    def _end_stopped(self, turn: Turn) -> None:
        """End the calls ahead of ``turn`` whose loops do not run any more."""
        with self._lock:
            stopped = {
                each
                for group in turn.groups
                for phase in self._lines.get(group, ())
                for each in phase.turns
                if each.loop is not turn.loop and not each.loop.is_running()
            }
        self._ended.extend(stopped)
        self._remove_ended()


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
