"""All objects of a layer that are bound to one event loop: connections, batchers and tasks."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import psycopg

from pg_layer._db.availability import Outage
from pg_layer._db.errors import READ_ONLY
from pg_layer._db.pool import Connections
from pg_layer._db.queries import groups, lease, maintenance
from pg_layer._db.queries import receive as receiving
from pg_layer._db.session import Session
from pg_layer._process.cancelling import wait_for_cancelled
from pg_layer._process.tasks import Tasks
from pg_layer._process.threads import CHECK_INTERVAL, run_on
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

SENDER_IDLE = 7.5  # seconds after which a process that only sends closes its idle connection
CLOSE_TIMEOUT = 2.0  # seconds for the statement that closes the client
STOP_TIMEOUT = 2.0  # seconds for tasks to end
SWEEP_BATCH = 1000  # rows
PING_TIMEOUT = 3.0  # seconds


class Engine:
    """The work of a client on one event loop. Created on that loop.

    A new engine only sends, over one connection. `start_receiving` makes it the owner, and
    allows the other connections.

    Methods must be called on the engine's loop, unless their docstring permits others.
    """

    def __init__(self, client: Client, announcer: Announcer) -> None:
        self.client = client
        self.loop = asyncio.get_running_loop()
        self.thread = threading.current_thread()
        self.is_closed = False
        self.has_ended = threading.Event()  # it has no connections any more
        self.owner: Owner | None = None
        # Set when this engine no longer uses the state of receiving. The next owner
        # waits for it on another loop.
        self.stopped: Future[None] = Future()
        self._predecessor: Engine | None = None
        self.tasks = Tasks(client.failures, lambda: self.is_closed)
        self.outage = Outage(client, lambda: self.is_closed, self._is_listening)
        self.connections = Connections(
            client.config,
            max_size=1,
            max_idle=SENDER_IDLE,
            on_refused=self._refused,
            client_id=client.id,
            outage=self.outage,
        )
        self.sender = Sender(client, self.connections, self.tasks.spawn, announcer)
        self._swept_to = maintenance.START
        self._full_pass_at = time.monotonic() + maintenance.FULL_PASS
        self._is_ending = False
        self._closing: asyncio.Task[None] | None = None
        self._guard_task = self.loop.create_task(self._guard())
        self._guard_task.add_done_callback(lambda _: self.abandon())  # whatever it raised

    @property
    def is_receiving(self) -> bool:
        """Whether this engine is the owner, or is about to be. From any thread."""
        return self.owner is not None

    def _is_listening(self) -> bool:
        return self.owner is not None and self.owner.listening == "listening"

    def _refused(self, error: psycopg.Error) -> None:
        if error.sqlstate != READ_ONLY:
            self.client.notify_refused()
        if self.owner is not None:
            self.owner.refused(error)
        elif error.sqlstate != READ_ONLY:
            self.client.log_unannounced(f"the server refuses NOTIFY: {error.diag.message_primary}.")

    # ------------------------------------------------------------------ tasks

    @property
    def is_here(self) -> bool:
        """Whether the engine's loop runs in the current thread. From any thread."""
        return asyncio._get_running_loop() is self.loop

    @property
    def is_running(self) -> bool:
        """Whether the engine's loop runs, so that a foreign loop can wait. From any thread."""
        return not self.is_closed and self.loop.is_running()

    def call(self, function: Callable[..., object], *args: object) -> None:
        """Call a function on the engine's loop. From any thread."""
        if self.is_here:
            function(*args)
            return
        try:
            self.loop.call_soon_threadsafe(function, *args)
        except RuntimeError:  # the loop is closed; the next engine reads the client's state
            pass

    async def bridge(
        self,
        work: Callable[[], Coroutine[Any, Any, T]],
        *,
        is_read: bool = False,
        deadline: float | None = None,
    ) -> T:
        """Run work that may be done twice on the engine's loop. May be called on any loop.

        ``is_read``: the work changes nothing.
        ``deadline``: when the work ends at the latest, by time.monotonic(). Default: after the
        timeout.

        Raises `NotBegun` if the engine ends before the work does. Then the caller runs it on
        another engine.
        """
        try:
            if self.is_here:
                return await work()
            if not self.is_running:
                raise NotBegun
            timeout = (
                self.client.config.send_timeout if deadline is None else deadline - time.monotonic()
            )
            return await run_on(
                self.loop, self.thread, self._serve(work), timeout + 1, is_read=is_read
            )
        except LayerUnavailable as error:
            if self.is_closed:  # the error only reports that the connections were closed
                raise NotBegun(may_have_begun=isinstance(error, OutcomeUnknown)) from error
            raise

    async def _serve(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run work for a caller on a foreign loop. It is cancelled when the engine ends."""
        if self.is_closed:
            raise NotBegun
        task = asyncio.current_task()
        assert task is not None
        self.tasks.add(task)
        return await work()

    async def _guard(self) -> None:
        """Wait for the end of the loop, and close the connections in order.

        Before a loop closes, asyncio cancels the tasks that still run, and so this one.
        `_close_connections` cancels it as well.
        """
        try:
            await self.loop.create_future()
        except asyncio.CancelledError:
            self._is_ending = True
            self.sender.close()
            self.is_closed = True
            try:
                await wait_for_cancelled(self.tasks.running, STOP_TIMEOUT)
            finally:
                # Also if the loop ends while `stop` or `close` waits here: an attempt to connect
                # may have swallowed its cancellation, and asyncio would wait for it.
                await self.connections.close()
            raise

    # ------------------------------------------------------------------ calls

    @property
    def pending_operations(self) -> int:
        """The number of operations that wait for a write in flight. From any thread."""
        return self.sender.waiting + (0 if self.owner is None else self.owner.changes.waiting)

    async def change(self, change: Change) -> None:
        """Add a channel to a group, or discard it.

        If another process owns the channel, send its owner a membership request.

        Raises `NotBegun` if this engine does not receive and the channel is its client's.
        """
        if not self.client.owns(change.channel):
            await self.sender.submit(change)
        elif self.owner is None:
            raise NotBegun
        else:
            await self.owner.changes.submit(change)

    async def flush(self) -> lease.Flushed:
        """Remove all messages and memberships of the prefix. See `pg_layer._runtime.flush`."""
        return await self.sender.flush()

    async def unconfirmed(self, flushed: lease.Flushed, timeout: float) -> list[lease.Unconfirmed]:
        """Return the live clients that have not confirmed a flush."""
        work = partial(lease.unconfirmed, flushed=flushed)
        return await self.connections.run(work, timeout=timeout, is_read=True)

    async def group_channels(self, group: str, deadline: float) -> list[str]:
        """Return the channels in a group, except the channels of clients whose lease is over.

        ``deadline``: by time.monotonic().
        """
        return await self._read(
            partial(groups.group_channels, prefix=self.client.config.prefix, group=group), deadline
        )

    async def group_count(self, group: str, deadline: float) -> int:
        """Return the number of channels that `group_channels` returns."""
        return await self._read(
            partial(groups.group_count, prefix=self.client.config.prefix, group=group), deadline
        )

    async def _read(self, work: Callable[[Session], Coroutine[Any, Any, T]], deadline: float) -> T:
        timeout = deadline - time.monotonic()
        return await self.connections.run(work, timeout=timeout, is_read=True)

    async def ping(self) -> bool:
        """Check that the database answers and, if this process receives, that it is notified.

        Return False if the notification did not arrive.

        Raises `LayerUnavailable` if the database does not answer.
        """
        config = self.client.config
        timeout = min(config.send_timeout, config.heartbeat / 2, PING_TIMEOUT)
        if self.owner is not None:
            return await self.owner.ping(timeout)
        await self.connections.run(receiving.probe, timeout=timeout, is_read=True)
        return True

    def want(self, channel: str) -> None:
        """Claim jobs for a reader that waits on a normal channel."""
        if self.owner is not None:
            self.owner.want(channel)

    def schedule_deletion(self, queue: ChannelQueue) -> None:
        """Have the row of a message deleted that a reader of ``queue`` has received."""
        if self.owner is not None:
            self.owner.schedule_deletion(queue)

    async def settle(self, queue: ChannelQueue) -> None:
        """Wait until the rows of messages that were received from ``queue`` are deleted.

        Senders count them until then, and refuse messages if the channel is full.
        """
        if self.owner is not None:
            await self.owner.receiver.deletions.wait_for(queue)

    # ------------------------------------------------------------------ receiving

    def start_receiving(self, predecessor: Engine | None) -> None:
        """Become the owner as soon as ``predecessor`` has stopped."""
        if self.owner is not None or self.is_closed:
            return
        self._predecessor = predecessor
        self.owner = Owner(
            self.client, self.connections, self.outage, self.tasks, self._wait_for_predecessor
        )
        config = self.client.config
        # Heartbeats use one connection. It must not be closed between two of them.
        max_idle = max(SENDER_IDLE, 2.5 * config.heartbeat)
        self.connections.resize(config.pool_max_size, max_idle)
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
            self._full_pass_at = time.monotonic() + maintenance.FULL_PASS
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
        """Close the client: end its lease and memberships, and release its jobs.

        May be called on any loop. If a caller on a foreign loop is cancelled, the close continues.

        Raises `NotBegun` if the engine has ended before, or its loop ends meanwhile.
        """
        if self.is_here:
            await self._close()
        elif self.loop.is_running():
            await run_on(
                self.loop,
                self.thread,
                self._close(),
                self.client.config.send_timeout + 1,
                outlives_caller=True,
            )
        else:
            self.abandon()
            raise NotBegun

    def close_soon(self, then: Callable[[], object] = lambda: None) -> None:
        """Begin to close the client. From any thread, also in a finaliser. Does not raise.

        If the loop does not run, only the connections are closed, and the lease expires by itself.
        ``then``: called on the loop at the end.
        """

        async def close() -> None:
            try:
                await self._close()
            except NotBegun:
                pass
            finally:
                then()

        def begin() -> None:
            self._closing = self.loop.create_task(close())  # asyncio keeps weak references only

        if self.loop.is_running():
            with suppress(RuntimeError):  # the loop was closed just now
                self.loop.call_soon_threadsafe(begin)
        else:
            self.abandon()

    async def _close(self) -> None:
        if self.is_closed:
            await asyncio.wait({self._guard_task})
            raise NotBegun
        self.connections.begin_closing()
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
                "Could not end the lease on close; it expires by itself: %s",
                error,
                extra={"event": log_events.CLOSE_FAILED},
            )
        else:
            client.lease_ended()

    async def stop(self) -> None:
        """Stop the engine when the writes in flight have ended. The client stays in use.

        If the client closes, do not wait longer than `STOP_TIMEOUT`.
        """
        finishing = self.loop.create_task(self.sender.finish())
        try:
            await asyncio.wait(
                {finishing}, timeout=STOP_TIMEOUT if self.connections.is_closing else None
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
        await wait_for_cancelled(tasks, STOP_TIMEOUT)

    async def _close_connections(self) -> None:
        """Make the guard close the connections, and wait for it."""
        if not self._is_ending:  # a second cancellation would interrupt the guard
            self._is_ending = True
            self._guard_task.cancel()
        await asyncio.wait({self._guard_task})

    def abandon(self) -> None:
        """Drop everything that is bound to the loop. The client stays in use.

        May be called from any thread if the loop does not run any more.
        """
        self.sender.close()
        self.is_closed = True
        if self.owner is not None:
            self.owner.abandon()
        self.connections.abandon()
        self.has_ended.set()
        self._end_ownership()
        self.call(self._cancel_tasks)  # in case the loop runs again

    def cut(self) -> None:
        """Shut the sockets of the connections down. From any thread."""
        if self.owner is not None:
            self.owner.cut()
        self.connections.cut()

    async def _wait_for_predecessor(self) -> None:
        """Wait until the previous owner no longer uses the state of receiving."""
        before = self._predecessor
        if before is None:
            return
        stopped = asyncio.wrap_future(before.stopped)
        while not stopped.done():
            await asyncio.wait((stopped,), timeout=CHECK_INTERVAL)
            if not stopped.done() and not before.loop.is_running():
                before.abandon()  # its loop cannot run `stop`

    def _end_ownership(self) -> None:
        """Notify the next owner that this engine no longer uses the state of receiving."""
        before, self._predecessor = self._predecessor, None
        if before is None or before.stopped.done():
            self._set_stopped()
        else:  # this engine has not begun to receive, but the one before has not stopped yet
            before.stopped.add_done_callback(lambda _: self._set_stopped())

    def _set_stopped(self) -> None:
        if not self.stopped.done():
            self.stopped.set_result(None)

    def _cancel_tasks(self) -> None:
        for task in self.tasks.running:
            task.cancel()
        if not self._is_ending:
            self._guard_task.cancel()
