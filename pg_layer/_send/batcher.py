"""Batching without a timer: one write is in flight; later operations are sent together in the next.

An operation that finds the batcher idle is written at once, in its caller's own task. So
batching adds no latency. Under load, fewer and larger statements are sent.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

from pg_layer._process.tasks import Spawn
from pg_layer._process.threads import describe_blocked, describe_silent
from pg_layer.exceptions import LayerUnavailable, NotBegun, OutcomeUnknown

Operation = TypeVar("Operation")

# The outcome of an operation for its caller: the return value, or the exception to raise.
Outcome = object

MAX_OPERATIONS = 500
MAX_BYTES = 1024 * 1024
GRACE = 1.0  # seconds that a caller on a foreign loop waits longer than the write may take
LATE = "The database could not be reached in time; the call did not take effect."
ENDED = "The event loop ended; it is unknown whether the call took effect."


class _Ticket:
    """An operation that waits for its write, or is being written."""

    __slots__ = ("deadline", "future", "is_begun", "is_seen", "loop", "operation")

    def __init__(self, operation: Any, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        self.operation = operation
        self.loop = loop  # the caller's
        self.future: asyncio.Future[Any] = loop.create_future()
        self.deadline = deadline  # by time.monotonic()
        self.is_begun = False  # from here on the operation may have been written
        self.is_seen = False  # the batcher's loop has run since `submit`

    def settle(self, outcome: Outcome, here: asyncio.AbstractEventLoop) -> None:
        """Give the caller its outcome. ``here``: the loop that runs in this thread."""
        if self.loop is here:
            self._resolve(outcome)
            return
        try:
            self.loop.call_soon_threadsafe(self._resolve, outcome)
        except RuntimeError:  # the caller's loop is closed: no task waits
            pass

    def _resolve(self, outcome: Outcome) -> None:
        if self.future.done():
            return
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class Batcher(Generic[Operation]):
    """A queue of operations of one kind, which are written in batches.

    ``loop``: the event loop of the current thread. All writes run on it. `submit` may be
    called on any loop; the other methods are called on this one, or when it does not run.
    ``write``: writes a batch within the given seconds, and returns an outcome for each
    operation. If it raises, each caller in the batch gets the exception.
    ``weigh``: returns the size of an operation in bytes.
    ``timeout``: seconds from `submit` until an operation must have been written.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        write: Callable[[list[Operation], float], Awaitable[Sequence[Outcome]]],
        spawn: Spawn,
        weigh: Callable[[Operation], int],
        timeout: float,
    ) -> None:
        self._loop = loop
        self._thread = threading.current_thread()
        self._write = write
        self._spawn = spawn
        self._weigh = weigh
        self._timeout = timeout
        self._queue: deque[_Ticket] = deque()
        self._is_busy = False
        self._is_spawned = False  # the task that writes the queue has not begun
        self._is_closed = False
        self._became_idle = asyncio.Event()
        # Either the batcher begins to write a ticket, or its caller on a foreign loop has
        # given up before. Without the lock both could happen, and a caller that reads "did
        # not take effect" would have its message sent.
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """The number of operations that wait for the write in flight. From any thread."""
        return len(self._queue)

    async def submit(self, operation: Operation, deadline: float | None = None) -> Any:
        """Write an operation, and return or raise its outcome. May be called on any loop.

        ``deadline``: when it must have been written, by time.monotonic(). Default: after the
        timeout.

        If the caller is cancelled while the operation waits for its batch, the operation is
        not written. If it is cancelled later, the operation may be written.

        Raises `NotBegun` if the batcher is closed before the write begins. If the batcher's
        loop ends, stops or is blocked, raises `OutcomeUnknown` if the write had begun, and
        `LayerUnavailable` if not.
        """
        loop = asyncio.get_running_loop()
        if deadline is None:
            timeout, deadline = self._timeout, time.monotonic() + self._timeout
        else:
            timeout = deadline - time.monotonic()
        if loop is not self._loop:
            return await self._submit_from(loop, operation, deadline)
        if self._is_closed:
            raise NotBegun
        if not self._is_busy:
            self._is_busy = True
            try:
                (outcome,) = await self._write([operation], timeout)
            finally:
                self._write_next()
            if isinstance(outcome, Exception):
                raise outcome
            return outcome
        ticket = _Ticket(operation, loop, deadline)
        self._queue.append(ticket)
        return await ticket.future

    async def _submit_from(
        self, loop: asyncio.AbstractEventLoop, operation: Operation, deadline: float
    ) -> Any:
        """Write an operation for a caller on a foreign loop.

        The caller has a timer of its own: it must not wait for a batcher's loop that stops.
        """
        ticket = _Ticket(operation, loop, deadline)
        timer = loop.call_later(deadline + GRACE - time.monotonic(), self._give_up, ticket)
        try:
            try:
                self._loop.call_soon_threadsafe(self._enqueue, ticket)
            except RuntimeError:  # the batcher's loop is closed
                raise NotBegun from None
            return await ticket.future
        finally:
            timer.cancel()

    def _give_up(self, ticket: _Ticket) -> None:
        """Fail a call that the batcher's loop has not answered in time. On the caller's loop."""
        waited = time.monotonic() - ticket.deadline + self._timeout
        why = (
            describe_silent(self._thread)
            if ticket.is_seen
            else describe_blocked(self._thread, waited)
        )
        with self._lock:
            if ticket.is_begun:
                error: LayerUnavailable = OutcomeUnknown(
                    f"{why} It is unknown whether the call took effect."
                )
            else:
                error = LayerUnavailable(f"{why} The call did not take effect.")
            ticket.settle(error, ticket.loop)

    def _enqueue(self, ticket: _Ticket) -> None:
        """Queue a ticket of a foreign loop."""
        ticket.is_seen = True
        if self._is_closed:
            ticket.settle(NotBegun(), self._loop)
            return
        self._queue.append(ticket)
        if not self._is_busy:  # otherwise the write in flight is followed by the next
            self._is_busy = True
            self._write_next()

    def _write_next(self) -> None:
        """Begin to write the queue, or become idle. The last write has ended."""
        if self._queue and not self._is_closed:
            self._is_spawned = True
            self._spawn("Writing", self._write_queue)
        else:
            self._become_idle()

    def _become_idle(self) -> None:
        self._is_busy = self._is_spawned = False
        self._became_idle.set()

    async def _write_queue(self) -> None:
        self._is_spawned = False
        batch: list[_Ticket] = []
        try:
            while self._queue:
                batch = self._next_batch()
                if not batch:
                    break
                # The first ticket is the oldest, and has the least time left.
                left = batch[0].deadline - time.monotonic()
                try:
                    outcomes = await self._write([ticket.operation for ticket in batch], left)
                    settled = list(zip(batch, outcomes, strict=True))
                except Exception as error:
                    settled = [(ticket, error) for ticket in batch]
                for ticket, outcome in settled:
                    ticket.settle(outcome, self._loop)
                batch = []
                # Let the woken callers run first: their next operations go together. Without
                # this, one operation would be written ahead of the rest.
                await asyncio.sleep(0)
        finally:
            for ticket in batch:  # this task was cancelled in the middle: the loop ends
                ticket.settle(OutcomeUnknown(ENDED), self._loop)
            self._become_idle()
            if self._is_closed:
                self.close()

    def _next_batch(self) -> list[_Ticket]:
        batch: list[_Ticket] = []
        queue, now, weight = self._queue, time.monotonic(), 0
        while queue and len(batch) < MAX_OPERATIONS:
            ticket = queue[0]
            if ticket.future.done():  # its caller was cancelled, or has given up
                queue.popleft()
                continue
            if ticket.deadline <= now:
                queue.popleft().settle(LayerUnavailable(LATE), self._loop)
                continue
            weight += self._weigh(ticket.operation)
            if batch and weight > MAX_BYTES:
                break
            queue.popleft()
            if self._begin(ticket):
                batch.append(ticket)
        return batch

    def _begin(self, ticket: _Ticket) -> bool:
        """Mark a ticket as begun. Return False if its caller does not wait any more."""
        with self._lock:
            ticket.is_begun = not ticket.future.done()
            return ticket.is_begun

    async def finish(self) -> None:
        """Close the batcher, and return when the write in flight has ended."""
        self.close()
        # Do not wait for a task that has not begun: it has nothing to write now, and if it is
        # cancelled before it begins, it never says that it has ended.
        while self._is_busy and not self._is_spawned:
            self._became_idle.clear()
            await self._became_idle.wait()

    def close(self) -> None:
        """Accept no more operations. Those in the queue fail with `NotBegun`.

        The write in flight continues. May be called from any thread if the loop does not run.
        """
        self._is_closed = True
        while self._queue:
            self._queue.popleft().settle(NotBegun(), self._loop)
