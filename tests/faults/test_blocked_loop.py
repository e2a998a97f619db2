"""The application blocks the event loop that serves the layer.

Errors of calls in other threads name the thread and the code.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from pg_layer import PostgresChannelLayer
from pg_layer.exceptions import LayerUnavailable, OutcomeUnknown
from tests.conftest import MakeLayer
from tests.processes import TIMEOUT, listen, until

NAME = "the-server"


@contextmanager
def blocked(layer: PostgresChannelLayer) -> Iterator[None]:
    """Run the layer's loop in another thread, and block it there."""
    is_blocked, may_end = threading.Event(), threading.Event()

    async def main() -> None:
        await listen(layer)
        is_blocked.set()
        may_end.wait()

    thread = threading.Thread(target=lambda: asyncio.run(main()), name=NAME)
    thread.start()
    try:
        assert is_blocked.wait(TIMEOUT)
        yield
    finally:
        may_end.set()
        thread.join()


@pytest.mark.parametrize(
    ("call", "error", "outcome"),
    [
        (
            lambda layer: layer.group_send("room", {"type": "test"}),
            LayerUnavailable,
            r" The call did not take effect\.",
        ),
        (
            lambda layer: layer.flush(),
            OutcomeUnknown,
            r" It is unknown whether the call took effect\.",
        ),
        (lambda layer: layer.group_count("room"), LayerUnavailable, ""),
    ],
    ids=["group_send", "flush", "group_count"],
)
async def test_call_while_the_loop_is_blocked_raises_an_error_that_names_the_code(
    call: Callable[[PostgresChannelLayer], Coroutine[Any, Any, object]],
    error: type[Exception],
    outcome: str,
    make_layer: MakeLayer,
) -> None:
    layer = make_layer(send_timeout=0.2)
    with blocked(layer), pytest.raises(error) as raised:
        await call(layer)
    assert type(raised.value) is error
    assert raised.match(
        rf"^The event loop in thread {NAME} serves the channel layer, and has not run for"
        r" \d+\.\d s: code in that thread blocks it \(now at .*threading\.py, line \d+\)\."
        r" Run such code in another thread, for instance with asgiref's"
        rf" sync_to_async\(\)\.{outcome}$"
    )


async def test_health_while_the_loop_is_blocked_names_the_thread(
    make_layer: MakeLayer,
) -> None:
    layer = make_layer(send_timeout=0.2)
    with blocked(layer):
        [problem] = (await layer.health())["problems"]
    assert f"thread {NAME} serves the channel layer, and has not run for" in problem


async def test_group_send_given_up_while_the_loop_was_blocked_is_not_sent_later(
    make_layer: MakeLayer,
) -> None:
    layer, other = make_layer(send_timeout=0.2), make_layer()
    channel = await other.new_channel()
    await other.group_add("room", channel)
    with blocked(layer), pytest.raises(LayerUnavailable, match="did not take effect"):
        await layer.group_send("room", {"type": "late"})
    await until(lambda: layer._loops.main_engine is None or not layer._loops.main_engine.is_running)
    await layer.group_send("room", {"type": "next"})
    assert await asyncio.wait_for(other.receive(channel), TIMEOUT) == {"type": "next"}
