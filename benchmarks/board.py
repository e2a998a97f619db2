"""Shared integers by which the processes of a measurement coordinate.

Each slot has a single writer, so no lock is needed. A read costs the reader's event loop nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from multiprocessing.sharedctypes import RawArray
from types import TracebackType

_STOP = 0
_START = 1
_HEAD = 2
#: A pause without messages after the warm-up.
_SETTLE = 0.2


class Board:
    """Shared integers of the runner, the sender and ``readers`` receiving processes."""

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._slots = RawArray("q", _HEAD + 3 * readers)
        self._warmed = _HEAD
        self._delivered = _HEAD + readers
        self._latest = _HEAD + 2 * readers

    def stop(self) -> None:
        """Notify the readers that the measurement is over."""
        self._slots[_STOP] = 1

    @property
    def stopped(self) -> bool:
        return bool(self._slots[_STOP])

    def start(self) -> int:
        """Mark the start of the measurement, in nanoseconds of the shared monotonic clock."""
        now = time.monotonic_ns()
        self._slots[_START] = now
        return now

    @property
    def start_ns(self) -> int:
        return int(self._slots[_START])

    def warm(self, reader: int) -> None:
        """Note that a channel of this reader has received its first warm-up message."""
        self._slots[self._warmed + reader] += 1

    def warmed(self, reader: int) -> int:
        return int(self._slots[self._warmed + reader])

    def deliver(self, reader: int, now: int, count: int = 1) -> None:
        """Note that this reader received ``count`` messages at ``now``. Copies do not count."""
        self._slots[self._delivered + reader] += count
        self._slots[self._latest + reader] = now

    def delivered(self, reader: int) -> int:
        return int(self._slots[self._delivered + reader])

    @property
    def deliveries(self) -> int:
        return sum(self.delivered(reader) for reader in range(self.readers))

    @property
    def latest_ns(self) -> int:
        """Return when the last delivery was, 0 before the first."""
        return max(
            (int(self._slots[self._latest + reader]) for reader in range(self.readers)), default=0
        )


async def warm_up(
    board: Board,
    wanted: Sequence[int],
    send: Callable[[], Awaitable[None]],
    *,
    time_limit: float = 20.0,
) -> None:
    """Wait until ``wanted[i]`` channels of each reader ``i`` have received a warm-up message.

    ``send`` is repeated, because a layer may lose messages that are sent before its subscription is
    active. Its surplus messages have a moment to arrive, so that they are not part of the
    measurement.
    """
    end = time.monotonic() + time_limit
    while True:
        await send()
        next_try = min(time.monotonic() + 0.25, end)
        while time.monotonic() < next_try:
            if all(board.warmed(reader) >= count for reader, count in enumerate(wanted)):
                await asyncio.sleep(_SETTLE)
                return
            await asyncio.sleep(0.005)
        if time.monotonic() >= end:
            heard = [board.warmed(reader) for reader in range(board.readers)]
            raise TimeoutError(
                f"no message reached all channels in {time_limit:g} s: {heard} of {list(wanted)}"
            )


class Window:
    """A limit of ``size`` messages in flight between the sender's tasks and the readers.

    ``arrived`` returns how many messages have certainly arrived. If nothing arrives for ``timeout``
    seconds, the messages in flight count as lost and free their capacity. Otherwise a layer that
    loses messages would block its sender.
    """

    def __init__(self, size: int, arrived: Callable[[], int], *, timeout: float = 2.0) -> None:
        self.written_off = 0
        self._size = size
        self._arrived = arrived
        self._timeout = timeout
        self._sent = 0
        self._seen = 0
        self._progress = 0.0
        self._room = asyncio.Event()
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Window:
        self._progress = time.monotonic()
        self._watch = asyncio.create_task(self._watching())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._watch is not None:
            self._watch.cancel()
            with suppress(asyncio.CancelledError):
                await self._watch

    async def take(self) -> None:
        """Wait until one more message may be in flight."""
        while self._sent - self.written_off - self._seen >= self._size:
            self._room.clear()
            await self._room.wait()
        self._sent += 1

    async def _watching(self) -> None:
        while True:
            await asyncio.sleep(0.001)
            now = time.monotonic()
            arrived = self._arrived()
            if arrived > self._seen:
                self._seen, self._progress = arrived, now
                self._room.set()
            elif now - self._progress > self._timeout:
                self.written_off = max(self._sent - self._seen, 0)
                self._progress = now
                self._room.set()
