"""What of a layer is bound to one event loop: connections, lanes, listener, tasks."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, TypeVar

from pg_layer import roster, store
from pg_layer.client import Client
from pg_layer.connections import Connections
from pg_layer.exceptions import LayerUnavailable, PgLayerError
from pg_layer.liveness import Liveness
from pg_layer.ops import Regroup
from pg_layer.outage import Outage
from pg_layer.receiver import Receiver
from pg_layer.sender import Sender
from pg_layer.session import Session

T = TypeVar("T")

logger = logging.getLogger("pg_layer")

SENDER_IDLE = 10.0  # seconds after which a process that only sends closes its connection
FAREWELL_TIMEOUT = 2.0
STOP_TIMEOUT = 2.0
SWALLOWED = 0.2  # seconds after which a cancellation has been swallowed
SWEEP_BATCH = 1000


class Engine:
    """A client at work on one loop. Made on that loop.

    An engine that only sends has one connection; `start_receiving` gives it the rest. If the client has a
    lease, this one keeps it from here on.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self.loop = asyncio.get_running_loop()
        self.is_receiving = False
        self.is_closed = False
        self._tasks: set[asyncio.Task[Any]] = set()
        config = client.config
        self.outage = Outage(client)
        self.connections = Connections(
            config,
            max_size=1,
            max_idle=SENDER_IDLE,
            on_refused=lambda error: self.call(self.liveness.refused, error),
            client_id=client.id,
        )
        self.receiver = Receiver(client, self.connections, self.spawn, self.outage)
        self.liveness = Liveness(client, self.connections, self.receiver, self.outage, self.spawn)
        self.sender = Sender(
            client, self.connections, self.spawn, on_lease=lambda: self.call(self.liveness.keep)
        )
        self._is_ending = False
        self._guard_task = self.loop.create_task(self._guard())
        self._guard_task.add_done_callback(lambda _: self.abandon())
        self._tasks.add(self._guard_task)
        if client.has_lease:
            self.liveness.keep()

    # ------------------------------------------------------------------ tasks

    @property
    def is_here(self) -> bool:
        """Whether this engine's loop is the one that runs here."""
        return asyncio._get_running_loop() is self.loop

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
        future = asyncio.run_coroutine_threadsafe(_uncancelled(work), self.loop)
        timeout = self.client.config.send_timeout + 1
        answer = asyncio.wrap_future(future)
        try:
            await asyncio.wait((answer,), timeout=timeout)
            if not answer.done():
                raise LayerUnavailable("The event loop that serves the channel layer does not answer.")
            return answer.result()
        finally:
            answer.cancel()

    async def _guard(self) -> None:
        """Sees the loop's end: before it closes, asyncio cancels what still runs.

        The pool is closed in order even then: its tasks may miss a cancellation, as `asyncio.wait_for` does
        before Python 3.12.
        """
        try:
            await self.loop.create_future()
        except asyncio.CancelledError:
            self._is_ending = True
            self.sender.close()
            self.is_closed = True
            # These have been cancelled as well.
            await _end_of(self._tasks - {self._guard_task})
            # What other loops write right now has nothing to do with the end of this one.
            await asyncio.wait({self.loop.create_task(self.sender.guests_finish())}, timeout=STOP_TIMEOUT)
            await self.connections.close()
            raise

    # ------------------------------------------------------------------ sending

    async def flush(self) -> None:
        """Remove all messages and memberships of the prefix."""
        prefix = self.client.config.prefix
        id = await self.connections.run(
            lambda session: store.flush(session, prefix),
            timeout=self.client.config.send_timeout,
            is_idempotent=True,
        )
        self.client.flush(id)

    async def group_channels(self, group: str) -> list[str]:
        """The live members of a group."""
        return await self._ask(partial(roster.group_channels, prefix=self.client.config.prefix, group=group))

    async def group_count(self, group: str) -> int:
        """How many they are."""
        return await self._ask(partial(roster.group_count, prefix=self.client.config.prefix, group=group))

    async def _ask(self, work: Callable[[Session], Coroutine[Any, Any, T]]) -> T:
        timeout = self.client.config.send_timeout
        return await self.connections.run(work, timeout=timeout, is_idempotent=True)

    # ------------------------------------------------------------------ receiving

    def start_receiving(self) -> None:
        """Begin to listen, and to keep the lease. Called on the engine's loop."""
        if self.is_receiving or self.is_closed:
            return
        self.is_receiving = True
        self.spawn(self.connections.grow(self.client.config.pool_max_size))
        self.liveness.start_listening()
        self.spawn(self._keep_house())

    # ------------------------------------------------------------------ housekeeping

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
                logger.info("Could not clean up: %s", error)

    async def expire_unread(self) -> None:
        """Drop what expired in the mailboxes; a channel that nobody reads leaves its groups."""
        client = self.client
        now = client.clock.now()
        client.memberships.drop_expired(now)
        for mailbox in client.mailboxes():
            client.drop_expired(mailbox)
            self.receiver.deleter.soon()
            neglected, mailbox.neglected = mailbox.neglected, -1
            if neglected >= 0 and not mailbox.waiting:
                for group in client.memberships.of_channel(mailbox.channel):
                    logger.info(
                        "Channel %s leaves group %s: its messages expire unread.", mailbox.channel, group
                    )
                    await self.sender.submit(Regroup(group, mailbox.channel, False, unless_since=neglected))

    async def _sweep(self) -> None:
        prefix = self.client.config.prefix
        place = store.START
        while True:
            batch = await self.connections.run(
                partial(store.sweep, prefix=prefix, limit=SWEEP_BATCH, after=place),
                timeout=self.client.config.send_timeout,
                is_idempotent=True,
            )
            if batch is None or not any(batch[0]):
                return
            swept, place = batch
            logger.debug("Swept %s.", swept)

    # ------------------------------------------------------------------ the end

    async def close(self) -> None:
        """Give back the lease, the memberships, and the jobs that were taken and not handed over."""
        client = self.client
        await self._stop_tasks()
        try:
            farewell = client.farewell()
            if client.has_lease:
                client.has_lease = False
                await self.connections.run(
                    lambda session: store.close(session, farewell),
                    timeout=FAREWELL_TIMEOUT,
                    is_idempotent=True,
                )
        except PgLayerError as error:
            logger.warning("Could not give back the lease on closing; it runs out by itself: %s", error)
        finally:
            await self._close_connections()

    async def stop(self) -> None:
        """Close when what was begun is done. The client lives on."""
        await self.sender.finish()
        await self._stop_tasks()
        await self._close_connections()

    async def _stop_tasks(self) -> None:
        self.sender.close()
        self.is_closed = True
        tasks = self._tasks - {asyncio.current_task()} - {self._guard_task}
        for task in tasks:
            task.cancel()
        await _end_of(tasks)

    async def _close_connections(self) -> None:
        """The guard does that, and ends."""
        self._guard_task.cancel()
        await asyncio.wait({self._guard_task})

    def abandon(self) -> None:
        """Drop all that is bound to the loop, also when the loop will not run again. The client lives on."""
        self.sender.close()
        self.is_closed = True
        self.liveness.abandon()
        self.connections.abandon()
        self.call(self._cancel_tasks)  # should that loop run again, it finds nothing to do

    def _cancel_tasks(self) -> None:
        for task in self._tasks:
            if not (self._is_ending and task is self._guard_task):
                task.cancel()


async def _uncancelled(work: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Who waits on another loop was not cancelled because this one ends."""
    try:
        return await work()
    except asyncio.CancelledError:
        raise LayerUnavailable("The event loop that served the channel layer was closed.") from None


async def _end_of(tasks: set[asyncio.Task[Any]]) -> None:
    """Wait for tasks that were cancelled.

    They are once more, if need be: before Python 3.12 `asyncio.wait_for`, on which psycopg's pool waits, may
    swallow a cancellation. Not at once, as that would interrupt the pool's tidying up.
    """
    if not tasks:
        return
    _, late = await asyncio.wait(tasks, timeout=SWALLOWED)
    for task in late:
        task.cancel()
    if late:
        await asyncio.wait(late, timeout=STOP_TIMEOUT)
