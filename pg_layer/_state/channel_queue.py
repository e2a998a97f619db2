"""Bounded queues of the channels that a process reads, and who waits on them. Pure.

The owner loop puts messages; `receive()` takes them on any event loop of any thread, and each waiter is
woken on its own loop. A waiter is only told to look: the message leaves the queue in the step of the program
in which `receive()` returns it, so that a cancellation finds it either still here or handed over.
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

    ``payload`` is for `Codec.decode`, ``expires_at`` by the database's clock. ``key`` is that of its row,
    if the row is deleted when the message is received.
    """

    payload: bytes | Template
    expires_at: float
    key: Key | None


class ChannelQueue:
    """The queue of one channel in its process. Thread-safe."""

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
        self.undeleted = 0  # rows of this channel that senders may still count
        self.is_closed = is_closed  # the client has closed: nothing comes and goes any more
        self.is_receivable = False  # `receive()` has checked that this process may receive here
        self.is_retired = (
            False  # unused for a while: a caller that found it before must get another
        )
        self.is_stalled = (
            True  # its reader has not shown that it keeps up: dispatch does not wait for it
        )
        self.is_used = True  # since the last time that `retire` was called
        self._messages: deque[QueuedMessage] = deque()
        self._waiters: deque[Waiter] = deque()
        self._woken: set[Waiter] = set()  # told to look, and will soon
        self._space_waiters: list[Waiter] = []
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def waiting(self) -> int:
        """How many receivers wait."""
        return len(self._waiters)

    @property
    def demand(self) -> int:
        """How many more messages the receivers could have at once."""
        with self._lock:
            return len(self._waiters) + len(self._woken) - len(self._messages)

    @property
    def is_pressed(self) -> bool:
        """Whether senders may find the channel full, with messages that may be on their way here."""
        return 4 * self.undeleted + 32 >= self.capacity

    @property
    def is_filling(self) -> bool:
        """Whether rows must be deleted without delay, so that senders do not count them for long."""
        return 8 * self.undeleted >= self.capacity

    # ------------------------------------------------------------------ state

    def note_use(self) -> None:
        """Keep the queue when `retire` is called next."""
        self.is_used = True

    def allow_receive(self) -> None:
        """Note that `receive()` has checked that this process may receive here."""
        self.is_receivable = True

    def mark_stalled(self) -> None:
        """Have dispatch not wait for this queue until its reader has taken messages."""
        self.is_stalled = True

    def count_row(self) -> None:
        """Count a row of this channel that senders may still count. On the owner loop."""
        self.undeleted += 1

    def uncount_rows(self, count: int) -> None:
        """Count rows of this channel no more. On the owner loop."""
        self.undeleted -= count

    # ------------------------------------------------------------------ putting

    def put(self, message: QueuedMessage) -> None:
        """Append, and wake a receiver. The sender has counted the capacity."""
        with self._lock:
            if self.is_closed:
                return
            self._messages.append(message)
            if self._waiters:
                self._wake_one()

    def put_fitting(
        self, messages: Sequence[QueuedMessage], here: asyncio.AbstractEventLoop | None = None
    ) -> Sequence[QueuedMessage]:
        """Append as many as there is room for, in their order. Return the rest.

        ``here``: the running loop, from a caller that knows it.
        """
        queue = self._messages
        with self._lock:
            if self.is_closed:
                return ()
            room = max(self.capacity - len(queue), 0)
            fitting = messages if len(messages) <= room else messages[:room]
            queue.extend(fitting)
            for _ in range(min(len(fitting), len(self._waiters))):
                self._wake_one(here)
            return messages[room:]

    def half_free(self, loop: asyncio.AbstractEventLoop) -> Waiter:
        """A future of the running loop: resolved when half of the queue is free."""
        waiter = loop.create_future()
        with self._lock:
            if 2 * len(self._messages) <= self.capacity or self.is_closed:
                waiter.set_result(None)
            else:
                self._space_waiters.append(waiter)
        return waiter

    def push_front(self, message: QueuedMessage) -> None:
        """Undo a `pop`: the message is the oldest again."""
        with self._lock:
            self._messages.appendleft(message)
            if self._waiters:
                self._wake_one()

    # ------------------------------------------------------------------ taking

    def pop(
        self, deletes: dict[Key, ChannelQueue | None] | None = None, waiter: Waiter | None = None
    ) -> QueuedMessage | None:
        """The oldest message, or None. In the same step its row, if it has one, is noted in ``deletes``.

        ``waiter``: what `wait` returned. In the same step it stops counting as waiting.
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
        """Remove and return what has expired."""
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
        """Empty the queue if nobody waits for its messages."""
        with self._lock:
            if self._waiters or any(waiter.get_loop().is_running() for waiter in self._woken):
                return []
            messages = list(self._messages)
            self._messages.clear()
            return messages

    def keys(self) -> list[Key]:
        """The keys of the messages that have one."""
        with self._lock:
            return [message.key for message in self._messages if message.key is not None]

    # ------------------------------------------------------------------ its life

    def close(self) -> None:
        """Drop what waits, and have all receivers look: nothing comes any more."""
        with self._lock:
            self.is_closed = True
            self._messages.clear()
            self._wake_space_waiters()
            for _ in range(len(self._waiters)):
                self._wake_one()

    def retire(self) -> bool:
        """Whether it is unused since the last call, nobody waits, and nothing lies here."""
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
        """Return when there may be a message, or after ``timeout`` seconds. Cancellation loses nothing.

        ``on_wait`` is called once this waiter counts as `waiting`. Give what is returned to `pop`, at once.
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
        """A future of the running loop, resolved when there may be a message; None: look now.

        After awaiting it, give it to `pop`, at once; otherwise to `desert`.
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
        """Stop waiting: cancelled."""
        with self._lock:
            # If it was woken it will not look: the next one must.
            if not self._forget(waiter) and self._messages:
                self._wake_one()

    def _forget(self, waiter: Waiter) -> bool:
        """Return whether it was still waiting, and not woken."""
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
            except RuntimeError:  # that loop was closed: nobody waits there any more
                continue
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
            except RuntimeError:  # that loop was closed: it dispatches no more
                pass


def _resolve(waiter: Waiter) -> None:
    if not waiter.done():
        waiter.set_result(None)
