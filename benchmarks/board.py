"""What the processes of one measurement tell each other while it runs: a few shared integers, no messages.

Each slot has a single writer, so no lock is needed, and reading it costs the reader's event loop nothing.
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
#: After the warm-up: a moment without messages.
_SETTLE = 0.2


class Board:
    """Shared by the runner, the sender and ``readers`` receiving processes, which get it at their start."""

    def __init__(self, readers: int) -> None:
        self.readers = readers
        self._slots = RawArray("q", _HEAD + 3 * readers)
        self._warmed = _HEAD
        self._delivered = _HEAD + readers
        self._latest = _HEAD + 2 * readers

    def stop(self) -> None:
        """Tell the readers that the measurement is over."""
        self._slots[_STOP] = 1

    @property
    def stopped(self) -> bool:
        return bool(self._slots[_STOP])

    def start(self) -> int:
        """Mark the start of the measurement, in nanoseconds of the monotonic clock, which all share."""
        now = time.monotonic_ns()
        self._slots[_START] = now
        return now

    @property
    def start_ns(self) -> int:
        return int(self._slots[_START])

    def warm(self, reader: int) -> None:
        """A channel of this reader has heard its first warm-up message."""
        self._slots[self._warmed + reader] += 1

    def warmed(self, reader: int) -> int:
        return int(self._slots[self._warmed + reader])

    def deliver(self, reader: int, now: int, count: int = 1) -> None:
        """This reader was handed a message at ``now``, or ``count`` of them at once; not for another copy."""
        self._slots[self._delivered + reader] += count
        self._slots[self._latest + reader] = now

    def delivered(self, reader: int) -> int:
        return int(self._slots[self._delivered + reader])

    @property
    def deliveries(self) -> int:
        return sum(self.delivered(reader) for reader in range(self.readers))

    @property
    def latest_ns(self) -> int:
        """When the last delivery was, 0 before the first."""
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
    """Wait until ``wanted[i]`` channels of each reader ``i`` have heard a warm-up message.

    ``send`` is repeated, because a layer may lose what is sent before its subscription is live. What it has
    sent beside the first of each channel has a moment to arrive: it is no part of what follows.
    """
    end = time.monotonic() + time_limit
    while True:
        await send()
        patience = min(time.monotonic() + 0.25, end)
        while time.monotonic() < patience:
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
    """Keeps at most ``size`` messages between the sender's tasks and the readers.

    ``arrived`` says how many messages have arrived for good. When nothing arrives for ``patience`` seconds,
    what is on its way counts as lost and makes room: a layer that loses messages does not stall its sender.
    """

    def __init__(self, size: int, arrived: Callable[[], int], *, patience: float = 2.0) -> None:
        self.written_off = 0
        self._size = size
        self._arrived = arrived
        self._patience = patience
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
        """Wait for room for one more message."""
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
            elif now - self._progress > self._patience:
                self.written_off = max(self._sent - self._seen, 0)
                self._progress = now
                self._room.set()
