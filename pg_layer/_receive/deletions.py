"""The deletion of received rows in batches. Bound to the owner loop.

A statement that reads rows never deletes them: if its answer were lost, the messages would
be lost with it. Rows are deleted after `receive()` has taken their messages.
"""

from __future__ import annotations

import asyncio
from functools import partial

from pg_layer._db.pool import Connections
from pg_layer._db.queries import receive as queries
from pg_layer._process.tasks import Spawn
from pg_layer._state.channel_queue import ChannelQueue
from pg_layer._state.client import Client
from pg_layer.exceptions import PgLayerError

DELETE_DELAY = 0.5  # seconds during which rows gather for one statement
DELETE_MOST = 1000  # rows in a statement
RETRY = 0.5  # seconds
WAIT_TIMEOUT = 1.0  # seconds


class Deletions:
    """The task that deletes the rows in `Client.pending_deletes`."""

    def __init__(
        self,
        client: Client,
        connections: Connections,
        spawn: Spawn,
    ) -> None:
        self._client = client
        self._connections = connections
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._is_deleting = False
        self._is_urgent = False  # delete again as soon as the present deletion has ended
        self._deleted = asyncio.Event()
        self.schedule()

    def schedule(self, queue: ChannelQueue | None = None) -> None:
        """Request the deletion of the pending rows.

        ``queue``: the channel queue of the last row. Delete at once if so many of
        its rows are pending that senders may find the channel full.
        """
        is_urgent = queue is not None and queue.is_filling
        if self._timer is None or is_urgent or len(self._client.pending_deletes) >= DELETE_MOST:
            self._delete_in(0.0 if is_urgent else DELETE_DELAY)

    def delete_now(self) -> None:
        """Delete the pending rows without a delay."""
        self._delete_in(0.0)

    async def wait_for(self, queue: ChannelQueue) -> None:
        """Wait until senders do not count received rows of a channel, or for a second."""
        deadline = self._loop.time() + WAIT_TIMEOUT
        while queue.undeleted > len(queue) and (left := deadline - self._loop.time()) > 0:
            self._delete_in(0.0)
            # Before Python 3.12 asyncio.wait_for() may swallow a cancellation.
            deleted = asyncio.ensure_future(self._deleted.wait())
            try:
                await asyncio.wait((deleted,), timeout=left)
            finally:
                deleted.cancel()

    def _delete_in(self, delay: float) -> None:
        pending = self._client.pending_deletes
        if not pending:
            return
        if len(pending) >= DELETE_MOST:
            delay = 0.0
        if self._is_deleting:
            self._is_urgent |= not delay
            return
        if self._timer is not None:
            if delay:
                return
            self._timer.cancel()
        self._timer = self._loop.call_later(delay, self._delete_now)

    def _delete_now(self) -> None:
        self._timer = None
        if not self._is_deleting and self._client.pending_deletes:
            self._is_deleting, self._is_urgent = True, False
            self._spawn("The deletion of received messages", self._delete)

    async def _delete(self) -> None:
        client = self._client
        keys = list(client.pending_deletes)
        try:
            for start in range(0, len(keys), DELETE_MOST):
                part = keys[start : start + DELETE_MOST]
                await self._connections.run(
                    partial(queries.delete, address=client.address, keys=part),
                    timeout=client.config.send_timeout,
                    is_idempotent=True,
                )
                client.rows_deleted(part)
                deleted, self._deleted = self._deleted, asyncio.Event()
                deleted.set()
        except PgLayerError:
            await asyncio.sleep(RETRY)
        self._is_deleting = False
        self._delete_in(0.0 if self._is_urgent else DELETE_DELAY)
