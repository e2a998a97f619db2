"""Natural batching: one write in flight, what comes meanwhile goes together in the next.

No timer and so no added latency: an operation on an idle batcher goes at once, in its caller's own task. Under
load the number of statements falls by the size of the batches.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Generic, TypeVar

from pg_layer._process.tasks import Spawn
from pg_layer._process.threads import held_up, silent
from pg_layer.exceptions import LayerUnavailable, NotBegun, OutcomeUnknown

Operation = TypeVar("Operation")

MAX_OPS = 500
GRACE = 1.0  # seconds that a caller on another loop waits longer than the write may take
LATE = "The database could not be reached in time; the call did not take effect."
ENDED = "The event loop ended; it is unknown whether the call took effect."
MAX_BYTES = 1024 * 1024

# What became of an operation: what its caller is to be returned, or the exception he gets.
Outcome = object


class _Ticket:
    """An operation that waits for its write, or is being written."""

    __slots__ = ("deadline", "future", "is_begun", "is_seen", "loop", "operation")

    def __init__(self, operation: Any, loop: asyncio.AbstractEventLoop, deadline: float) -> None:
        self.operation = operation
        self.loop = loop
        self.future: asyncio.Future[Any] = loop.create_future()
        self.deadline = deadline  # by time.monotonic()
        self.is_begun = False  # it may have been written from here on
        self.is_seen = False  # the batcher's loop has run since

    def settle(self, outcome: Outcome, here: asyncio.AbstractEventLoop) -> None:
        if self.loop is here:
            self._resolve(outcome)
            return
        try:
            self.loop.call_soon_threadsafe(self._resolve, outcome)
        except RuntimeError:  # the caller's loop is closed: nobody waits
            pass

    def _resolve(self, outcome: Outcome) -> None:
        if self.future.done():
            return
        if isinstance(outcome, Exception):
            self.future.set_exception(outcome)
        else:
            self.future.set_result(outcome)


class Batcher(Generic[Operation]):
    """A queue of operations of one kind, written in batches, each caller told its own outcome.

    ``write`` takes a batch and the seconds it may take, and returns an outcome for each operation; if it
    raises, that is the outcome of all. No operation waits longer than ``timeout`` seconds from `submit` on.
    ``weigh`` gives the bytes of an operation.

    Lives on ``loop``, which runs in this thread; `submit` may be called on any. A guest on another loop may
    be let write an operation itself, which saves two changes of thread; ``write`` raises `NotBegun` where
    that cannot be done.
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
        # Guards the next three, as a guest may begin and end a write on any thread; and whether a ticket
        # begins or is given up.
        self._lock = threading.Lock()
        self._is_busy = False
        self._is_guests = False
        self._closed = False
        self._late: asyncio.TimerHandle | None = None
        self._rested = asyncio.Event()

    @property
    def waiting(self) -> int:
        """How many operations wait for the write in flight. From any thread."""
        return len(self._queue)

    async def submit(self, operation: Operation, *, may_write: bool = False) -> Any:
        """Write ``operation``; when it is committed, returns or raises its own outcome.

        ``may_write``: this loop, if it is another, will not stop before what it has begun has ended or was
        cancelled. Cancelled while it waits for its batch, it is not written; cancelled later, it may be.
        Raises `NotBegun` if the batcher was closed before; if its loop ended, stopped or was blocked,
        `OutcomeUnknown` if ``operation`` was being written, and `LayerUnavailable` if not.
        """
        loop = asyncio.get_running_loop()
        deadline = time.monotonic() + self._timeout
        is_here = loop is self._loop
        may_have_begun = False
        if is_here and self._closed:
            raise NotBegun
        if (is_here or may_write) and not self._is_busy and self._try_begin(is_guests=not is_here):
            try:
                (outcome,) = await self._write([operation], self._timeout)
            except NotBegun as error:
                if is_here:
                    raise
                may_have_begun = error.may_have_begun
            else:
                if isinstance(outcome, Exception):
                    raise outcome
                return outcome
            finally:
                self._continue(is_here)
        ticket = _Ticket(operation, loop, deadline)
        if is_here:
            self._enqueue(ticket)
            return await ticket.future
        # Another loop's caller must not hang on a loop that stops: it has a timer of its own.
        timer = loop.call_later(deadline + GRACE - time.monotonic(), self._give_up_on, ticket)
        try:
            try:
                self._loop.call_soon_threadsafe(self._enqueue, ticket)
            except RuntimeError:
                raise NotBegun from None
            return await ticket.future
        except (LayerUnavailable, NotBegun) as error:
            if may_have_begun:
                raise OutcomeUnknown from error
            raise
        finally:
            timer.cancel()

    def _give_up_on(self, ticket: _Ticket) -> None:
        """The batcher's loop has not answered in time. On the caller's loop."""
        waited = time.monotonic() - ticket.deadline + self._timeout
        why = silent(self._thread) if ticket.is_seen else held_up(self._thread, waited)
        with self._lock:
            if ticket.is_begun:
                error: LayerUnavailable = OutcomeUnknown(
                    f"{why} It is unknown whether the call took effect."
                )
            else:
                error = LayerUnavailable(f"{why} The call did not take effect.")
            ticket.settle(error, ticket.loop)

    def _begin(self, ticket: _Ticket) -> bool:
        """The ticket is about to be written. Return whether its caller still waits."""
        with self._lock:
            ticket.is_begun = not ticket.future.done()
            return ticket.is_begun

    def _try_begin(self, *, is_guests: bool = False) -> bool:
        with self._lock:
            if self._is_busy or self._closed:
                return False
            self._is_guests = is_guests  # first: who sees the batcher busy sees whose write it is
            self._is_busy = True
            return True

    def _enqueue(self, ticket: _Ticket) -> None:
        ticket.is_seen = True
        if self._closed:
            ticket.settle(NotBegun(), self._loop)
            return
        self._queue.append(ticket)
        # Who writes looks at the queue once more when he has done.
        if self._is_busy and not self._is_guests:
            return
        if self._try_begin():
            self._work_or_rest()
        elif self._is_guests and self._late is None:
            self._late = self._loop.call_later(self._timeout, self._give_up)

    def _give_up(self) -> None:
        """A guest's loop is held up in the middle of its write: nobody waits for it longer than he would."""
        self._late = None
        now = time.monotonic()
        while self._queue and self._queue[0].deadline <= now:
            self._queue.popleft().settle(LayerUnavailable(LATE), self._loop)
        if self._queue and self._is_guests:
            self._late = self._loop.call_later(self._queue[0].deadline - now, self._give_up)

    def _continue(self, is_here: bool) -> None:
        """The write in flight has ended: begin the next or rest."""
        if is_here:
            self._work_or_rest()
            return
        with self._lock:
            # Who enqueues finds the batcher busy before, and free after.
            if not self._queue and not self._closed:
                self._is_busy = False
                return
        try:
            self._loop.call_soon_threadsafe(self._work_or_rest)
        except RuntimeError:  # its loop is closed, and with it the batcher
            self._is_busy = False

    def _work_or_rest(self) -> None:
        if self._queue and not self._closed:
            self._spawn("Writing", self._work)
        else:
            self._rest()

    def _rest(self) -> None:
        self._is_busy = False
        self._rested.set()

    async def _work(self) -> None:
        batch: list[_Ticket] = []
        try:
            while self._queue:
                batch = self._next_batch()
                if not batch:
                    break
                # The oldest is first, and has the least time left.
                left = batch[0].deadline - time.monotonic()
                try:
                    outcomes = await self._write([ticket.operation for ticket in batch], left)
                    settled = list(zip(batch, outcomes, strict=True))
                except Exception as error:
                    settled = [(ticket, error) for ticket in batch]
                for ticket, outcome in settled:
                    ticket.settle(outcome, self._loop)
                batch = []
                # Those callers come first: what they send next goes together, not one ahead of the rest.
                await asyncio.sleep(0)
        finally:
            for ticket in batch:  # cancelled in the middle: the loop ends
                ticket.settle(
                    OutcomeUnknown(ENDED),
                    self._loop,
                )
            self._rest()
            if self._closed:
                self.close()

    def _next_batch(self) -> list[_Ticket]:
        batch: list[_Ticket] = []
        queue, now, weight = self._queue, time.monotonic(), 0
        while queue and len(batch) < MAX_OPS:
            ticket = queue[0]
            if ticket.future.done():  # its caller was cancelled
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

    async def guest_finishes(self) -> None:
        """Returns when no guest writes any more. The batcher was closed."""
        while self._is_busy and self._is_guests:
            self._rested.clear()
            await self._rested.wait()

    async def finish(self) -> None:
        """Take no more; returns when the write in flight has ended."""
        self.close()
        while self._is_busy:
            self._rested.clear()
            await self._rested.wait()

    def close(self) -> None:
        """Take no more; what waits fails with `NotBegun`."""
        if self._late is not None:
            self._late.cancel()
            self._late = None
        with self._lock:
            self._closed = True
        while self._queue:
            self._queue.popleft().settle(NotBegun(), self._loop)
