"""The order of the calls of this process that concern one group: ``docs/protocols.md``, section 4.

A call that uses the members of a group (a *use*: `group_send`, `group_channels` and the like) waits
for the changes that began before it. A change waits for nothing. No I/O.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Collection

from pg_layer._process.threads import CHECK_INTERVAL
from pg_layer.exceptions import LayerUnavailable

# Seconds that a use must have left when it goes. With less its statement may be cut short, and
# nobody would know whether it took effect.
LEAST_LEFT = 0.1

Loop = asyncio.AbstractEventLoop


class Call:
    """A change that has not ended, or a use that waits.

    ``waiter``: None for a change. Otherwise it gets whether the use may go.
    ``ahead``: the number of lines in which other calls are ahead of the use.
    """

    __slots__ = ("ahead", "groups", "loop", "waiter")

    def __init__(
        self, groups: Collection[str], loop: Loop, waiter: asyncio.Future[bool] | None = None
    ) -> None:
        self.groups = groups
        self.loop = loop  # the caller's
        self.waiter = waiter
        self.ahead = 0


class GroupOrder:
    """A line of calls for each group with a change that has not ended. Thread-safe.

    A use may go when it is the first in the lines of all its groups. So the uses that wait keep
    their order, too.
    """

    def __init__(self) -> None:
        # A use enters all of its lines in one step. So no two calls wait for each other.
        self._lock = threading.Lock()
        self._lines: dict[str, OrderedDict[Call, None]] = {}
        self._changes: dict[Loop, set[Call]] = {}  # those in line, by the loop of the caller
        # How many uses may go and have not continued yet. Later ones must not overtake them.
        self._leaving: dict[Loop, int] = {}
        # Calls that have ended and have not been removed. Python may delete the coroutine of a call
        # anywhere, also where this thread holds the lock: `end` must not wait for it.
        self._ended: deque[Call] = deque()

    def __len__(self) -> int:
        """Return 0 if no call is in line or about to leave: then no use needs to `wait`."""
        return len(self._lines) + len(self._leaving)

    def begin(self, group: str, loop: Loop) -> Call:
        """Enter a change. It must `end` in any case. ``loop``: the running loop."""
        change = Call((group,), loop)
        with self._lock:
            line = self._lines.get(group)
            if line is None:
                line = self._lines[group] = OrderedDict()
            line[change] = None
            self._changes.setdefault(loop, set()).add(change)
        self._remove_ended()
        return change

    def end(self, call: Call) -> None:
        """Let the uses behind a call proceed. From any thread, also in a finaliser."""
        self._ended.append(call)
        self._remove_ended()

    async def wait(self, groups: Collection[str], timeout: float) -> float:
        """Wait for the changes of these groups that began before. Return the caller's deadline.

        ``groups``: without duplicates. ``timeout``: the seconds that the caller has, this wait
        included. Calls on loops that do not run are not waited for.

        Raises `LayerUnavailable` if too little of the time is left.
        """
        loop = asyncio.get_running_loop()
        begun_at = time.monotonic()
        deadline = begun_at + timeout
        latest = deadline - min(LEAST_LEFT, timeout / 2)
        waiter: asyncio.Future[bool] = loop.create_future()
        use = self._enter(Call(groups, loop, waiter))
        if use is None:
            return deadline
        timer: asyncio.TimerHandle

        def look() -> None:
            """End the wait if it is time to. Let the use go if only stopped loops hold it."""
            nonlocal timer
            left = latest - time.monotonic()
            if left <= 0 and not waiter.done():
                waiter.set_result(False)
            if len(self._changes) > (loop in self._changes):  # other loops have changes in line
                self._end_stopped()
                left = min(left, CHECK_INTERVAL)
            timer = loop.call_later(left, look)

        look()
        try:
            may_go = await waiter
        finally:
            timer.cancel()
            self.end(use)
        now = time.monotonic()
        if not may_go or now >= latest:
            raise LayerUnavailable(
                f"The call waited for {now - begun_at:.1f} s for earlier calls of group_add and"
                " group_discard in this process, which concern the same group and have not"
                " returned. It did not take effect."
            )
        return deadline

    def _enter(self, use: Call) -> Call | None:
        """Enter a use. Return None if it need not wait."""
        entered: Call | None = use
        with self._lock:
            if self._lines.keys().isdisjoint(use.groups):
                if use.loop in self._leaving:
                    self._let_go(use)
                else:
                    entered = None
            else:
                for group in use.groups:
                    line = self._lines.get(group)
                    if line is None:
                        self._lines[group] = OrderedDict(((use, None),))
                    else:
                        line[use] = None
                        use.ahead += 1
        self._remove_ended()
        return entered

    def _remove_ended(self) -> None:
        # If another thread has the lock, it removes these calls when it has released the lock.
        while self._ended and self._lock.acquire(blocking=False):
            try:
                while self._ended:
                    self._remove(self._ended.popleft())
            finally:
                self._lock.release()

    def _remove(self, call: Call) -> None:
        loop = call.loop
        if call.waiter is None:
            changes = self._changes.get(loop, set())
            if call in changes:  # otherwise see `_end_stopped`
                changes.remove(call)
                if not changes:
                    del self._changes[loop]
                self._leave(call)
        elif call.ahead:
            self._leave(call)  # it was cancelled, or has waited for too long
        else:
            self._leaving[loop] -= 1
            if not self._leaving[loop]:
                del self._leaving[loop]

    def _leave(self, call: Call) -> None:
        """Take a call out of its lines, and let the uses go that are the first then."""
        leaving = [call]
        while leaving:
            call = leaving.pop()
            for group in call.groups:
                line = self._lines[group]
                was_first = next(iter(line)) is call
                del line[call]
                if not line:
                    del self._lines[group]
                elif was_first and (first := next(iter(line))).waiter is not None:
                    first.ahead -= 1
                    if not first.ahead:
                        self._let_go(first)
                        leaving.append(first)

    def _let_go(self, use: Call) -> None:
        # Always by call_soon: so the uses of one loop continue in this order.
        self._leaving[use.loop] = self._leaving.get(use.loop, 0) + 1
        try:
            use.loop.call_soon_threadsafe(_resume, use)
        except RuntimeError:  # the loop is closed: no task waits
            pass

    def _end_stopped(self) -> None:
        """Remove the changes whose loops do not run."""
        with self._lock:
            for loop in [each for each in self._changes if not each.is_running()]:
                for change in list(self._changes[loop]):
                    self._remove(change)
        self._remove_ended()


def _resume(use: Call) -> None:
    if use.waiter is not None and not use.waiter.done():
        use.waiter.set_result(True)
