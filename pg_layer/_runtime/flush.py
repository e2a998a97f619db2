"""Flush: remove everything, and wait until all live clients have applied that.

See ``docs/protocols.md``, section 8. Bound to no event loop.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial

from pg_layer._db.errors import as_stopping
from pg_layer._db.queries.lease import Unconfirmed
from pg_layer._runtime.engine import Engine
from pg_layer._runtime.loops import Loops, unserved_addresses
from pg_layer._state import log_events
from pg_layer.exceptions import LayerUnavailable, OutcomeUnknown

logger = logging.getLogger("pg_layer")

FIRST_PAUSE, LAST_PAUSE = 0.005, 0.2  # seconds between two reads
LAST_READ = 1.0  # seconds for a read at the end of the time
MAX_NAMED = 5  # clients in the log line


async def flush(loops: Loops) -> None:
    """Remove all messages and memberships of the prefix. Return when all live clients confirm it.

    The table is read at growing intervals, so that a process without a listener can wait. A client
    that has not confirmed for ``send_timeout`` seconds is logged and no longer waited for. A later
    flush does not wait for it either, until it has confirmed.

    Raises `LayerUnavailable` if nothing was removed, and `OutcomeUnknown` if the rest or the
    confirmations are unknown.
    """
    timeout = loops.client.config.send_timeout
    flushed = await loops.run(loops.for_flushing, Engine.flush)
    deadline, pause = time.monotonic() + timeout, FIRST_PAUSE
    silent: list[Unconfirmed] = []
    while awaited := set(flushed.addresses) - unserved_addresses():
        flushed = flushed._replace(addresses=sorted(awaited))
        await asyncio.sleep(pause)
        pause = min(2 * pause, LAST_PAUSE)
        left = deadline - time.monotonic()
        try:
            unconfirmed = await loops.run(
                loops.for_sending,
                partial(Engine.unconfirmed, flushed=flushed, timeout=max(left, LAST_READ)),
                is_read=True,
            )
        except LayerUnavailable as error:
            raise as_stopping(
                OutcomeUnknown(
                    "All messages and memberships were removed."
                    f" It is unknown whether all processes have noticed: {error}"
                )
            ) from error
        in_time = [each for each in unconfirmed if each.age < timeout and left > 0]
        silent += [each for each in unconfirmed if each not in in_time]
        flushed = flushed._replace(addresses=[each.address for each in in_time])
    if silent:
        names = [
            f"process {each.pid} on {each.host}" if each.host else f"client {each.address}"
            for each in silent[:MAX_NAMED]
        ]
        if len(silent) > MAX_NAMED:
            names.append("...")
        logger.warning(
            "A flush has removed everything, but has not been confirmed within %g s by %d clients:"
            " %s. Each of them empties its channels when it runs again.",
            timeout,
            len(silent),
            ", ".join(names),
            extra={"event": log_events.FLUSH_UNCONFIRMED},
        )
