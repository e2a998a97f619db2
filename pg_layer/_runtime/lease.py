"""The lease of a client, and the heartbeat that renews it and shows that notifications arrive.

Bound to the owner loop. See ``docs/protocols.md``, section 5.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from functools import partial

from pg_layer._db.availability import Outage
from pg_layer._db.pool import Connections
from pg_layer._db.queries import lease as queries
from pg_layer._db.queries import maintenance
from pg_layer._db.session import Session
from pg_layer._groups.writer import MembershipWriter
from pg_layer._messages.announcements import ping_token
from pg_layer._process.tasks import Spawn
from pg_layer._receive.receiver import Receiver
from pg_layer._state import log_events
from pg_layer._state.client import Client
from pg_layer.exceptions import LayerUnavailable, PgLayerError

logger = logging.getLogger("pg_layer")

DELETE_PART = 1000  # expired messages in a statement
LATE = 60.0  # seconds after its end in which a message may still be committed; later ones are left to a sweep


class Lease:
    """Renews the client's lease, and acts on what a renewal tells."""

    def __init__(
        self,
        client: Client,
        connections: Connections,
        receiver: Receiver,
        writer: MembershipWriter,
        outage: Outage,
        spawn: Spawn,
    ) -> None:
        self._client = client
        self._connections = connections
        self._receiver = receiver
        self._writer = writer
        self._outage = outage
        self._spawn = spawn
        self._is_renewed = False  # by this loop
        self._boot = 0  # of the last renewal
        self._runs = 0
        self._beat_at = -math.inf  # by time.monotonic()
        self._swept_to = 0.0  # messages that expired before are deleted
        self._is_deleting = False
        self._is_looking = False

    async def wait(self, timeout: float) -> None:
        """Return when this loop has renewed the lease. Raises what is wrong, within ``timeout`` seconds."""
        if not self._is_renewed:
            if timeout <= 0:
                raise LayerUnavailable("The database could not be reached in time.")
            await self.renew(None, timeout)

    async def renew(self, token: str | None, timeout: float | None = None) -> None:
        """Renew the lease. With a token, ring a ping."""
        await self._connections.run(
            partial(self.renew_on, token=token),
            quietly=partial(self.renew_on, token=None),
            timeout=timeout or self._client.config.heartbeat,
            is_idempotent=True,
        )

    async def renew_on(self, session: Session, token: str | None) -> None:
        """The same on this connection."""
        client, config = self._client, self._client.config
        assert client.is_owned_here()
        asked_at, asked_at_tick = time.monotonic(), client.clock.ticks()
        client.has_lease = True  # perhaps, from here on
        cursor = client.cursor
        if token is not None:
            # A run that is repeated has a token of its own: the ping of the first says nothing of what the
            # second one's snapshot sees.
            self._runs += 1
            token = ping_token(token, self._runs)
        renewal = await queries.renew(
            session,
            config.prefix,
            client.address,
            socket.gethostname(),
            os.getpid(),
            config.lease,
            client.fence,
            client.counted(),
            token,
            cursor.known_boot,
            self._swept_to,
            cursor.marked_low_id(),
            [client.address, *self._receiver.jobs.addresses()],
            cursor.low_id(),
        )
        client.clock.observe(asked_at_tick, renewal.clock)
        is_first, client.renewed_at = not client.renewed_at, asked_at
        # A renewal between heartbeats, as by health(), comes too soon after what is announced just now.
        is_beat = asked_at - self._beat_at >= config.heartbeat / 2
        if is_beat:
            self._beat_at = asked_at
        cursor.renew(renewal.moment, renewal.position, token, is_beat=is_beat)
        if renewal.is_new or renewal.moment.boot != self._boot:
            # A crash or a sweep may have removed rows, and a crash or a failover may have undone deletions.
            self._boot = renewal.moment.boot
            self._writer.write_all_soon(may_have_old_rows=renewal.was_over or not renewal.is_new)
        if renewal.was_over:
            self._tell_gap()
        if not is_beat:
            pass
        elif renewal.has_marked:
            self._look_for_marked_soon()
        elif cursor.look is not None:
            cursor.looked(cursor.look)
        if not renewal.has_expired:
            # Others have deleted what expired: do not look at it again.
            self._swept_to = max(self._swept_to, renewal.clock - LATE)
        elif not self._is_deleting:
            self._is_deleting = True
            self._spawn("The deletion of expired messages", self._delete_expired)
        self._is_renewed = True
        if is_first or is_beat:
            # Also at heartbeats: a claim may have passed over a job that another one had locked, and that one
            # came to nothing.
            self._receiver.jobs.look_again()

    def _tell_gap(self) -> None:
        """This process was silent for longer than its lease, while the database was there."""
        client = self._client
        client.counters.add("expired_leases")
        logger.warning(
            "The lease of this process was over: it was silent for too long. Messages may have been missed.",
            extra={"event": log_events.LEASE_EXPIRED},
        )
        if self._outage.why is None:
            client.announce_locally(client.config.on_disconnect)
            client.announce_locally(client.config.on_reconnect)
        self._receiver.catch_up_soon()

    def _look_for_marked_soon(self) -> None:
        if not self._is_looking:
            self._is_looking = True
            self._spawn("The look for marked messages", self._look_for_marked)

    async def _look_for_marked(self) -> None:
        try:
            await self._receiver.look_for_marked()
            self._receiver.jobs.look_again()
        except PgLayerError as error:
            logger.info(
                "Could not look for marked messages: %s",
                error,
                extra={"event": log_events.MARKED_READ_FAILED},
            )
        self._is_looking = False

    async def _delete_expired(self) -> None:
        try:
            while True:
                count, last = await self._connections.run(
                    partial(maintenance.delete_expired, after=self._swept_to, limit=DELETE_PART),
                    timeout=self._client.config.send_timeout,
                    is_idempotent=True,
                )
                if last is not None:
                    self._swept_to = max(self._swept_to, last)
                if count < DELETE_PART:
                    break
        except PgLayerError as error:
            logger.info(
                "Could not delete expired messages: %s",
                error,
                extra={"event": log_events.EXPIRED_DELETE_FAILED},
            )
        self._is_deleting = False
