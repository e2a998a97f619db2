"""What ``layer.health()`` returns."""

from __future__ import annotations

import asyncio
import time
from typing import Literal, TypedDict

from pg_layer._db.errors import AWAY, reason_of
from pg_layer._runtime.engine import Engine
from pg_layer._state.failures import words
from pg_layer.exceptions import OutcomeUnknown, PgLayerError


class Health(TypedDict):
    """How a process's use of the layer fares. Times are in seconds.

    - ``lease_age``: since the lease was renewed, not counting the renewal by this call; None without a lease,
      as in a process that only sends.
    - ``listener``: "off" in a process that does not receive; "connecting"; "listening"; "polling", by choice
      or because notifications do not arrive.
    - ``last_notification_age``: since a notification was heard; None if none was yet.
    - ``round_trip``: of a ping through the whole path, to the database and back by notification; without a
      listener to the database and back; None if there was no answer.
    - ``problems``: what is wrong, in words; empty when all is well.
    """

    lease_age: float | None
    listener: Literal["off", "connecting", "listening", "polling"]
    last_notification_age: float | None
    round_trip: float | None
    problems: list[str]


async def examine(engine: Engine) -> Health:
    """Look at everything now. Raises nothing. Called on the engine's loop."""
    client = engine.client
    # Before the ping, which renews the lease: otherwise a lease that nothing else keeps would look well.
    asked_at = time.monotonic()
    lease_age = asked_at - client.renewed_at if client.renewed_at else None
    problems = client.failures.problems()
    if lease_age is not None and lease_age > client.config.lease:
        problems.append(f"The lease is over: it was last renewed {lease_age:.0f} s ago.")
    round_trip: float | None = None
    try:
        if await engine.ping():
            round_trip = time.monotonic() - asked_at
        else:
            problems.append("A notification to itself was not heard.")
    except PgLayerError as error:
        # What became of the ping itself matters to nobody.
        problems.append(
            AWAY + reason_of(error) if isinstance(error, OutcomeUnknown) else str(error)
        )
    except Exception as error:
        problems.append(f"The ping failed: {words(error)}")
    if engine.outage.why is not None:
        problems.append(f"Not connected: {engine.outage.why}")
    owner = engine.owner
    heard_at = None
    if owner is not None:
        if owner.polls_because is not None:
            problems.append(f"Polling: {owner.polls_because}")
        heard_at = owner.heard_at
    return Health(
        lease_age=lease_age,
        listener="off" if owner is None else owner.listening,
        last_notification_age=None
        if heard_at is None
        else asyncio.get_running_loop().time() - heard_at,
        round_trip=round_trip,
        problems=problems,
    )
