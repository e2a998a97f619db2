"""What of a layer is bound to one event loop: connections, batchers, tasks, and perhaps the owner."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from functools import partial
from typing import Any, TypeVar

import psycopg

from pg_layer._db.availability import Outage
from pg_layer._db.errors import READ_ONLY
from pg_layer._db.pool import Connections, idle_period
from pg_layer._db.queries import groups, lease, maintenance
from pg_layer._db.queries import receive as receiving
from pg_layer._db.session import Session
from pg_layer._process.tasks import Tasks
from pg_layer._process.threads import LOOK, run_on
from pg_layer._runtime.owner import Owner
from pg_layer._send.announcer import Announcer
from pg_layer._send.operations import Change
from pg_layer._send.sender import Sender
from pg_layer._state import log_events
from pg_layer._state.channel_queue import ChannelQueue
from pg_layer._state.client import Client
from pg_layer.exceptions import LayerUnavailable, NotBegun, OutcomeUnknown, PgLayerError

T = TypeVar("T")

logger = logging.getLogger("pg_layer")

SENDER_IDLE = 10.0  # seconds within which a process that only sends closes its idle connection
CLOSE_TIMEOUT = 2.0
STOP_TIMEOUT = 2.0
SWALLOWED = 0.2  # seconds after which a cancellation has been swallowed
SWEEP_BATCH = 1000
FULL_PASS = 3600.0  # seconds between two sweeps that begin with the oldest message
PING_TIMEOUT = 3.0


class Engine:
    """A client at work on one loop. Made on that loop.

    An engine that only sends has one connection; `start_receiving` makes it the owner and gives it the rest.
    """

    def __init__(self, client: Client, announcer: Announcer) -> None:
        self.client = client
        self.loop = asyncio.get_running_loop()
        self.thread = threading.current_thread()
        self.is_closed = False
        self.owner: Owner | None = None
        # Of any thread: the next owner waits for it on another loop.
        self.stopped: Future[None] = Future()
        self._predecessor: Engine | None = None
        self.tasks = Tasks(client.failures, lambda: self.is_closed)
        self.outage = Outage(client, lambda: self.is_closed)
        self.connections = Connections(
            client.config,
            max_size=1,
            period=idle_period(SENDER_IDLE),
            on_refused=lambda error: self.call(self._refused, error),
            client_id=client.id,
            is_away=lambda: None if self.owner is None else self.outage.is_away,
        )
        self.sender = Sender(client, self.connections, self.tasks.spawn, announcer)
        self._swept_to = maintenance.START
        self._full_pass_at = time.monotonic() + FULL_PASS
        self._is_ending = False
        self._guard_task = self.loop.create_task(self._guard())
        self._guard_task.add_done_callback(lambda _: self.abandon())

    @property
    def is_receiving(self) -> bool:
        """Whether this engine receives for the client, or is about to."""
        return self.owner is not None

    def _refused(self, error: psycopg.Error) -> None:
        if error.sqlstate != READ_ONLY:
            self.client.counters.add("refused_notifications")
        if self.owner is not None:
            self.owner.refused(error)
        elif error.sqlstate != READ_ONLY:
            self.client.silent(f"the server refuses NOTIFY: {error.diag.message_primary}.")

    # ------------------------------------------------------------------ tasks

    @property
    def is_here(self) -> bool:
        """Whether this engine's loop is the one that runs here."""
        return asyncio._get_running_loop() is self.loop

    @property
    def is_running(self) -> bool:
        """Whether the loop runs, so that somebody on another may wait for it."""
        return not self.is_closed and self.loop.is_running()

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Call on the engine's loop, from any thread."""
        if self.is_here:
            function(*args)
            return
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # closed: whoever takes over finds what is to be done in the client
            pass

    async def bridge(
        self, work: Callable[[], Coroutine[Any, Any, T]], *, is_read: bool = False
    ) -> T:
        """Run on the engine's loop what may be done twice, and wait for it on this one.

        ``is_read``: it changes nothing. Raises `NotBegun` if the engine ends before that is done: another one
        does it again.
        """
        try:
            if self.is_here:
                return await work()
            if not self.is_running:
                raise NotBegun
            timeout = self.client.config.send_timeout + 1
            return await run_on(self.loop, self.thread, self._serve(work), timeout, is_read=is_read)
        except LayerUnavailable as error:
            if self.is_closed:  # its connections were closed
                raise NotBegun(may_have_begun=isinstance(error, OutcomeUnknown)) from error
            raise

    async def _serve(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run what a caller on another loop waits for. It is cancelled when the engine ends."""
        if self.is_closed:
            raise NotBegun
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        return await work()

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
            try:
                # These have been cancelled as well.
                await _end_of(self.tasks.running)
                # What other loops write right now has nothing to do with the end of this one.
                await asyncio.wait(
                    {self.loop.create_task(self.sender.guests_finish())}, timeout=STOP_TIMEOUT
                )
                await self.connections.close()
            except asyncio.CancelledError:
                # The loop ends while `stop` or `close` waits here. The pool must still be closed: its worker
                # goes on after a cancellation, and asyncio waits for it.
                await self.connections.close()
            raise

    # ------------------------------------------------------------------ what callers ask for

    @property
    def pending_operations(self) -> int:
        """How many operations wait for a write in flight. From any thread."""
        return self.sender.waiting + (0 if self.owner is None else self.owner.changes.waiting)

    async def change(self, change: Change) -> None:
        """Add a channel to a group or discard it; the owner of the channel is asked if that is another."""
        if not self.client.owns(change.channel):
            await self.sender.submit(change)
        elif self.owner is None:
            raise NotBegun
        else:
            await self.owner.changes.submit(change)

    async def flush(self) -> None:
        """Remove all messages and memberships of the prefix."""
        key = await self.sender.flush()
        if key is not None and self.owner is not None:
            try:
                await self.owner.flushed(key, self.client.config.send_timeout)
            except LayerUnavailable as error:
                raise OutcomeUnknown("All was removed, but not here yet.") from error

    async def group_channels(self, group: str) -> list[str]:
        """The channels in a group, without those of clients that are gone."""
        return await self._ask(
            partial(groups.group_channels, prefix=self.client.config.prefix, group=group)
        )

    async def group_count(self, group: str) -> int:
        """How many they are."""
        return await self._ask(
            partial(groups.group_count, prefix=self.client.config.prefix, group=group)
        )

    async def _ask(self, work: Callable[[Session], Coroutine[Any, Any, T]]) -> T:
        timeout = self.client.config.send_timeout
        return await self.connections.run(work, timeout=timeout, is_read=True)

    async def ping(self) -> bool:
        """Ask the database whether it is there, by the way of messages. Return whether that worked."""
        config = self.client.config
        timeout = min(config.send_timeout, config.heartbeat / 2, PING_TIMEOUT)
        if self.owner is not None:
            return await self.owner.ping(timeout)
        await self.connections.run(receiving.probe, timeout=timeout, is_read=True)
        return True

    def want(self, channel: str) -> None:
        """A reader waits on a normal channel. On the engine's loop."""
        if self.owner is not None:
            self.owner.want(channel)

    def received(self, queue: ChannelQueue) -> None:
        """A message was received that has a row. On the engine's loop."""
        if self.owner is not None:
            self.owner.received(queue)

    async def settle(self, queue: ChannelQueue) -> None:
        """Wait until senders no longer count what was received from a channel."""
        if self.owner is not None:
            await self.owner.receiver.deletions.settle(queue)

    # ------------------------------------------------------------------ receiving

    def start_receiving(self, predecessor: Engine | None) -> None:
        """Become the owner, when its predecessor has stopped. Called on the engine's loop."""
        if self.owner is not None or self.is_closed:
            return
        self._predecessor = predecessor
        self.owner = Owner(
            self.client, self.connections, self.outage, self.tasks, self._wait_for_predecessor
        )
        config = self.client.config
        # Heartbeats use one connection: it is not closed between two of them.
        period = max(idle_period(SENDER_IDLE), 2.5 * config.heartbeat)
        self.tasks.spawn(
            "The growth of the connection pool",
            partial(self.connections.grow, config.pool_max_size, period),
        )
        self.tasks.every(config.heartbeat, "Housekeeping", self._keep_house)
        if config.sweep_interval:
            self.tasks.every(config.sweep_interval, "Sweeping", self._sweep)

    # ------------------------------------------------------------------ housekeeping

    async def _keep_house(self) -> None:
        client = self.client
        if self.owner is not None:
            self.owner.forget_idle()
        client.forget_idle_queues()
        for queue in client.queues():
            client.drop_expired(queue)

    async def _sweep(self) -> None:
        try:
            await self._sweep_all()
        except PgLayerError as error:
            logger.info("Could not clean up: %s", error, extra={"event": log_events.SWEEP_FAILED})

    async def _sweep_all(self) -> None:
        prefix = self.client.config.prefix
        if time.monotonic() >= self._full_pass_at:
            self._swept_to = maintenance.START
            self._full_pass_at = time.monotonic() + FULL_PASS
        while True:
            part = await self.connections.run(
                partial(maintenance.sweep, prefix=prefix, limit=SWEEP_BATCH, after=self._swept_to),
                timeout=self.client.config.send_timeout,
                is_idempotent=True,
            )
            if part is None:
                return
            swept, self._swept_to = part
            if not any(swept):
                return
            logger.debug("Swept %s.", swept, extra={"event": log_events.SWEPT})

    # ------------------------------------------------------------------ the end

    async def close(self) -> None:
        """Give back the lease, the memberships, and the jobs that were taken and not handed over.

        From any loop. Begun, it goes on if a caller on another loop is cancelled. Raises `NotBegun` if the
        engine has ended before, or its loop ends meanwhile.
        """
        if self.is_here:
            await self._close()
        elif self.loop.is_running():
            await run_on(
                self.loop,
                self.thread,
                self._close(),
                self.client.config.send_timeout + 1,
                goes_on=True,
            )
        else:
            self.abandon()
            raise NotBegun

    async def _close(self) -> None:
        if self.is_closed:
            await asyncio.wait({self._guard_task})
            raise NotBegun
        self.connections.is_ending = True
        try:
            await self._stop_tasks()
            if self.client.has_lease:
                await self._end_client()
        finally:
            await self._close_connections()

    async def _end_client(self) -> None:
        client = self.client
        closing = lease.Closing(client.config.prefix, client.address, client.close())
        try:
            await self.connections.run(
                partial(lease.close, closing=closing, quiet=False),
                quietly=partial(lease.close, closing=closing, quiet=True),
                timeout=CLOSE_TIMEOUT,
                is_idempotent=True,
            )
        except PgLayerError as error:
            logger.warning(
                "Could not give back the lease on closing; it runs out by itself: %s",
                error,
                extra={"event": log_events.CLOSE_FAILED},
            )
        else:
            client.has_lease = False

    async def stop(self) -> None:
        """Close when what was begun is done, or soon if the client ends. Otherwise that lives on."""
        finishing = self.loop.create_task(self.sender.finish())
        try:
            await asyncio.wait(
                {finishing}, timeout=STOP_TIMEOUT if self.connections.is_ending else None
            )
        finally:
            finishing.cancel()
        await self._stop_tasks()
        self._end_ownership()
        await self._close_connections()

    async def _stop_tasks(self) -> None:
        self.sender.close()
        if self.owner is not None:
            self.owner.changes.close()
        self.is_closed = True
        tasks = self.tasks.running - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await _end_of(tasks)

    async def _close_connections(self) -> None:
        """The guard does that, and ends."""
        if not self._is_ending:  # another call may have begun: the guard must not be interrupted
            self._is_ending = True
            self._guard_task.cancel()
        await asyncio.wait({self._guard_task})

    def abandon(self) -> None:
        """Drop all that is bound to the loop, also when the loop will not run again. The client lives on."""
        self.sender.close()
        self.is_closed = True
        if self.owner is not None:
            self.owner.abandon()
        self.connections.abandon()
        self._end_ownership()
        self.call(self._cancel_tasks)  # should that loop run again, it finds nothing to do

    async def _wait_for_predecessor(self) -> None:
        """Wait until no other thread touches the client's state of receiving."""
        before = self._predecessor
        if before is None:
            return
        stopped = asyncio.wrap_future(before.stopped)
        while not stopped.done():
            await asyncio.wait((stopped,), timeout=LOOK)
            if not stopped.done() and not before.loop.is_running():
                before.abandon()  # it will not stop by itself any more

    def _end_ownership(self) -> None:
        """This engine does not touch the client's state of receiving any more."""
        before, self._predecessor = self._predecessor, None
        if before is None or before.stopped.done():
            self._set_stopped()
        else:  # this one had not begun yet
            before.stopped.add_done_callback(lambda _: self._set_stopped())

    def _set_stopped(self) -> None:
        if not self.stopped.done():
            self.stopped.set_result(None)

    def _cancel_tasks(self) -> None:
        for task in self.tasks.running:
            task.cancel()
        if not self._is_ending:
            self._guard_task.cancel()


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
