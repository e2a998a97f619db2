"""Staying alive: the lease, the listener, the heartbeat that proves both, and polling where nothing is heard.

Bound to one event loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Literal

import psycopg

from pg_layer import store
from pg_layer.client import Client
from pg_layer.connections import Connections
from pg_layer.exceptions import PgLayerError
from pg_layer.faults import READ_ONLY
from pg_layer.listener import Listener
from pg_layer.outage import Outage
from pg_layer.receiver import Receiver
from pg_layer.restorer import Restorer
from pg_layer.session import Session

logger = logging.getLogger("pg_layer")

FALLBACK_POLL = 1.0  # seconds between looks where notifications do not arrive
PING_PATIENCE = 3.0  # seconds
POOLED = "a connection pooler is between that does not keep LISTEN; CONFIG['listen_dsn'] is to lead past it."
# Errors that say that the server knows no LISTEN.
_REFUSALS = ("0A", "42601")


class Liveness:
    """Keeps the client's lease, and hears or looks for what comes.

    `start_listening` is for a client that receives, `keep` alone for one that joins groups before it does.
    """

    def __init__(
        self,
        client: Client,
        connections: Connections,
        receiver: Receiver,
        outage: Outage,
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        self._client = client
        self._connections = connections
        self._receiver = receiver
        self._outage = outage
        self._spawn = spawn
        self._restorer = Restorer(client, connections, outage, spawn)
        receiver.on_told = self._restorer.told
        self._listener: Listener | None = None
        self._is_receiving = False
        self._has_listened = False
        self._is_kept = False
        self._is_deaf = False  # the last ping was not heard
        self._proved_at = 0.0  # when the listener was known to hear, by time.monotonic()
        self._is_proving = False
        self._fallbacks = 0
        self._is_pooled = False  # the listener's connection leads through a pooler
        self.polls_because: str | None = None  # although it was not asked to

    # ------------------------------------------------------------------ hearing

    def start_listening(self) -> None:
        """Begin to listen, or to poll where that was asked for, and to keep the lease."""
        config = self._client.config
        self._is_receiving = True
        self._receiver.on_caught_up = self._on_caught_up
        if config.poll_interval is None:
            self._listener = Listener(
                config, self._on_connect, self._receiver.hear, self._on_lost, self._client.id
            )
            self._receiver.listener = self._listener
            self._spawn(self._listener.run())
        else:
            self._spawn(self._poll(config.poll_interval, lambda: True))
        self.keep()

    def abandon(self) -> None:
        """Drop the listening connection, also when the loop will not run again."""
        if self._listener is not None:
            self._listener.abandon()

    @property
    def listening(self) -> Literal["off", "connecting", "listening", "polling"]:
        """How it learns of messages."""
        if not self._is_receiving:
            return "off"
        if self._listener is None or self.polls_because is not None:
            return "polling"
        return "listening" if self._listener.is_connected else "connecting"

    async def _on_connect(self, session: Session) -> None:
        self._is_pooled = not await store.is_direct(session)
        await self._renew_on(session, None)
        self._proved_at = time.monotonic()
        await self._receiver.listen(session)
        # Elsewhere: what holds it up must not make the process deaf.
        self._restorer.restore()
        if self._is_pooled and self.polls_because is None:
            self._spawn(self._prove_pooler())
        if self._has_listened:
            self._client.counters.add("reconnects")
        self._has_listened = True

    async def _prove_pooler(self) -> None:
        try:
            if not await self._receiver.ping(partial(self._renew, timeout=PING_PATIENCE), PING_PATIENCE):
                self._fall_back(POOLED)
        except PgLayerError as error:
            self._outage.begin(error)

    def _on_lost(self, error: Exception) -> None:
        # A crash may have undone what was put back: that comes before what is taken next.
        self._client.inbox.suspect()
        if isinstance(error, psycopg.Error) and (error.sqlstate or "").startswith(_REFUSALS):
            self._fall_back(f"the server refuses LISTEN: {error.diag.message_primary}.")
        else:
            self._outage.begin(error)

    def _on_caught_up(self, messages: int) -> None:
        if self._outage.why is None or self.listening == "connecting":
            return
        if self.listening == "polling" or self._proved_at >= self._outage.since:
            self._outage.end(messages)
        elif not self._is_proving:
            self._is_proving = True
            self._spawn(self._prove(messages))

    async def _prove(self, messages: int) -> None:
        """The pool's way is open again: whether the listener's is, too, or leads nowhere any more."""
        listener = self._listener
        try:
            if await self._receiver.ping(partial(self._renew, timeout=PING_PATIENCE), PING_PATIENCE):
                self._hears_again()
                self._outage.end(messages)
            elif listener is not None and self._listener is listener:
                listener.reconnect()
        except PgLayerError:
            pass  # still away
        finally:
            self._is_proving = False

    # ------------------------------------------------------------------ polling

    def refused(self, error: psycopg.Error) -> None:
        """The server refused NOTIFY, so that doorbells do not ring, or takes no writes."""
        if error.sqlstate == READ_ONLY:
            if self._listener is not None:  # it, too, is to find the server that does
                self._listener.reconnect()
            return
        self._client.counters.add("refused_notifies")
        self._fall_back(f"the server refuses NOTIFY: {error.diag.message_primary}.")

    def _fall_back(self, why: str) -> None:
        if not self._is_receiving:
            self._client.unheard(why)
        elif self.polls_because is None and self._listener is not None:
            self.polls_because = why
            self._fallbacks += 1
            number = self._fallbacks
            logger.warning("Without notifications: %s Polling every %g s.", why, FALLBACK_POLL)
            self._spawn(
                self._poll(
                    FALLBACK_POLL, lambda: self.polls_because is not None and self._fallbacks == number
                )
            )

    def _hears_again(self) -> None:
        self._is_deaf = False
        self._proved_at = time.monotonic()
        if self.polls_because is not None:
            self.polls_because = None
            logger.warning("Notifications arrive again.")

    async def _poll(self, interval: float, is_needed: Callable[[], bool]) -> None:
        heartbeat = self._client.config.heartbeat
        while is_needed():
            if not self._client.renewed_at or time.monotonic() - self._client.renewed_at > heartbeat:
                # After an outage the lease may be over: nothing would be written for us until the next beat.
                try:
                    await self._renew(None, PING_PATIENCE)
                except PgLayerError as error:
                    self._outage.begin(error)
            if self._listener is None or not self._listener.is_connected:
                self._client.inbox.reconnected()  # no doorbell is to be waited for
            self._receiver.look_again()
            await asyncio.sleep(interval)

    # ------------------------------------------------------------------ the lease

    async def _renew_on(self, session: Session, token: str | None) -> bool:
        """Renew the lease; returns whether there was none, so that the memberships may be gone."""
        client = self._client
        asked_at = time.monotonic()
        client.has_lease = True  # perhaps, from here on
        renewal = await store.renew(
            session,
            client.inbox_name,
            socket.gethostname(),
            os.getpid(),
            client.config.lease,
            client.fence,
            client.counted(),
            token,
        )
        client.clock.observe(asked_at, renewal.clock)
        client.renewed_at = asked_at
        if client.meet(renewal.server, renewal.clock, renewal.next_id):
            client.ids_begin_anew(renewal.next_id)
        return renewal.is_new

    async def _renew(self, token: str | None, timeout: float | None = None) -> None:
        async def work(session: Session) -> None:
            if await self._renew_on(session, token):
                self._restorer.restore()
                self._receiver.look_again()  # who has no lease is given no jobs

        await self._connections.run(
            work, timeout=timeout or self._client.config.heartbeat, is_idempotent=True
        )

    # ------------------------------------------------------------------ the heartbeat

    async def ping(self) -> bool:
        """Renew the lease, if there is one, and hear of it by notification; returns whether that worked."""
        config = self._client.config
        timeout = min(config.send_timeout, config.heartbeat / 2, PING_PATIENCE)
        if self.listening == "listening":
            return await self._receiver.ping(partial(self._renew, timeout=timeout), timeout)
        if self._is_receiving:
            await self._renew(None, timeout)
        else:
            await self._connections.run(store.probe, timeout=timeout, is_idempotent=True)
        return True

    def keep(self) -> None:
        """Renew the lease from here on."""
        if not self._is_kept:
            self._is_kept = True
            self._spawn(self._keep())

    async def _keep(self) -> None:
        heartbeat = self._client.config.heartbeat
        is_new = not (self._is_receiving or self._client.renewed_at)
        while True:
            if not is_new:
                await asyncio.sleep(heartbeat)
            is_new = False
            if not self._is_receiving and time.monotonic() - self._client.renewed_at < heartbeat:
                continue  # the engine that receives keeps it
            try:
                await self._beat(heartbeat)
            except PgLayerError as error:
                self._outage.begin(error)

    async def _beat(self, heartbeat: float) -> None:
        listener = self._listener
        self._restorer.look()
        if self.polls_because is not None:
            await self._connections.run(store.look_at_queue, timeout=heartbeat, is_idempotent=True)
        if listener is None or not listener.is_connected:
            await self._renew(None)
            if listener is not None:
                self._receiver.look_again()  # the pool's way is open
        elif await self._receiver.ping(self._renew, heartbeat / 2):
            self._hears_again()
            self._receiver.look_again()
        elif self.polls_because is not None:
            return
        elif self._is_pooled:
            self._fall_back(POOLED)
        elif self._is_deaf:
            self._fall_back("they do not arrive, although the server takes LISTEN and NOTIFY.")
        else:
            self._is_deaf = True
            logger.warning("The database answers, but its notifications do not arrive: listening anew.")
            listener.reconnect()
            return
        self._receiver.deleter.age()
