"""The lease of a client, and the heartbeat that renews it and sends a ping.

Bound to the owner loop. See ``docs/protocols.md``, section 5.
"""

from __future__ import annotations

import logging
import math
import os
import socket
import time
from collections.abc import Callable
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
# Seconds after its end in which a message may still be committed. A sweep deletes later ones.
LATE = 60.0


class Lease:
    """The renewal of the client's lease, and the actions that follow a renewal.

    One statement renews the lease, reports counters, takes the snapshot that may become
    ``S`` of the cursor, and sends the ping that proves it.

    ``has_notifications``: returns False if the process polls, because notifications do not arrive.
    """

    def __init__(
        self,
        client: Client,
        connections: Connections,
        receiver: Receiver,
        writer: MembershipWriter,
        outage: Outage,
        spawn: Spawn,
        has_notifications: Callable[[], bool],
    ) -> None:
        self._client = client
        self._connections = connections
        self._receiver = receiver
        self._writer = writer
        self._outage = outage
        self._spawn = spawn
        self._has_notifications = has_notifications
        self._is_renewed = False  # on this loop
        self._boot = 0  # of the last renewal
        self._runs = 0  # of renewals that send a ping
        self._heartbeat_at = -math.inf  # by time.monotonic()
        self._deleted_to = 0.0  # messages that expired before this time are deleted
        self._is_deleting = False
        self._is_searching = False

    async def wait(self, timeout: float) -> None:
        """Wait for the first renewal on this loop; renew now if there was none.

        Raises the same errors as a renewal, within ``timeout`` seconds.
        """
        if not self._is_renewed:
            if timeout <= 0:
                raise LayerUnavailable("The database could not be reached in time.")
            await self.renew(None, timeout)

    async def renew(self, token: str | None, timeout: float | None = None) -> None:
        """Renew the lease, and send a ping if a token is given.

        If the server refuses NOTIFY, renew without a ping. ``timeout``: in seconds; default:
        a heartbeat.
        """
        await self._connections.run(
            partial(self.renew_on, token=token),
            quietly=partial(self.renew_on, token=None),
            timeout=timeout or self._client.config.heartbeat,
            is_idempotent=True,
        )

    async def renew_on(self, session: Session, token: str | None) -> None:
        """Renew the lease on this connection; see `renew`."""
        client, config = self._client, self._client.config
        assert client.is_owned_here()
        asked_at, asked_at_tick = time.monotonic(), client.clock.ticks()
        client.expect_lease()
        cursor = client.cursor
        if token is not None:
            # Each run of a repeated statement has a token of its own. The ping of the first
            # run proves nothing about the snapshot of the second one.
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
            client.counts(has_notifications=self._has_notifications()),
            token,
            cursor.known_boot,
            self._deleted_to,
            cursor.marked_low_id(),
            [client.address, *self._receiver.jobs.addresses()],
            cursor.low_id(),
        )
        client.clock.observe(asked_at_tick, renewal.clock)
        is_first = client.lease_renewed(asked_at)
        # A renewal between heartbeats, such as that of health(), does not count as one: rows that
        # were written just now would seem overdue.
        is_heartbeat = asked_at - self._heartbeat_at >= config.heartbeat / 2
        if is_heartbeat:
            self._heartbeat_at = asked_at
        cursor.renew(renewal.moment, renewal.position, token, is_heartbeat=is_heartbeat)
        self._restore_memberships(renewal)
        if is_heartbeat:
            self._check_marked(renewal)
        self._check_expired(renewal)
        self._is_renewed = True
        if is_first or is_heartbeat:
            # A claim may have passed over a job that another claim had locked, and that other
            # claim may have been rolled back. So claim at each heartbeat.
            self._receiver.jobs.claim_from_all()

    def _restore_memberships(self, renewal: queries.Renewal) -> None:
        """Write all memberships again if the table may differ from them."""
        if renewal.is_new or renewal.moment.boot != self._boot:
            # A crash or a sweep may have removed rows. A crash or a failover may also have
            # undone deletions.
            self._boot = renewal.moment.boot
            self._writer.write_all_soon(may_have_old_rows=renewal.was_over or not renewal.is_new)
        if renewal.was_over:
            self._report_gap()

    def _check_marked(self, renewal: queries.Renewal) -> None:
        cursor = self._client.cursor
        if renewal.has_marked:
            self._search_marked_soon()
        elif cursor.overdue is not None:
            cursor.marked_searched(cursor.overdue)

    def _check_expired(self, renewal: queries.Renewal) -> None:
        if not renewal.has_expired:
            # Other processes have deleted what expired: the next renewal begins there.
            self._deleted_to = max(self._deleted_to, renewal.clock - LATE)
        elif not self._is_deleting:
            self._is_deleting = True
            self._spawn("The deletion of expired messages", self._delete_expired)

    def _report_gap(self) -> None:
        """Report that this process did not renew for a lease while the database was up."""
        client = self._client
        client.counters.add("expired_leases")
        logger.warning(
            "The lease of this process was over: it was not renewed in time. "
            "Messages may have been missed.",
            extra={"event": log_events.LEASE_EXPIRED},
        )
        if self._outage.why is None:
            client.send_to_consumers(client.config.on_disconnect)
            client.send_to_consumers(client.config.on_reconnect)
        self._receiver.catch_up_soon()

    def _search_marked_soon(self) -> None:
        if not self._is_searching:
            self._is_searching = True
            self._spawn("The search for marked messages", self._search_marked)

    async def _search_marked(self) -> None:
        try:
            await self._receiver.search_marked()
            self._receiver.jobs.claim_from_all()
        except PgLayerError as error:
            logger.info(
                "Could not search for marked messages: %s",
                error,
                extra={"event": log_events.MARKED_READ_FAILED},
            )
        self._is_searching = False

    async def _delete_expired(self) -> None:
        try:
            while True:
                count, last = await self._connections.run(
                    partial(maintenance.delete_expired, after=self._deleted_to, limit=DELETE_PART),
                    timeout=self._client.config.send_timeout,
                    is_idempotent=True,
                )
                if last is not None:
                    self._deleted_to = max(self._deleted_to, last)
                if count < DELETE_PART:
                    break
        except PgLayerError as error:
            logger.info(
                "Could not delete expired messages: %s",
                error,
                extra={"event": log_events.EXPIRED_DELETE_FAILED},
            )
        self._is_deleting = False
