"""The result of ``layer.health()``."""

from __future__ import annotations

import asyncio
import time
from typing import Literal, TypedDict

from pg_layer._db.errors import AWAY, outage_reason
from pg_layer._runtime.engine import Engine
from pg_layer._state.failures import words
from pg_layer.exceptions import OutcomeUnknown, PgLayerError


class Health(TypedDict):
    """The health of the layer in this process. Times are in seconds.

    - ``lease_age``: time since the lease was renewed, except by this call. None without a
      lease, as in a process that only sends.
    - ``listener``: "off" in a process that does not receive, or "connecting", "listening" or
      "polling". A process polls by its configuration, or because notifications do not arrive.
    - ``last_notification_age``: time since the last notification arrived. None before the first.
    - ``round_trip``: time of a ping to the database and back. If the process listens, the ping
      arrives as a notification. None if there was no answer.
    - ``problems``: descriptions of all problems. Empty if there are none.
    """

    lease_age: float | None
    listener: Literal["off", "connecting", "listening", "polling"]
    last_notification_age: float | None
    round_trip: float | None
    problems: list[str]


async def examine(engine: Engine) -> Health:
    """Ping the database, and return the health. Does not raise. Called on the engine's loop."""
    client = engine.client
    # Before the ping, which renews the lease. After it, a lease that no heartbeat renews would seem
    # healthy.
    asked_at = time.monotonic()
    lease_age = asked_at - client.renewed_at if client.renewed_at else None
    problems: list[str] = []  # causes first
    round_trip: float | None = None
    try:
        if await engine.ping():
            round_trip = time.monotonic() - asked_at
        else:
            problems.append("A notification to itself was not heard.")
    except PgLayerError as error:
        # The ping changes nothing that matters: report why the connection was lost.
        problems.append(
            AWAY + outage_reason(error) if isinstance(error, OutcomeUnknown) else str(error)
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
    problems += client.failures.problems()
    if lease_age is not None and lease_age > client.config.lease:
        # While the database is unavailable, no lease expires.
        problems.append(f"The lease was not renewed for {lease_age:.0f} s.")
    return Health(
        lease_age=lease_age,
        listener="off" if owner is None else owner.listening,
        last_notification_age=None
        if heard_at is None
        else asyncio.get_running_loop().time() - heard_at,
        round_trip=round_trip,
        problems=problems,
    )
