"""The time of a write that announces earlier rows first, with stand-ins for what it uses."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from pg_layer._db.pool import Connections
from pg_layer._db.queries.send import Unannounced
from pg_layer._db.session import Session
from pg_layer._send import sender as sender_module
from pg_layer._send.announcer import PART, Announcer
from pg_layer._send.sender import Sender
from pg_layer._state.client import Client
from pg_layer.exceptions import LayerUnavailable

SEND_TIMEOUT = 8.0


class Clock:
    """A clock, and connections whose statements take ``duration`` seconds each."""

    def __init__(self, duration: float) -> None:
        self.now = 100.0
        self.duration = duration
        self.statements: list[float] = []  # until when each may take

    def monotonic(self) -> float:
        return self.now

    async def run(self, work: Any, *, timeout: float, **options: Any) -> Any:
        self.statements.append(self.now + timeout)
        self.now += min(self.duration, max(timeout, 0.0))
        if self.duration > timeout:
            raise LayerUnavailable
        return None, []


def make_sender(monkeypatch: pytest.MonkeyPatch, clock: Clock, rows: int) -> Sender:
    """Return a sender that must announce rows before it writes."""
    monkeypatch.setattr(sender_module, "time", clock)
    client = SimpleNamespace(config=SimpleNamespace(send_timeout=SEND_TIMEOUT))
    announcer = Announcer()
    announcer.add(
        Unannounced(1, 1, id, "asgi!:a", "a", "message", None, b"x") for id in range(rows)
    )
    return Sender(
        cast("Client", client), cast("Connections", clock), lambda what, work: None, announcer
    )


async def write(session: Session, *, quiet: bool) -> tuple[None, list[Unannounced]]:
    raise AssertionError("The stand-in runs no statement.")


@pytest.mark.parametrize(
    ("rows", "duration"), [(1, 60.0), (20 * PART, 1.0)], ids=["one is slow", "they are many"]
)
async def test_write_after_slow_announcements_ends_within_its_timeout(
    monkeypatch: pytest.MonkeyPatch, rows: int, duration: float
) -> None:
    clock = Clock(duration)
    sender = make_sender(monkeypatch, clock, rows)
    begun_at = clock.now
    try:
        await sender._write(write, SEND_TIMEOUT)
    except LayerUnavailable:
        pass
    *announcements, last = clock.statements
    assert last == begun_at + SEND_TIMEOUT
    assert max(announcements) == begun_at + SEND_TIMEOUT / 2
