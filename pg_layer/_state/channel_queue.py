"""Bounded queues of the channels that a process reads, and their receivers.

The owner loop puts messages. `receive()` takes them on any event loop of any thread, and a
receiver is woken on its own loop. A receiver that is woken only checks the queue again. The message
leaves the queue in the same step of the program in which `receive()` returns it. So a cancelled
`receive()` leaves the message in the queue, or has returned it. No I/O.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pg_layer._messages.codec import Template
from pg_layer._messages.rows import Key

Waiter = asyncio.Future[None]


class QueuedMessage(NamedTuple):
    """A message in a channel queue.

    ``payload``: what `Codec.decode` takes. ``expires_at``: seconds since 1970 by the
    database's clock. ``key``: the key of the message's row, if the row must be deleted when
    the message is received.
    """

    payload: bytes | Template
    expires_at: float
    key: Key | None


class ChannelQueue:
    """The queue of one channel in the process that reads it. Thread-safe.

    A receiver waits in one of two ways: `wait`; or `add_waiter`, then `pop`, or
    `remove_waiter` if it is cancelled.
    """

    __slots__ = (
        "_lock",
        "_messages",
        "_space_waiters",
        "_waiters",
        "_woken",
        "capacity",
        "channel",
        "is_closed",
        "is_receivable",
        "is_retired",
        "is_stalled",
        "is_used",
        "undeleted",
    )

    def __init__(self, channel: str, capacity: int, *, is_closed: bool = False) -> None:
        self.channel = channel
        self.capacity = capacity
        # Rows of this channel in the table: senders may still count them.
        self.undeleted = 0
        # The client has closed: no message is queued or delivered any more.
        self.is_closed = is_closed
        # `receive()` has checked that this process may receive here.
        self.is_receivable = False
        # Unused for a while, and dropped: a caller that holds it must get another queue.
        self.is_retired = False
        # The reader has not shown that it keeps up: dispatch does not wait for it.
        self.is_stalled = True
        # Since the last call of `retire`.
        self.is_used = True
        self._messages: deque[QueuedMessage] = deque()
        self._waiters: deque[Waiter] = deque()
        self._woken: set[Waiter] = set()  # woken, and about to look
        self._space_waiters: list[Waiter] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def waiting(self) -> int:
        """How many receivers wait and are not woken."""
        return len(self._waiters)

    @property
    def demand(self) -> int:
        """How many more messages the receivers would take at once; may be negative."""
        with self._lock:
            return len(self._waiters) + len(self._woken) - len(self._messages)

    @property
    def is_pressed(self) -> bool:
        """Whether senders may find the channel full: a quarter of the capacity is used.

        Eight rows are added for messages that may be on their way here.
        """
        return 4 * self.undeleted + 32 >= self.capacity

    @property
    def is_filling(self) -> bool:
        """Whether rows must be deleted at once, so that senders do not count them."""
        return 8 * self.undeleted >= self.capacity

    # ------------------------------------------------------------------ state

    def note_use(self) -> None:
        """Make the next call of `retire` keep the queue."""
        self.is_used = True

    def allow_receive(self) -> None:
        """Note that `receive()` has checked the channel: this process may receive here."""
        self.is_receivable = True

    def mark_stalled(self) -> None:
        """Mark the queue as stalled: dispatch does not wait until its reader has taken messages."""
        self.is_stalled = True

    def count_row(self) -> None:
        """Count a row of this channel that senders may still count. On the owner loop."""
        self.undeleted += 1

    def uncount_rows(self, count: int) -> None:
        """Count rows of this channel no more. On the owner loop."""
        self.undeleted -= count

    # ------------------------------------------------------------------ putting

    def put(self, message: QueuedMessage) -> None:
        """Append a message and wake a receiver.

        The capacity is not checked here: the sender has counted the rows of the channel.
        """
        with self._lock:
            if self.is_closed:
                return
            self._messages.append(message)
            if self._waiters:
                self._wake_one()

    def put_fitting(
        self, messages: Sequence[QueuedMessage], here: asyncio.AbstractEventLoop | None = None
    ) -> Sequence[QueuedMessage]:
        """Append as many messages as the capacity allows. Return the rest.

        ``here``: the running loop, if the caller knows it.
        """
        queue = self._messages
        with self._lock:
            if self.is_closed:
                return ()
            free = max(self.capacity - len(queue), 0)
            fitting = messages if len(messages) <= free else messages[:free]
            queue.extend(fitting)
            for _ in range(min(len(fitting), len(self._waiters))):
                self._wake_one(here)
            return messages[free:]

    def half_free(self, loop: asyncio.AbstractEventLoop) -> Waiter:
        """Return a future of this loop that is resolved when half the queue is free."""
        waiter = loop.create_future()
        with self._lock:
            if 2 * len(self._messages) <= self.capacity or self.is_closed:
                waiter.set_result(None)
            else:
                self._space_waiters.append(waiter)
        return waiter

    def push_front(self, message: QueuedMessage) -> None:
        """Put a message back as the oldest one, and wake a receiver."""
        with self._lock:
            self._messages.appendleft(message)
            if self._waiters:
                self._wake_one()

    # ------------------------------------------------------------------ taking

    def pop(
        self, deletes: dict[Key, ChannelQueue | None] | None = None, waiter: Waiter | None = None
    ) -> QueuedMessage | None:
        """Remove and return the oldest message, or return None.

        ``deletes``: the key of the message's row, if it has one, is put here in the same
        step, so that a cancellation cannot separate the two.
        ``waiter``: what `wait` or `add_waiter` returned. It counts as waiting until this step.
        """
        messages = self._messages
        if not messages and waiter is None:
            return None
        with self._lock:
            if waiter is not None:
                self._forget(waiter)
            if not messages:
                return None
            message = messages.popleft()
            if self.is_stalled and 2 * len(messages) <= self.capacity:
                self.is_stalled = False
            if self._space_waiters and 2 * len(messages) <= self.capacity:
                self._wake_space_waiters()
            if deletes is not None and message.key is not None:
                deletes[message.key] = self
            return message

    def pop_all(self) -> list[QueuedMessage]:
        """Empty the queue."""
        return self._pop_if(lambda message: True)

    def pop_expired(self, now: float) -> list[QueuedMessage]:
        """Remove and return the messages that have expired."""
        return self._pop_if(lambda message: message.expires_at <= now)

    def _pop_if(self, condition: Callable[[QueuedMessage], bool]) -> list[QueuedMessage]:
        with self._lock:
            popped = [message for message in self._messages if condition(message)]
            if popped:
                kept = [message for message in self._messages if not condition(message)]
                self._messages.clear()
                self._messages.extend(kept)
                if 2 * len(kept) <= self.capacity:
                    self._wake_space_waiters()
            return popped

    def pop_idle(self) -> list[QueuedMessage]:
        """Empty the queue, and return its messages, if no receiver will take them.

        A woken receiver does not count if its loop has stopped: it will not look.
        """
        with self._lock:
            if self._waiters or any(waiter.get_loop().is_running() for waiter in self._woken):
                return []
            messages = list(self._messages)
            self._messages.clear()
            return messages

    def keys(self) -> list[Key]:
        """Return the keys of the messages that have one."""
        with self._lock:
            return [message.key for message in self._messages if message.key is not None]

    # ------------------------------------------------------------------ its life

    def close(self) -> None:
        """Drop all messages, and wake all receivers: no message arrives any more."""
        with self._lock:
            self.is_closed = True
            self._messages.clear()
            self._wake_space_waiters()
            for _ in range(len(self._waiters)):
                self._wake_one()

    def retire(self) -> bool:
        """Retire the queue if it can be dropped. Return whether it is retired.

        It can be if it was not used since the last call, no receiver waits, and it has no
        messages or undeleted rows.
        """
        with self._lock:
            if self.is_used or self._waiters or self._messages or self.undeleted:
                self.is_used = False
            else:
                self.is_retired = True
            return self.is_retired

    # ------------------------------------------------------------------ waiting

    async def wait(
        self, timeout: float | None = None, on_wait: Callable[[], None] | None = None
    ) -> Waiter | None:
        """Return when there may be a message, or after ``timeout`` seconds.

        Give the returned waiter to `pop`, at once. A cancellation loses no message.
        ``on_wait``: called when this receiver counts as `waiting`.
        """
        loop = asyncio.get_running_loop()
        waiter = self.add_waiter(loop)
        if waiter is None:
            return None
        timer = None if timeout is None else loop.call_later(timeout, _resolve, waiter)
        try:
            if on_wait is not None:
                on_wait()
            await waiter
        except BaseException:
            self.remove_waiter(waiter)
            raise
        finally:
            if timer is not None:
                timer.cancel()
        return waiter

    def add_waiter(self, loop: asyncio.AbstractEventLoop) -> Waiter | None:
        """Return a future of this loop that is resolved when a message may be there.

        Return None if the caller must look now. Otherwise await the future, and give it to
        `pop` at once, or to `remove_waiter` if the caller is cancelled.
        """
        waiter = loop.create_future()
        with self._lock:
            self.is_stalled = False
            if self._messages or self.is_closed or self.is_retired:
                return None
            self.is_used = True
            self._waiters.append(waiter)
        return waiter

    def remove_waiter(self, waiter: Waiter) -> None:
        """Stop waiting, because the receiver was cancelled."""
        with self._lock:
            # A woken receiver that does not look would leave the message: wake the next one.
            if not self._forget(waiter) and self._messages:
                self._wake_one()

    def _forget(self, waiter: Waiter) -> bool:
        """Forget a waiter. Return whether it was still waiting, and not woken."""
        if waiter in self._woken:
            self._woken.discard(waiter)
            return False
        try:
            self._waiters.remove(waiter)
        except ValueError:
            return False
        return True

    def _wake_one(self, here: asyncio.AbstractEventLoop | None = None) -> None:
        here = here or asyncio._get_running_loop()
        while self._waiters:
            waiter = self._waiters.popleft()
            loop = waiter.get_loop()
            if loop is here:
                if waiter.done():
                    continue
                self._woken.add(waiter)
                waiter.set_result(None)
                return
            try:
                loop.call_soon_threadsafe(self._wake_there, waiter)
            except RuntimeError:  # its loop was closed: the receiver is gone
                continue
            # A loop that has stopped may run again or not: wake the next receiver as well.
            if loop.is_running():
                self._woken.add(waiter)
                return

    def _wake_there(self, waiter: Waiter) -> None:
        if not waiter.done():
            waiter.set_result(None)
            return
        with self._lock:
            if self._messages:
                self._wake_one()

    def _wake_space_waiters(self) -> None:
        waiters, self._space_waiters = self._space_waiters, []
        for waiter in waiters:
            try:
                waiter.get_loop().call_soon_threadsafe(_resolve, waiter)
            except RuntimeError:  # its loop was closed: it dispatches no more
                pass


def _resolve(waiter: Waiter) -> None:
    if not waiter.done():
        waiter.set_result(None)
