"""The owner: the receiving side of a client, on the one loop that uses its state.

It listens, or polls if notifications do not arrive. It keeps the lease and writes memberships.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Literal

import psycopg

from pg_layer._db.availability import Outage
from pg_layer._db.errors import READ_ONLY
from pg_layer._db.pool import Connections
from pg_layer._db.queries import receive as queries
from pg_layer._db.session import Session
from pg_layer._groups.changes import OwnChanges
from pg_layer._groups.writer import MembershipWriter
from pg_layer._process.tasks import Tasks
from pg_layer._receive.listener import Listener
from pg_layer._receive.receiver import Receiver
from pg_layer._runtime.lease import Lease
from pg_layer._send.batcher import Batcher, Outcome
from pg_layer._send.operations import Change
from pg_layer._state import log_events
from pg_layer._state.channel_queue import ChannelQueue
from pg_layer._state.client import Client
from pg_layer.exceptions import LayerUnavailable, PgLayerError

logger = logging.getLogger("pg_layer")

FALLBACK_POLL = 1.0  # seconds between two polls if notifications do not arrive
PING_TIMEOUT = 3.0  # seconds
CHANGE_SIZE = 100  # bytes of a membership change, as the batcher counts them
POOLED = (
    "a connection pooler is between that does not keep LISTEN; CONFIG['listen_dsn'] must lead"
    " past it."
)
# SQLSTATEs of servers that do not support LISTEN.
_REFUSALS = ("0A", "42601")


class Owner:
    """The receiving side of a client. Bound to the owner loop, except `changes.submit`.

    ``wait_for_predecessor``: waits until the previous owner has stopped. Before that, this one
    does not use the client's state of receiving.
    """

    def __init__(
        self,
        client: Client,
        connections: Connections,
        outage: Outage,
        tasks: Tasks,
        wait_for_predecessor: Callable[[], Coroutine[Any, Any, None]],
    ) -> None:
        self._client = client
        self._connections = connections
        self._outage = outage
        self._tasks = tasks
        self._spawn = spawn = tasks.spawn
        self._wait_for_predecessor = wait_for_predecessor
        self._started = asyncio.Event()
        self._is_pooled = False  # the listener's connection leads through a pooler
        self._is_deaf = False  # the last ping did not arrive
        self._has_listened = False
        # When the listener was last known to receive notifications, by time.monotonic().
        self._proved_at = 0.0
        self._is_proving = False
        self._fallbacks = 0
        # Normal channels on which readers waited before the start.
        self._wanted: list[str] = []
        # Why the process polls although the configuration does not ask for it.
        self.polls_because: str | None = None
        config = client.config
        self._listener = (
            Listener(
                config, self._prepare, self._on_connect, self._hear, self._on_lost, client.id, spawn
            )
            if config.poll_interval is None
            else None
        )
        self._writer = MembershipWriter(client, connections, spawn)
        self.changes = Batcher[Change](
            asyncio.get_running_loop(),
            self._change,
            spawn,
            lambda _: CHANGE_SIZE,
            config.send_timeout,
        )
        self._receiver: Receiver | None = None
        self._lease: Lease | None = None
        spawn("The beginning of receiving", self._begin)

    async def _begin(self) -> None:
        client, config = self._client, self._client.config
        await self._wait_for_predecessor()
        if self._receiver is None:
            client.take_ownership()
            self._receiver = Receiver(
                client,
                self._connections,
                self._listener,
                self._writer,
                self._outage,
                self._spawn,
                self._on_caught_up,
            )
            self._lease = Lease(
                client,
                self._connections,
                self._receiver,
                self._writer,
                self._outage,
                self._spawn,
                lambda: self.polls_because is None,
            )
            self._started.set()
            self._tasks.every(config.heartbeat, "The heartbeat", self._heartbeat)
            if self._listener is None:
                self._poll_until(config.poll_interval or FALLBACK_POLL, lambda: False)
            else:
                self._spawn("The listener", self._listener.run)
        self._receiver.start()
        for channel in self._wanted:
            self._receiver.jobs.reader_waits(channel)

    @property
    def receiver(self) -> Receiver:
        """The receiver. Raises `LayerUnavailable` before receiving has begun."""
        if self._receiver is None:
            raise LayerUnavailable("Receiving has not begun yet.")
        return self._receiver

    @property
    def lease(self) -> Lease:
        """The lease. Raises `LayerUnavailable` before receiving has begun."""
        if self._lease is None:
            raise LayerUnavailable("Receiving has not begun yet.")
        return self._lease

    @property
    def heard_at(self) -> float | None:
        """When the last notification arrived, by the loop's clock. None before the first."""
        return None if self._receiver is None else self._receiver.heard_at

    def abandon(self) -> None:
        """Drop the listening connection. May be called when the loop does not run any more."""
        self.changes.close()
        if self._listener is not None:
            self._listener.abandon()

    def cut(self) -> None:
        """Shut the socket of the listening connection down. From any thread."""
        if self._listener is not None:
            self._listener.cut()

    # ------------------------------------------------------------------ calls

    def want(self, channel: str) -> None:
        """Claim jobs for a reader that waits on a normal channel."""
        if self._receiver is None:
            self._wanted.append(channel)
        else:
            self._receiver.jobs.reader_waits(channel)

    def schedule_deletion(self, queue: ChannelQueue) -> None:
        """Have the row of a message deleted that a reader of ``queue`` has received."""
        if self._receiver is not None:
            self._receiver.deletions.schedule(queue)

    def forget_idle(self) -> None:
        """Stop listening to normal channels that are not read any more."""
        if self._receiver is not None:
            self._receiver.jobs.forget_idle()

    async def _change(self, changes: list[Change], timeout: float) -> list[Outcome]:
        deadline = time.monotonic() + timeout
        await _wait(self._started, timeout)
        connections = self._connections
        own = OwnChanges(
            self._client, self._writer, self.receiver, self.lease.wait, lambda: connections.gives_up
        )
        return list(await own.write(changes, deadline - time.monotonic()))

    # ------------------------------------------------------------------ listening

    @property
    def listening(self) -> Literal["connecting", "listening", "polling"]:
        """How the process is notified of messages."""
        if self._listener is None or self.polls_because is not None:
            return "polling"
        return "listening" if self._listener.is_connected else "connecting"

    def _hear(self, channel: str, payload: str) -> None:
        self.receiver.hear(channel, payload)

    async def _prepare(self, session: Session) -> None:
        self._is_pooled = not await queries.is_direct(session)
        if not self._is_pooled:
            await queries.set_up_listener(session)
        await self.lease.renew_on(session, None)

    async def _on_connect(self) -> None:
        self._proved_at = time.monotonic()
        await self.receiver.listen_to_all()
        self.receiver.catch_up_soon()
        if self._is_pooled and self.polls_because is None:
            self._spawn("The check of notifications", self._prove_pooler)
        if self._has_listened:
            self._client.counters.add("reconnects")
        self._has_listened = True

    async def _prove_pooler(self) -> None:
        try:
            if not await self.ping(PING_TIMEOUT):
                self._fall_back(POOLED)
        except PgLayerError as error:
            self._outage.begin(error)

    def _on_lost(self, error: Exception) -> None:
        self.receiver.connection_lost()
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
            self._spawn("The check of notifications", partial(self._prove, messages))

    async def _prove(self, messages: int) -> None:
        """Find out whether notifications arrive again. The pool has reached the database."""
        proved_at = self._proved_at
        try:
            is_heard = await self.ping(PING_TIMEOUT)
            if is_heard and self.listening != "connecting":
                self._hears_again()
                self._outage.end(messages)
            elif not is_heard and self._listener is not None and self._proved_at == proved_at:
                self._listener.reconnect()  # unless it has connected again meanwhile
        except PgLayerError:
            pass  # the database is still unavailable
        self._is_proving = False

    async def ping(self, timeout: float) -> bool:
        """Renew the lease with a ping. Return False if the ping did not arrive.

        A process that polls renews the lease without a ping, and returns True.
        """
        if self.listening == "listening":
            return await self.receiver.ping(partial(self.lease.renew, timeout=timeout), timeout)
        await self.lease.renew(None, timeout)
        return True

    # ------------------------------------------------------------------ polling

    def refused(self, error: psycopg.Error) -> None:
        """Note that the server refused NOTIFY, or takes no writes."""
        if error.sqlstate == READ_ONLY:
            # The listener must leave the standby as well, and find the primary.
            if self._listener is not None:
                self._listener.reconnect()
            return
        self._fall_back(f"the server refuses NOTIFY: {error.diag.message_primary}.")

    def _fall_back(self, why: str) -> None:
        if self.polls_because is None and self._listener is not None:
            self.polls_because = why
            self._fallbacks += 1
            number = self._fallbacks
            logger.warning(
                "Without notifications: %s Polling every %g s.",
                why,
                FALLBACK_POLL,
                extra={"event": log_events.POLLING_STARTED},
            )
            self._poll_until(
                FALLBACK_POLL, lambda: self.polls_because is None or self._fallbacks != number
            )

    def _hears_again(self) -> None:
        self._is_deaf = False
        self._proved_at = time.monotonic()
        if self.polls_because is not None:
            self.polls_because = None
            logger.warning("Notifications arrive again.", extra={"event": log_events.POLLING_ENDED})

    def _poll_until(self, interval: float, is_over: Callable[[], bool]) -> None:
        async def poll_once() -> None:
            # A poll that fails is repeated. It must also end when notifications arrive again.
            if not is_over():
                await self._poll()

        async def poll() -> None:
            while not is_over():
                await self._tasks.succeed("Polling", poll_once)
                await asyncio.sleep(interval)

        self._spawn("Polling", poll)

    async def _poll(self) -> None:
        renewed_at = self._client.renewed_at
        try:
            if not renewed_at or time.monotonic() - renewed_at > self._client.config.heartbeat:
                await self.lease.renew(None, PING_TIMEOUT)
        except PgLayerError as error:
            self._outage.begin(error)
        except Exception:  # messages can be read in spite of an unexpected error
            self.receiver.catch_up_soon()
            raise
        self.receiver.catch_up_soon()

    # ------------------------------------------------------------------ the heartbeat

    async def _heartbeat(self) -> None:
        try:
            await self._beat_once(self._client.config.heartbeat)
        except PgLayerError as error:
            self._outage.begin(error)

    async def _beat_once(self, heartbeat: float) -> None:
        client, listener = self._client, self._listener
        client.cursor.forget_expired(client.clock.now())
        for pair in client.memberships.expire(client.clock.now()):
            self._writer.write_soon(*pair)
        if self.polls_because is not None:
            await self._connections.run(
                queries.look_at_queue, timeout=heartbeat, is_idempotent=True
            )
        if listener is None or not listener.is_connected:
            await self.lease.renew(None)
            if listener is not None:
                self.receiver.catch_up_soon()  # the pool reaches the database
        elif await self.receiver.ping(self.lease.renew, heartbeat / 2):
            self._hears_again()
            # A call has failed, but the listening connection has stayed.
            if self._outage.why is not None:
                self.receiver.catch_up_soon()
        elif self.polls_because is not None:
            await self._listen_from_the_end(listener)
        elif self._is_pooled:
            self._fall_back(POOLED)
        elif self._is_deaf:
            self._fall_back("they do not arrive, although the server takes LISTEN and NOTIFY.")
        else:
            self._is_deaf = True
            logger.warning(
                "The database answers, but its notifications do not arrive: reconnecting.",
                extra={"event": log_events.NOTIFICATIONS_MISSING},
            )
            listener.reconnect()

    async def _listen_from_the_end(self, listener: Listener) -> None:
        """Skip what this session has not read of NOTIFY's queue. A catch-up reads the messages.

        Only a NOTIFY that succeeds makes an idle session read the queue. If a transaction has
        filled the queue and failed, the queue stays full until all listening sessions have
        moved on in another way.
        """
        self.receiver.connection_lost()
        await listener.unlisten_to_all()
        await self.receiver.listen_to_all()
        self.receiver.catch_up_soon()


async def _wait(event: asyncio.Event, timeout: float) -> None:
    """Wait for the start of receiving. Raises `LayerUnavailable` after ``timeout`` seconds."""
    waiting = asyncio.ensure_future(event.wait())
    try:
        await asyncio.wait((waiting,), timeout=max(timeout, 0.0))
    finally:
        waiting.cancel()
    if not event.is_set():
        raise LayerUnavailable("The event loop that received before has not stopped in time.")
