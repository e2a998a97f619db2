"""Tasks that receive numbered messages, for tests that compare what is sent with what arrives."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from pg_layer import PostgresChannelLayer
from tests.processes import TIMEOUT, until


def numbered(number: int, size: int = 0) -> dict[str, Any]:
    """Return a message with a number and a blob of ``size`` bytes."""
    return {"type": "test", "number": number, "blob": bytes(size)}


class Readers:
    """One receiving task for each channel. All channels belong to one layer."""

    def __init__(self, layer: PostgresChannelLayer) -> None:
        self._layer = layer
        self._tasks: list[asyncio.Task[None]] = []
        self.numbers: dict[str, list[int]] = {}  # by channel, in the order of arrival
        self.other: dict[str, list[str]] = {}  # by channel, the types of messages without a number

    def read(self, *channels: str) -> None:
        """Receive on these channels from now on."""
        for channel in channels:
            self.numbers[channel], self.other[channel] = [], []
            self._tasks.append(asyncio.create_task(self._read(channel)))

    async def _read(self, channel: str) -> None:
        while True:
            message = await self._layer.receive(channel)
            if "number" in message:
                self.numbers[channel].append(message["number"])
            else:
                self.other[channel].append(message["type"])

    async def reached(self, number: int, *channels: str, timeout: float = TIMEOUT) -> None:
        """Return when each of the channels has received the number. Default: all channels."""
        names = channels or tuple(self.numbers)
        try:
            await until(
                lambda: self._failed() or all(number in self.numbers[name] for name in names),
                timeout,
            )
        except TimeoutError:
            received = {name: self.numbers[name] for name in names}
            pytest.fail(f"{number} did not arrive at all channels: {received}")
        if failed := self._failed():
            failed.result()

    def _failed(self) -> asyncio.Task[None] | None:
        """Return a task that has ended: its ``receive()`` raised."""
        return next((task for task in self._tasks if task.done()), None)

    async def stop(self) -> None:
        """Cancel all tasks."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)


@contextlib.asynccontextmanager
async def readers_of(layer: PostgresChannelLayer, *channels: str) -> AsyncIterator[Readers]:
    """Receive on these channels until the block ends."""
    readers = Readers(layer)
    readers.read(*channels)
    try:
        yield readers
    finally:
        await readers.stop()


async def heartbeats(layer: PostgresChannelLayer, count: int) -> None:
    """Return when the layer has renewed its lease ``count`` times."""
    for _ in range(count):
        oldest = 0.0

        def was_renewed() -> bool:
            nonlocal oldest
            age = layer.stats()["lease_age"] or 0.0
            oldest, before = max(oldest, age), oldest
            return age < before

        await until(was_renewed)


async def wait_for_members(
    layer: PostgresChannelLayer, group: str, *channels: str, timeout: float = TIMEOUT
) -> None:
    """Return when exactly these channels are listed as members of the group."""
    deadline = time.monotonic() + timeout
    while sorted(found := await layer.group_channels(group)) != sorted(channels):
        assert time.monotonic() < deadline, f"{found}, not {list(channels)}"
        await asyncio.sleep(0.02)
