"""Bounded queues of the channels that a process reads, and who waits on them. No I/O.

Messages are put by the home loop, and received on any event loop of any thread: each waiter is woken on its
own loop. A waiter is only told to look; the message leaves the mailbox in the step of the program in which
`receive()` returns it, so that a cancellation finds it either still here or handed over.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pg_layer.codec import Template
from pg_layer.inbox import Key

Waiter = asyncio.Future[None]


class Letter(NamedTuple):
    """A message in a mailbox.

    ``payload`` is for `Codec.decode`, ``expires_at`` by the database's clock. ``key`` is that of
    its row, if the row stays until the message is received; a group's message has one row for all,
    deleted at once.
    """

    id: int
    payload: bytes | Template
    expires_at: float
    key: Key | None


class Mailbox:
    """The queue of one channel in its process. Thread-safe."""

    __slots__ = (
        "_letters",
        "_lock",
        "_waiters",
        "_woken",
        "capacity",
        "channel",
        "is_closed",
        "is_receivable",
        "is_retired",
        "is_used",
        "neglected",
        "undeleted",
    )

    def __init__(self, channel: str, capacity: int) -> None:
        self.channel = channel
        self.capacity = capacity
        self.undeleted = 0  # rows of this channel that senders may still count
        self.is_closed = False  # its client has taken leave: nothing comes and goes any more
        self.is_receivable = False  # set once somebody has shown that this process may receive here
        self.is_retired = False  # nobody used it for a while: who found it before is to look for another
        self.neglected = -1  # the largest id of those that have expired here unread
        self.is_used = True  # since the last time somebody asked
        self._letters: deque[Letter] = deque()
        self._waiters: deque[Waiter] = deque()
        self._woken: set[Waiter] = set()  # told to look, and will soon
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._letters)

    @property
    def waiting(self) -> int:
        """How many receivers wait."""
        return len(self._waiters)

    @property
    def missing(self) -> int:
        """How many more letters the receivers could have at once."""
        with self._lock:
            return len(self._waiters) + len(self._woken) - len(self._letters)

    @property
    def is_pressed(self) -> bool:
        """Whether senders may find the channel full, those messages counted that may be on their way here."""
        return 4 * self.undeleted + 32 >= self.capacity

    @property
    def is_filling(self) -> bool:
        """Whether rows are to be deleted without delay, so that senders do not count them for long."""
        return 8 * self.undeleted >= self.capacity

    def put(self, letter: Letter) -> None:
        """Append, and wake a receiver. The caller has seen to the capacity."""
        with self._lock:
            if self.is_closed:
                return
            self._letters.append(letter)
            if self._waiters:
                self._wake_one()

    def put_if_room(
        self, letters: Sequence[Letter], here: asyncio.AbstractEventLoop | None = None
    ) -> Sequence[Letter]:
        """Append as many as there is room for, in their order; returns the rest: what waits keeps its place.

        ``here``: the running loop, from who knows it.
        """
        queue = self._letters
        with self._lock:
            if self.is_closed:
                return ()
            room = max(self.capacity - len(queue), 0)
            fitting = letters if len(letters) <= room else letters[:room]
            queue.extend(fitting)
            for _ in range(min(len(fitting), len(self._waiters))):
                self._wake_one(here)
            return letters[room:]

    def pop(
        self, doomed: dict[Key, Mailbox | None] | None = None, waiter: Waiter | None = None
    ) -> Letter | None:
        """The oldest letter, or None. In the same step its row, if it has one, is noted in ``doomed``.

        ``waiter`` is what `wait` returned: in that step, too, it ceases to be one who could have a letter.
        """
        letters = self._letters
        if not letters and waiter is None:
            return None
        with self._lock:
            if waiter is not None:
                self._forget(waiter)
            if not letters:
                return None
            letter = letters.popleft()
            if doomed is not None and letter.key is not None:
                doomed[letter.key] = self
            return letter

    def close(self) -> None:
        """Drop what waits, and have all receivers look: nothing comes any more."""
        with self._lock:
            self.is_closed = True
            self._letters.clear()
            for _ in range(len(self._waiters)):
                self._wake_one()

    def retire(self) -> bool:
        """Whether nobody has used it since this was last called, nor waits, and nothing lies here."""
        with self._lock:
            if self.is_used or self._waiters or self._letters or self.undeleted:
                self.is_used = False
            else:
                self.is_retired = True
            return self.is_retired

    def pop_all(self) -> list[Letter]:
        """Empty the mailbox."""
        return self._pop_if(lambda letter: True)

    def pop_up_to(self, id: int) -> list[Letter]:
        """Remove and return what was sent before that id."""
        return self._pop_if(lambda letter: letter.id <= id)

    def pop_expired(self, now: float) -> list[Letter]:
        """Remove and return what is past its end."""
        return self._pop_if(lambda letter: letter.expires_at <= now)

    def _pop_if(self, condition: Callable[[Letter], bool]) -> list[Letter]:
        with self._lock:
            popped = [letter for letter in self._letters if condition(letter)]
            if popped:
                kept = [letter for letter in self._letters if not condition(letter)]
                self._letters.clear()
                self._letters.extend(kept)
            return popped

    def pop_idle(self) -> list[Letter]:
        """Empty the mailbox if nobody waits for its letters."""
        with self._lock:
            if self._waiters:
                return []
            letters = list(self._letters)
            self._letters.clear()
            return letters

    def push_front(self, letter: Letter) -> None:
        """Undo a `pop`: the letter is the oldest again."""
        with self._lock:
            self._letters.appendleft(letter)
            if self._waiters:
                self._wake_one()

    async def wait(
        self, timeout: float | None = None, on_wait: Callable[[], None] | None = None
    ) -> Waiter | None:
        """Return when there may be a letter, or after ``timeout`` seconds. Cancellation loses nothing.

        ``on_wait`` is called once this waiter counts as `waiting`. What is returned is for `pop`, at once.
        """
        loop = asyncio.get_running_loop()
        waiter = self.enlist(loop)
        if waiter is None:
            return None
        timer = None if timeout is None else loop.call_later(timeout, _time_out, waiter)
        try:
            if on_wait is not None:
                on_wait()
            await waiter
        except BaseException:
            self.desert(waiter)
            raise
        finally:
            if timer is not None:
                timer.cancel()
        return waiter

    def enlist(self, loop: asyncio.AbstractEventLoop) -> Waiter | None:
        """A future of the running loop to be awaited until there may be a letter; None: look now.

        Awaited, it is for `pop`, at once; else for `desert`.
        """
        waiter = loop.create_future()
        with self._lock:
            if self._letters or self.is_closed or self.is_retired:
                return None
            self.is_used = True
            self._waiters.append(waiter)
        return waiter

    def desert(self, waiter: Waiter) -> None:
        """Wait no more: cancelled."""
        with self._lock:
            # If it was woken it will not look: the next one must.
            if not self._forget(waiter) and self._letters:
                self._wake_one()

    def _forget(self, waiter: Waiter) -> bool:
        """Returns whether it was still waiting, and not woken."""
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
            if self._letters:
                self._wake_one()


def _time_out(waiter: Waiter) -> None:
    if not waiter.done():
        waiter.set_result(None)
