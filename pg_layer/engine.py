"""What of a layer is bound to one event loop: connections, lanes, listener, tasks."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import socket
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, NamedTuple, TypeVar

from pg_layer import store
from pg_layer.client import Client, inbox_of
from pg_layer.connections import Connections
from pg_layer.exceptions import ChannelFull, LayerUnavailable, PgLayerError
from pg_layer.lane import Lane, Outcome
from pg_layer.listener import Listener
from pg_layer.receiver import Receiver

T = TypeVar("T")

logger = logging.getLogger("pg_layer")

REASSERT_MOST = 5000  # memberships a statement
FLOORS_MOST = 64
FLOOR_AGE = 0.1  # seconds: a floor is used when it is at least so old, as ids commit out of order
SENDER_IDLE = 10.0  # seconds after which a process that only sends closes its connection
FAREWELL_TIMEOUT = 2.0
SWEEP_BATCH = 1000


class Send(NamedTuple):
    """A message for a channel."""

    channel: str
    payload: bytes
    expiry: float
    capacity: int


class GroupSend(NamedTuple):
    """A message for a group."""

    group: str
    payload: bytes
    expiry: float


class Regroup(NamedTuple):
    """A channel that joins a group or leaves it."""

    group: str
    channel: str
    joins: bool


class FloorBook:
    """Remembers per inbox where counts of what waits may begin.

    A floor is used only when it is a moment old: a message with a smaller id may still be about to commit.
    """

    def __init__(self) -> None:
        self._used: dict[str, int] = {}
        self._ripening: dict[str, int] = {}
        self._since = time.monotonic()

    def learn(self, floors: store.Floors) -> None:
        """Take the floors that a statement returned."""
        for inbox, id in zip(floors.inboxes, floors.ids, strict=True):
            self._ripening.setdefault(inbox, id)
        now = time.monotonic()
        if now - self._since >= FLOOR_AGE:
            self._used, self._ripening, self._since = self._ripening, {}, now

    def tell(self) -> store.Floors:
        """The floors to count from."""
        if len(self._used) > FLOORS_MOST:
            self._used = dict(list(self._used.items())[-FLOORS_MOST:])
        return store.Floors(list(self._used), list(self._used.values()))

    def of(self, inbox: str) -> int:
        """The floor of one inbox."""
        return self._used.get(inbox, 0)


class Engine:
    """A client at work on one loop. Made on that loop.

    An engine that only sends has one connection; `start_receiving` gives it the rest.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self.loop = asyncio.get_running_loop()
        self.is_receiving = False
        self.is_closed = False
        self._tasks: set[asyncio.Task[Any]] = set()
        config = client.config
        self.connections = Connections(config, max_size=1, max_idle=SENDER_IDLE)
        self.receiver = Receiver(client, self.connections, self.spawn)
        self._listener: Listener | None = None
        self._keeps_lease = False
        # A caller on another loop waits a little longer than the write itself may take.
        timeout = config.send_timeout + 1
        self._sends = Lane[Send](self.loop, self._send, self.spawn, _payload_size, timeout)
        self._group_sends = Lane[GroupSend](self.loop, self._group_send, self.spawn, _payload_size, timeout)
        self._regroups = Lane[Regroup](self.loop, self._regroup, self.spawn, lambda op: 100, timeout)
        self._floors = FloorBook()
        self.spawn(self._guard())

    # ------------------------------------------------------------------ tasks

    @property
    def is_here(self) -> bool:
        """Whether this engine's loop is the one that runs here."""
        return _running_loop() is self.loop

    @property
    def is_running(self) -> bool:
        """Whether the loop runs, so that somebody on another may wait for it."""
        return not self.is_closed and self.loop.is_running()

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a task that ends with the engine."""
        if self.is_closed:
            work.close()
            return
        task = self.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None and not self.is_closed:
            logger.error("A task of the channel layer failed.", exc_info=error)

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Call on the engine's loop, from any thread."""
        if self.is_here:
            function(*args)
            return
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # closed: whoever takes over finds what is to be done in the client
            pass

    async def bridge(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run on the engine's loop, and wait for it on this one."""
        if self.is_here:
            return await work()
        if not self.is_running:
            raise LayerUnavailable("The event loop that served the channel layer was closed.")
        future = asyncio.run_coroutine_threadsafe(work(), self.loop)
        timeout = self.client.config.send_timeout + 1
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), timeout)
        except asyncio.TimeoutError:
            raise LayerUnavailable("The event loop that serves the channel layer does not answer.") from None

    async def _guard(self) -> None:
        """Sees the loop's end: before it closes, asyncio cancels what still runs."""
        try:
            await self.loop.create_future()
        finally:
            self.abandon()

    # ------------------------------------------------------------------ sending

    async def send(self, op: Send) -> None:
        """Send to a channel, from any loop."""
        await self._sends.submit(op)

    async def group_send(self, op: GroupSend) -> None:
        """Send to a group, from any loop."""
        await self._group_sends.submit(op)

    async def regroup(self, op: Regroup) -> None:
        """Join or leave a group, from any loop."""
        await self._regroups.submit(op)

    async def _send(self, ops: list[Send]) -> Sequence[Outcome]:
        prefix = self.client.config.prefix
        timeout = self.client.config.send_timeout
        self.client.counters["send_batches"] += 1
        if len(ops) == 1:
            op = ops[0]
            inbox = inbox_of(prefix, op.channel)
            is_full, floor = await self.connections.run(
                lambda conn: store.send_one(conn, prefix, *op, self._floors.of(inbox)), timeout=timeout
            )
            self._floors.learn(store.Floors((inbox,), (floor,)))
            full = {0} if is_full else set()
        else:
            channels, payloads, expiries, capacities = zip(*ops, strict=True)
            full, floors = await self.connections.run(
                lambda conn: store.send_batch(
                    conn, prefix, channels, payloads, expiries, capacities, self._floors.tell()
                ),
                timeout=timeout,
            )
            self._floors.learn(floors)
        self.client.counters["sent"] += len(ops) - len(full)
        self.client.counters["refused_full"] += len(full)
        return [
            ChannelFull(f"Channel {op.channel} is full: {op.capacity} messages wait.")
            if index in full
            else None
            for index, op in enumerate(ops)
        ]

    async def _group_send(self, ops: list[GroupSend]) -> Sequence[Outcome]:
        config = self.client.config
        self.client.counters["group_send_batches"] += 1
        if len(ops) == 1:
            op = ops[0]
            missed = [
                (op.group, channel)
                for channel in await self.connections.run(
                    lambda conn: store.group_send_one(conn, config.prefix, *op, config.capacity),
                    timeout=config.send_timeout,
                )
            ]
        else:
            groups, payloads, expiries = zip(*ops, strict=True)
            missed = await self.connections.run(
                lambda conn: store.group_send_batch(
                    conn, config.prefix, groups, payloads, expiries, config.capacity
                ),
                timeout=config.send_timeout,
            )
        self.client.counters["group_sent"] += len(ops)
        for group, channel in missed:
            self.client.count_dropped(group, channel)
        return [None] * len(ops)

    async def _regroup(self, ops: list[Regroup]) -> Sequence[Outcome]:
        client = self.client
        config = client.config
        last = {(op.group, op.channel): op.joins for op in ops}
        joins = [pair for pair, is_join in last.items() if is_join]
        leaves = [pair for pair, is_join in last.items() if not is_join]
        try:
            since, expires_at = await self.connections.run(
                lambda conn: store.regroup(
                    conn, config.prefix, client.inbox_name, config.lease, config.group_expiry, joins, leaves
                ),
                timeout=config.send_timeout,
                is_idempotent=True,
            )
        finally:
            # Who wants to leave hears no more, whatever becomes of the row.
            for group, channel in leaves:
                client.memberships.discard(group, channel)
        for group, channel in joins:
            if client.owns(channel):
                client.has_lease = True
                client.memberships.add(group, client.mailbox(channel), since, expires_at)
        if client.has_lease:
            self._start_keeping_lease()
        return [None] * len(ops)

    async def flush(self) -> None:
        """Remove all messages and memberships of the prefix."""
        prefix = self.client.config.prefix
        await self.connections.run(
            lambda conn: store.flush(conn, prefix),
            timeout=self.client.config.send_timeout,
            is_idempotent=True,
        )
        self.client.flush()

    # ------------------------------------------------------------------ receiving

    def start_receiving(self) -> None:
        """Begin to listen, and to keep the lease. Called on the engine's loop."""
        if self.is_receiving or self.is_closed:
            return
        self.is_receiving = True
        config = self.client.config
        self.spawn(self.connections.grow(config.pool_max_size))
        if config.poll_interval is None:
            self._listener = Listener(config, self._on_connect, self.receiver.hear)
            self.receiver.listener = self._listener
            self.spawn(self._listener.run())
        else:
            self.spawn(self._poll(config.poll_interval))
        self._start_keeping_lease()
        self.spawn(self._keep_house())

    async def _on_connect(self, conn: store.AnyConnection) -> None:
        await self._renew_on(conn, None)
        await self._reassert_on(conn)
        await self.receiver.listen(conn)

    async def _poll(self, interval: float) -> None:
        try:
            await self._renew(None)
        except PgLayerError as error:
            logger.warning("Could not take a lease: %s", error)
        while True:
            self.receiver.look_again()
            await asyncio.sleep(interval)

    # ------------------------------------------------------------------ staying alive

    async def _renew_on(self, conn: store.AnyConnection, token: str | None) -> bool:
        """Renew the lease; returns whether there was none, so that the memberships may be gone."""
        client = self.client
        asked_at = time.monotonic()
        clock, is_new = await store.renew(
            conn, client.inbox_name, socket.gethostname(), os.getpid(), client.config.lease, token
        )
        client.clock.observe(asked_at, clock)
        client.has_lease, client.renewed_at = True, asked_at
        return is_new

    async def _reassert_on(self, conn: store.AnyConnection) -> None:
        """Put the memberships back that the tables may have lost."""
        client = self.client
        members = client.memberships.all()
        for start in range(0, len(members), REASSERT_MOST):
            now = client.clock.now()
            await store.reassert(
                conn,
                client.inbox_name,
                [
                    (group, mailbox.channel, None if expires_at == math.inf else expires_at - now)
                    for group, (mailbox, _, expires_at) in members[start : start + REASSERT_MOST]
                ],
            )

    async def _renew(self, token: str | None) -> None:
        async def work(conn: store.AnyConnection) -> None:
            if await self._renew_on(conn, token):
                await self._reassert_on(conn)

        await self.connections.run(work, timeout=self.client.config.heartbeat, is_idempotent=True)

    def _start_keeping_lease(self) -> None:
        if not self._keeps_lease:
            self._keeps_lease = True
            self.spawn(self._keep_lease())

    async def _keep_lease(self) -> None:
        heartbeat = self.client.config.heartbeat
        while True:
            await asyncio.sleep(heartbeat)
            if not self.is_receiving and time.monotonic() - self.client.renewed_at < heartbeat:
                continue  # the engine that receives keeps it
            listener = self._listener
            try:
                if listener is None or not listener.is_connected:
                    await self._renew(None)
                elif await self.receiver.ping(self._renew, heartbeat / 2):
                    self.receiver.look_again()
                else:
                    logger.warning(
                        "The database answers, but its notifications do not arrive: listening anew."
                    )
                    listener.reconnect()
            except PgLayerError as error:
                logger.warning("Could not renew the lease: %s", error)

    async def _keep_house(self) -> None:
        client = self.client
        heartbeat, interval = client.config.heartbeat, client.config.sweep_interval
        swept_at = time.monotonic()
        while True:
            await asyncio.sleep(heartbeat)
            self.receiver.forget_idle_readers()
            client.forget_idle_mailboxes()
            try:
                await self.expire_unread()
                if interval and time.monotonic() - swept_at >= interval:
                    swept_at = time.monotonic()
                    await self._sweep()
            except PgLayerError as error:
                logger.warning("Could not clean up: %s", error)

    async def expire_unread(self) -> None:
        """Drop what expired in the mailboxes; a channel that nobody reads leaves its groups."""
        client = self.client
        now = client.clock.now()
        client.memberships.drop_expired(now)
        for mailbox in client.mailboxes():
            expired = mailbox.pop_expired(now)
            client.counters["dropped_expired"] += len(expired)
            for letter in expired:
                if letter.key is not None:
                    self.receiver.received(mailbox, letter.key)
            if expired and not mailbox.waiting:
                for group in client.memberships.of_channel(mailbox.channel):
                    logger.info(
                        "Channel %s leaves group %s: its messages expire unread.", mailbox.channel, group
                    )
                    await self.regroup(Regroup(group, mailbox.channel, joins=False))

    async def _sweep(self) -> None:
        prefix = self.client.config.prefix
        while swept := await self.connections.run(
            lambda conn: store.sweep(conn, prefix, SWEEP_BATCH),
            timeout=self.client.config.send_timeout,
            is_idempotent=True,
        ):
            logger.debug("Swept %s.", swept)

    # ------------------------------------------------------------------ the end

    async def close(self) -> None:
        """Give back the lease, the memberships, and the jobs that were taken and not handed over."""
        client = self.client
        await self._stop_tasks()
        try:
            if client.has_lease:
                client.has_lease = False
                farewell = client.farewell()
                await self.connections.run(
                    lambda conn: store.close(conn, farewell), timeout=FAREWELL_TIMEOUT, is_idempotent=True
                )
        except PgLayerError as error:
            logger.warning("Left without taking leave; the lease runs out by itself: %s", error)
        finally:
            await self.connections.close()
            self.abandon()

    async def stop(self) -> None:
        """Close the connections in order. The client lives on."""
        await self._stop_tasks()
        await self.connections.close()
        self.abandon()

    async def _stop_tasks(self) -> None:
        self._close_lanes()
        self.is_closed = True
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def abandon(self) -> None:
        """Drop all that is bound to the loop, also when the loop will not run again. The client lives on."""
        self._close_lanes()
        self.is_closed = True
        if self._listener is not None:
            self._listener.abandon()
        self.connections.abandon()

    def _close_lanes(self) -> None:
        for lane in (self._sends, self._group_sends, self._regroups):
            lane.close()


def _payload_size(op: Send | GroupSend) -> int:
    return len(op.payload)


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None
