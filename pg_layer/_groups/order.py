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

Loop = asyncio.AbstractEventLoop


class Phase:
    """Calls of one kind that concern one group, and need not wait for each other.

    ``calls``: how many of them have not ended, by the loop of the caller.
    ``is_first``: they may run.
    """

    __slots__ = ("ahead", "behind", "calls", "group", "is_change", "is_first", "waiters")

    def __init__(self, group: str, ahead: Phase | None, loop: Loop, *, is_change: bool) -> None:
        self.group = group
        self.is_change = is_change
        self.ahead = ahead
        self.behind: Phase | None = None
        self.is_first = ahead is None
        self.calls = {loop: 1}
        self.waiters: list[asyncio.Future[None]] = []


# The place of a call: its phase for each of its groups.
Turn = list[Phase]


class GroupOrder:
    """A line of phases for each group that a call concerns now. Thread-safe.

    The calls of the first phase run. A call of the other kind begins a new phase at the end, and
    later calls queue up behind it. So a call waits for finitely many others, and the calls of
    unrelated groups do not meet.
    """

    def __init__(self) -> None:
        # A call enters all of its lines in one step. So no two calls wait for each other.
        self._lock = threading.Lock()
        self._last: dict[str, Phase] = {}  # the last phase of each line
        # Calls that have ended and are still in line. Python may delete the coroutine of a call
        # anywhere, also where this thread holds the lock: `end` must not wait for it.
        self._ended: deque[tuple[Turn, Loop]] = deque()

    def __len__(self) -> int:
        return len(self._last)

    def begin(self, groups: Collection[str], loop: Loop, *, is_change: bool) -> tuple[Turn, bool]:
        """Enter a call. Return its turn, and whether it must `wait`. It must `end` in any case.

        ``groups``: without duplicates. ``loop``: the running loop. ``is_change``: the call changes
        the members of the groups.
        """
        turn: Turn = []
        must_wait = False
        if not groups:
            return turn, must_wait
        last = self._last
        with self._lock:
            for group in groups:
                phase = last.get(group)
                if phase is not None and phase.is_change is is_change:
                    phase.calls[loop] = phase.calls.get(loop, 0) + 1
                else:
                    ahead, phase = phase, Phase(group, phase, loop, is_change=is_change)
                    last[group] = phase
                    if ahead is not None:
                        ahead.behind = phase
                if not phase.is_first:
                    must_wait = True
                turn.append(phase)
        if self._ended:
            self._remove_ended()
        return turn, must_wait

    async def wait(self, turn: Turn, deadline: float) -> None:
        """Return when the earlier calls of the other kind have ended, or at the deadline.

        ``deadline``: by time.monotonic(). Calls on loops that do not run are not waited for.
        """
        loop = asyncio.get_running_loop()
        for phase in turn:
            waiter: asyncio.Future[None] = loop.create_future()
            phase.waiters.append(waiter)  # before the check: another thread may change `is_first`
            while not phase.is_first and (left := deadline - time.monotonic()) > 0:
                await asyncio.wait((waiter,), timeout=min(CHECK_INTERVAL, left))
                if not phase.is_first:
                    self._end_stopped(phase)

    def end(self, turn: Turn, loop: Loop) -> None:
        """Let the later calls proceed. ``loop``: as for `begin`. From any thread."""
        if not turn:
            return
        if self._lock.acquire(blocking=False):
            try:
                self._remove(turn, loop)
            finally:
                self._lock.release()
        else:
            self._ended.append((turn, loop))
        if self._ended:
            self._remove_ended()

    def _remove_ended(self) -> None:
        # If another thread has the lock, it removes these calls when it has released the lock.
        while self._ended and self._lock.acquire(blocking=False):
            try:
                while self._ended:
                    self._remove(*self._ended.popleft())
            finally:
                self._lock.release()

    def _remove(self, turn: Turn, loop: Loop) -> None:
        for phase in turn:
            calls = phase.calls.get(loop, 0)  # 0: see `_end_stopped`
            if calls > 1:
                phase.calls[loop] = calls - 1
            elif calls:
                del phase.calls[loop]
                if phase.is_first and not phase.calls:
                    self._advance(phase)

    def _advance(self, first: Phase) -> None:
        """Let the next phase with calls run. ``first``: has no more calls."""
        phase: Phase | None = first
        while phase is not None and not phase.calls:
            behind = phase.behind
            if behind is None:
                del self._last[phase.group]
            else:
                behind.ahead, behind.is_first = None, True
                for waiter in list(behind.waiters):
                    try:
                        waiter.get_loop().call_soon_threadsafe(_resolve, waiter)
                    except RuntimeError:  # the loop is closed: no task waits
                        pass
            phase = behind

    def _end_stopped(self, phase: Phase) -> None:
        """End the calls in the first phase of the line whose loops do not run any more."""
        with self._lock:
            first = phase
            while first.ahead is not None:
                first = first.ahead
            if first is not phase:
                for loop in [loop for loop in first.calls if not loop.is_running()]:
                    del first.calls[loop]
                if not first.calls:
                    self._advance(first)
        self._remove_ended()


def _resolve(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
