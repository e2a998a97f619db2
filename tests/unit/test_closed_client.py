"""A client that was closed."""

from __future__ import annotations

import asyncio

from pg_layer._config.options import Config
from pg_layer._messages.codec import Codec
from pg_layer._state.client import Client


async def test_a_queue_that_is_made_after_the_end_lets_nobody_wait() -> None:
    """A receiver on another thread may have found the client just before it was closed."""
    config = Config(dsn="host=nowhere")
    client = Client(config, Codec("json", config.max_message_size))
    client.close()
    assert client.queue("jobs").add_waiter(asyncio.get_running_loop()) is None
