"""The helper that the tests of djangochannelsrestframework import."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from channels.testing import WebsocketCommunicator


class PatientCommunicator(WebsocketCommunicator):
    """A communicator whose consumer goes on if a test has waited for output in vain."""

    async def receive_output(self, timeout: float = 1) -> Any:
        if self.future.done():
            self.future.result()
        return await asyncio.wait_for(self.output_queue.get(), timeout)

    async def receive_many_json_from(self, timeout: float = 1) -> list[Any]:
        received = []
        with suppress(asyncio.TimeoutError):
            while True:
                received.append(await self.receive_json_from(timeout))
        return received


@asynccontextmanager
async def connected_communicator(
    consumer: Any, path: str = "/testws/"
) -> AsyncIterator[PatientCommunicator]:
    """Yield a communicator that is connected to the consumer."""
    communicator = PatientCommunicator(consumer, path)
    is_connected, _ = await communicator.connect()
    assert is_connected
    yield communicator
    await communicator.disconnect()
