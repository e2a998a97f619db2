"""Deletes rows that were dispatched, many at once. Bound to one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

from pg_layer import store
from pg_layer.client import Client
from pg_layer.connections import Connections
from pg_layer.exceptions import PgLayerError
from pg_layer.mailbox import Mailbox

DELETE_DELAY = 0.5  # seconds for which doomed rows gather before they are deleted together
DELETE_MOST = 1000
RECENT_LEAST = 3.0  # seconds for which a deleted row is remembered: PostgreSQL writes lazy commits within one
RETRY = 0.5  # seconds
SETTLE_TIMEOUT = 1.0


class Deleter:
    """Deletes the rows that the client has doomed."""

    def __init__(
        self,
        client: Client,
        connections: Connections,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._client = client
        self._connections = connections
        self._spawn = spawn
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._is_deleting = False
        self._is_urgent = False  # more is to be deleted as soon as that has ended
        self._settled = asyncio.Event()
        self._aged_at = self._loop.time()
        self.soon()

    def age(self) -> None:
        """A while has passed in which the database answered: older deletions are safe on its disk."""
        self._aged_at = self._loop.time()
        self._client.inbox.age()

    def soon(self, mailbox: Mailbox | None = None) -> None:
        """Rows were doomed; those of a mailbox at once if senders count enough of them to matter."""
        is_urgent = mailbox is not None and mailbox.is_filling
        if self._timer is None or is_urgent or len(self._client.doomed) >= DELETE_MOST:
            self._delete_soon(0.0 if is_urgent else DELETE_DELAY)

    async def settle(self, mailbox: Mailbox) -> None:
        """Wait until senders no longer count what was received from this mailbox, or a second at most."""
        deadline = self._loop.time() + SETTLE_TIMEOUT
        while mailbox.undeleted > len(mailbox) and (left := deadline - self._loop.time()) > 0:
            self._delete_soon(0.0)
            # Not wait_for(): before Python 3.12 it may swallow a cancellation.
            settled = asyncio.ensure_future(self._settled.wait())
            try:
                await asyncio.wait((settled,), timeout=left)
            finally:
                settled.cancel()

    def _delete_soon(self, delay: float) -> None:
        doomed = self._client.doomed
        if not doomed:
            return
        if len(doomed) >= DELETE_MOST:
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
        if not self._is_deleting and self._client.doomed:
            self._is_deleting, self._is_urgent = True, False
            self._spawn(self._delete())

    async def _delete(self) -> None:
        client = self._client
        keys = list(client.doomed)
        try:
            await self._connections.run(
                lambda conn: store.delete(conn, client.inbox_name, keys),
                timeout=client.config.send_timeout,
                is_idempotent=True,
            )
        except PgLayerError:
            await asyncio.sleep(RETRY)
        else:
            client.inbox.deleted(keys)
            if client.inbox.is_crowded and self._loop.time() - self._aged_at >= RECENT_LEAST:
                self.age()
            for key in keys:
                mailbox = client.doomed.pop(key, None)
                if mailbox is not None:
                    mailbox.undeleted -= 1
            settled, self._settled = self._settled, asyncio.Event()
            settled.set()
        finally:
            self._is_deleting = False
            self._delete_soon(0.0 if self._is_urgent else DELETE_DELAY)
