"""The event loops that do the work of a layer in this process.

The first event loop that uses the layer gets the *main engine*, which holds the connections.
Calls on other ("foreign") loops are passed to it. A loop that receives takes over from a main
engine that only sends, and becomes the *owner loop*.

A loop that `async_to_sync` made for one call ("single-call loop") does not take over by
sending. If there is no main engine, it uses the *background loop*, which runs in a thread of its
own. gevent and eventlet have no such thread. There, each single-call loop takes over. The
background loop is also the owner loop of a process that adds its channels to groups by synchronous
calls and does not receive.

A new owner begins when the old one has stopped, so that one thread at a time uses the state
of receiving. No call waits for a loop that does not run.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing as closing_connection
from functools import partial
from typing import Any, ClassVar, NoReturn, TypeVar

import psycopg

from pg_layer._config.databases import is_test_environment, settings_of
from pg_layer._config.options import Config
from pg_layer._db.errors import NOTIFY_REFUSED, as_stopping
from pg_layer._db.queries import lease
from pg_layer._groups.order import GroupOrder
from pg_layer._messages.codec import Codec
from pg_layer._process import shutdown as termination
from pg_layer._process.loop_end import end_tasks_on_close
from pg_layer._process.threads import are_threads_real, is_single_call_loop
from pg_layer._runtime.engine import Engine
from pg_layer._send.announcer import Announcer
from pg_layer._send.operations import Change, GroupSend, Many, Operation
from pg_layer._state import log_events
from pg_layer._state.client import Client
from pg_layer._state.counters import Counters, State
from pg_layer.exceptions import LayerUnavailable, NotBegun, OutcomeUnknown

# Seconds for a dropped layer to close: its statement, its tasks, and a connection.
DROPPED_TIMEOUT = 5.0

T = TypeVar("T")
Work = Callable[[Engine], Coroutine[Any, Any, T]]

logger = logging.getLogger("pg_layer")


class BackgroundLoop:
    """A daemon thread with an event loop and an engine. It starts when it is created."""

    def __init__(self, client: Client, announcer: Announcer) -> None:
        self._client = client
        self._announcer = announcer
        self._ready = threading.Event()
        self._retired = asyncio.Event()
        self._engine: Engine | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="pg_layer-background", daemon=True)
        self._thread.start()

    @property
    def engine(self) -> Engine:
        """The engine. Waits for the start of the thread.

        Raises `LayerUnavailable` if the thread could not start.
        """
        self._ready.wait()
        if self._engine is None:
            raise LayerUnavailable(f"The channel layer's thread could not start: {self._error}")
        return self._engine

    @property
    def engine_now(self) -> Engine | None:
        """The engine; None if the thread has not started. Does not block."""
        return self._engine

    @property
    def pending_operations(self) -> int:
        """The number of operations that wait for a write in flight. Does not block."""
        return 0 if self._engine is None else self._engine.pending_operations

    @property
    def is_over(self) -> bool:
        """Whether the thread could not start, or its engine has ended."""
        return self._ready.is_set() and not (self._engine is not None and self._engine.is_running)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:
            self._error = error
            logger.error(
                "The channel layer's thread failed.",
                exc_info=error,
                extra={"event": log_events.BACKGROUND_LOOP_FAILED},
            )
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._engine = engine = Engine(self._client, self._announcer)
        self._ready.set()
        try:
            await self._retired.wait()
        finally:
            await engine.stop()

    def retire(self, *, is_closing: bool = False) -> None:
        """Close the connections and end the thread when the operations in flight have ended.

        ``is_closing``: the client closes. Then do not wait for a database that is unavailable.
        """
        self._ready.wait()
        if self._engine is not None:
            if is_closing:
                self._engine.connections.begin_closing()
            self._engine.call(self._retired.set)

    def close_soon(self) -> None:
        """Begin to close the client, and then retire. Does not raise. Does not wait."""
        if self._engine is not None:
            self._engine.close_soon(then=self._retired.set)

    def close(self) -> None:
        """Retire, and block until the thread has ended."""
        self.retire(is_closing=True)
        if threading.current_thread() is not self._thread:
            self._thread.join()


class Loops:
    """The choice of the engine for a caller, and the path of its work between event loops.

    ``capacity_of``: see `Client`. All methods may be called from any thread.
    """

    def __init__(
        self, config: Config, codec: Codec, capacity_of: Callable[[str], int] | None = None
    ) -> None:
        self._capacity_of = capacity_of
        self._config = config
        self._codec = codec
        self._lock = threading.RLock()
        self._counters = Counters()
        self.announcer = Announcer()
        self._order = GroupOrder()
        # Clients whose close has begun and may be incomplete, with their engines.
        self._ending: dict[Client, tuple[Engine | None, BackgroundLoop | None]] = {}
        self._closings: set[asyncio.Task[None]] = set()  # asyncio keeps weak references only
        self._begin_client()
        termination.register(self)

    def _begin_client(self) -> None:
        self._client = Client(self._config, self._codec, self._counters, self._capacity_of)
        # Since an engine uses the database: its settings, and the NAME in them.
        self._settings: Mapping[str, Any] = {}
        self.database: object = None
        self._main_engine: Engine | None = None
        self._background: BackgroundLoop | None = None
        self._owner: Engine | None = None  # the last engine that became the owner
        self.receives_in_background = False  # whether the background loop is the owner loop

    @property
    def client(self) -> Client:
        """The client. A new one begins if Django's settings now name another database."""
        if self._settings.get("NAME") != self.database:  # 0.1 us for each call of the layer
            self._follow_settings()
        return self._client

    def _follow_settings(self) -> None:
        """Begin a new client if Django's settings now name another database.

        Django's test runner switches to a test database, in the processes of ``--parallel`` without
        any signal. Does not wait: the lease in the former database ends by itself.
        """
        with self._lock:
            before, now = self.database, settings_of(self._config).get("NAME")
            if before in (None, now):
                return
            client, main, background = self._client, self._main_engine, self._background
            self._begin_client()
        if not is_test_environment():
            logger.warning(
                "NAME of the layer's database in DATABASES has changed from %r to %r. The layer"
                " begins anew there: its channels no longer exist.",
                before,
                now,
                extra={"event": log_events.DATABASE_CHANGED},
            )
        client.close()
        if main is not None:
            _stop(main)
        if background is not None:
            background.retire(is_closing=True)

    @property
    def main_engine(self) -> Engine | None:
        """The engine that holds the connections, even if its loop does not run any more."""
        return self._main_engine

    @property
    def using(self) -> str | None:
        """The alias of the database in DATABASES; None for a layer with a ``dsn``."""
        return self._config.using

    @property
    def is_used(self) -> bool:
        """Whether `close` has anything to do."""
        is_begun = (
            self._main_engine is not None or self._background is not None or self._client.has_lease
        )
        return is_begun or bool(self._ending)

    @property
    def gives_up(self) -> bool:
        """Whether no call waits for the database: see `Connections.gives_up`."""
        engines = (self._main_engine, self._owner)
        return any(
            engine is not None and not engine.is_closed and engine.connections.gives_up
            for engine in engines
        )

    # ------------------------------------------------------------------ which engine

    def for_receiving(self, loop: asyncio.AbstractEventLoop) -> Engine:
        """Return the engine that receives for ``loop``, which runs in the current thread.

        It is the engine of this loop, or one that receives already on another loop.
        """
        main = self._main_engine
        if main is not None and main.is_receiving and main.loop is loop and not main.is_closed:
            return main
        with self._lock:
            main = self._main_engine
            end_tasks_on_close(loop)
            if main is None or not (main.is_running and (main.is_receiving or main.loop is loop)):
                main = self._move_here()
            if main.loop is loop and not main.is_receiving:
                self._begin_receiving(main)
            return main

    def for_sending(self) -> Engine:
        """Return the engine that sends for the running loop."""
        end_tasks_on_close(asyncio.get_running_loop())
        main = self._main_engine
        if main is not None and main.is_running:
            return main
        with self._lock:
            main = self._main_engine
            if main is not None and main.is_running:
                return main
            if not is_single_call_loop(asyncio.get_running_loop()):
                return self._move_here()
            engine = self._background_engine()
            if self.client.has_lease:
                # The loop that received has ended. Without a new owner the lease would expire.
                self._make_owner(engine)
            return engine

    def for_own_changes(self) -> Engine:
        """Return the engine that owns the client's memberships. A running loop is not needed."""
        with self._lock:
            main = self._main_engine
            if main is not None and main.is_running:
                if main.is_receiving:
                    return main
                if not is_single_call_loop(main.loop):
                    self._make_owner(main)
                    return main
            loop = asyncio._get_running_loop()
            if loop is not None:
                end_tasks_on_close(loop)
            if loop is not None and not is_single_call_loop(loop):
                main = self._move_here()
                self._begin_receiving(main)
                return main
            engine = self._background_engine()
            self._make_owner(engine)
            return engine

    def for_flushing(self) -> Engine:
        """Return the engine that flushes for the running loop.

        Some loop of a process with a lease must receive: otherwise the process would deliver what
        the flush has removed.
        """
        with self._lock:
            if self.client.has_lease and not self._receives:
                return self.for_own_changes()
        return self.for_sending()

    @property
    def _receives(self) -> bool:
        return self._owner is not None and self._owner.is_running

    def unserved_addresses(self) -> set[str]:
        """Return the addresses of clients that no loop receives for. From any thread."""
        with self._lock:
            unserved = set(self._ending)
            if not self._receives:
                unserved.add(self._client)
        return {client.address for client in unserved}

    # ------------------------------------------------------------------ calls

    async def submit(self, operation: Operation) -> Any:
        """Send, or change a membership, on the engine that does this now.

        A send to groups waits for changes of them that began before: see `GroupOrder`. The wait
        counts for its timeout.

        Return and raise what `Sender.submit` does; while the process stops, `Stopping` or
        `StoppingUnknown`.
        """
        if isinstance(operation, Change):
            return await self._change(operation)
        loop, client, deadline = asyncio.get_running_loop(), self.client, None
        if len(self._order) and (groups := _groups_of(operation)):
            deadline = await self._wait_for_changes(groups)
        while True:
            try:
                main = self._main_engine
                if main is None or main.loop is not loop or main.is_closed:
                    main = self.for_sending()
                return await main.sender.submit(operation, deadline)
            except NotBegun:  # the engine has ended: another takes over
                await asyncio.sleep(0)
            except LayerUnavailable as error:
                self._raise(error, client)

    async def _change(self, change: Change) -> None:
        begun = self._order.begin(change.group, asyncio.get_running_loop())
        try:
            find = self.for_own_changes if self.client.owns(change.channel) else self.for_sending
            await self.run(find, lambda engine: engine.change(change))
        finally:
            self._order.end(begun)

    async def _wait_for_changes(self, groups: Collection[str]) -> float:
        """Wait for earlier changes of groups. Return the deadline of the call that waits."""
        client = self.client
        try:
            return await self._order.wait(groups, self._config.send_timeout)
        except LayerUnavailable as error:
            self._raise(error, client)

    def _raise(self, error: LayerUnavailable, client: Client) -> NoReturn:
        """Raise the error of a call, as `Stopping` or `StoppingUnknown` if that is expected.

        While a process stops, a closed client or a lost database is expected.
        """
        if self.gives_up or client is not self.client:
            raise as_stopping(error) from error.__cause__
        raise error

    async def read(self, group: str, work: Callable[[Engine, float], Coroutine[Any, Any, T]]) -> T:
        """Run work that reads the members of a group, after earlier changes of them.

        ``work``: gets the engine and the deadline of the call.
        """
        deadline = await self._wait_for_changes((group,))
        return await self.run(
            self.for_sending,
            lambda engine: work(engine, deadline),
            is_read=True,
            deadline=deadline,
        )

    async def run(
        self,
        find: Callable[[], Engine],
        work: Work[T],
        *,
        is_read: bool = False,
        deadline: float | None = None,
    ) -> T:
        """Run work that may be done twice. If its engine ends meanwhile, run it on the next.

        ``find``: returns the engine: one of the methods above.
        ``is_read``: the work changes nothing.
        ``deadline``: see `Engine.bridge`.

        Raises `LayerUnavailable` if the client is closed meanwhile, and `OutcomeUnknown` if
        the work fails after an attempt that may have taken effect.
        """
        client = self.client
        may_have_begun = False
        try:
            while client is self.client:
                engine = find()
                try:
                    return await engine.bridge(
                        partial(work, engine), is_read=is_read, deadline=deadline
                    )
                except NotBegun as error:
                    may_have_begun |= error.may_have_begun
                    await asyncio.sleep(0)
            raise LayerUnavailable("The channel layer was closed.")
        except LayerUnavailable as error:
            if may_have_begun and not is_read and not isinstance(error, OutcomeUnknown):
                raise OutcomeUnknown(
                    f"{error} It is unknown whether the call took effect."
                ) from error
            self._raise(error, client)

    def joined(self, channel: str) -> None:
        """Begin to own memberships if this process owns the channel.

        The channel was added to a group by synchronous code, or will be when a transaction
        commits. An owner must apply that.
        """
        if self.client.owns(channel):
            # The end of the client removes the row, also if it comes before the first renewal.
            self.client.expect_lease()
            if are_threads_real():  # otherwise the next loop that receives becomes the owner
                self.for_own_changes()

    def announce_soon(self) -> None:
        """Make an engine announce rows that synchronous code could not announce.

        Without a running engine, the next write announces them first.
        """
        for engine in (self._main_engine, self._owner):
            if engine is not None and engine.is_running:
                engine.call(engine.sender.announce_soon)
                return

    def state(self) -> State:
        """Return the state of the client at this moment. Does not block."""
        client, main, background = self.client, self._main_engine, self._background
        queues = client.queues()
        receiving = self._owner is not None and self._owner.is_running and self._owner.owner
        return State(
            channels=len(queues),
            queued_messages=sum(map(len, queues)),
            pending_announcements=len(client.announcements),
            pending_operations=(0 if main is None else main.pending_operations)
            + (0 if background is None else background.pending_operations),
            memberships=len(client.memberships),
            remembered_keys=client.cursor.key_count,
            listener=receiving.listening if receiving else "off",
            lease_age=time.monotonic() - client.renewed_at if client.renewed_at else None,
            failing_tasks=len(client.failures),
        )

    # ------------------------------------------------------------------ changes of loops

    def _begin_receiving(self, engine: Engine) -> None:
        """Make the running loop the owner loop."""
        self._make_owner(engine)
        # Also if this loop ends with its call: a test runner soon drops the database, and the
        # background loop would hold a connection to it.
        self._retire_background()
        if self._config.handle_sigterm:
            termination.close_on_sigterm()

    def _make_owner(self, engine: Engine) -> None:
        """Make an engine receive for the client as soon as the previous owner has stopped."""
        before = self._owner
        if before is engine:
            return
        self._owner = engine
        self.receives_in_background = engine is not self._main_engine
        termination.close_at_end_of_child()
        if before is not None and not before.stopped.done():
            _stop(before)
        engine.call(engine.start_receiving, before)

    def _background_engine(self) -> Engine:
        if self._background is None or self._background.is_over:
            self._enter_database()
            self._background = BackgroundLoop(self._client, self.announcer)
        return self._background.engine

    def _move_here(self) -> Engine:
        """Make a main engine for the running loop, and stop the previous one."""
        old = self._main_engine
        if old is not None:
            _stop(old)
        self._enter_database()
        self._main_engine = Engine(self._client, self.announcer)
        if not self.client.has_lease:
            self._retire_background()
        return self._main_engine

    def _enter_database(self) -> None:
        # Raises here if the configuration is invalid. In a task it would be repeated for ever.
        self._config.connect_kwargs("pool")
        self._settings = settings_of(self._config)
        self.database = self._settings.get("NAME")

    def _retire_background(self) -> None:
        background, self._background = self._background, None
        if background is not None:
            background.retire()

    # ------------------------------------------------------------------ the end

    async def close(self) -> None:
        """Close the client, and clients whose earlier close was incomplete.

        The next call of the layer begins a new client. If this call is cancelled, the close
        continues. If its loop ends before, the next `close` or the end of the process does the
        rest.
        """
        with self._lock:
            client = self._client
            self._ending[client] = self._main_engine, self._background
            self._begin_client()
        client.close()  # at once: no receiver waits for a close that may fail
        closing = asyncio.create_task(self._close_clients(client))
        self._closings.add(closing)
        closing.add_done_callback(self._closings.discard)
        await asyncio.shield(closing)

    async def _close_clients(self, current: Client) -> None:
        """Close all clients in `_ending`. Raise the error of ``current``, if any."""
        earlier = [client for client in list(self._ending) if client is not current]
        error, *others = await asyncio.gather(
            *map(self._close_client, (current, *earlier)), return_exceptions=True
        )
        for other in filter(None, others):
            logger.debug(
                "Could not close an earlier client.",
                exc_info=other,
                extra={"event": log_events.EARLIER_CLOSE_FAILED},
            )
        if error is not None:
            raise error

    async def _close_client(self, client: Client) -> None:
        """Close a client. Two calls may do so at the same time."""
        engine, background = self._ending.get(client, (None, None))
        if background is not None:
            await asyncio.to_thread(background.close)
        try:
            if engine is None:
                raise NotBegun
            await engine.close()
        except NotBegun:
            if client.has_lease:
                engine = Engine(client, self.announcer)
                self._ending[client] = engine, None
                await engine.close()
        if not client.has_lease:
            self._ending.pop(client, None)

    def __del__(self) -> None:
        """Close the client when nothing refers to the layer any more.

        No task refers to this object, except calls of the layer. Nothing here waits, because Python
        may run this in any thread and in any line.
        """
        if sys.is_finalizing():  # `close_at_exit` has been called
            return
        engines = [self._main_engine, *(engine for engine, _ in self._ending.values())]
        if self._background is not None:
            engines.append(self._background.engine_now)
        Dropped(
            self._config,
            self.database,
            self._unclosed_clients(),
            [engine for engine in engines if engine is not None],
        )
        for each in (self._main_engine, self._background):
            if each is not None:
                each.close_soon()

    def close_now(self, *, is_flushing: bool = False) -> None:
        """Close like `close`, and block until the connections are closed.

        For synchronous code in any thread, also while an event loop runs in it. ``is_flushing``:
        before, remove all messages and memberships, and raise what `Engine.flush` raises.
        """
        here = threading.current_thread()
        with self._lock:
            # A loop of this thread cannot run while this call blocks.
            if self._main_engine is not None and self._main_engine.thread is here:
                self._main_engine.abandon()
                self._main_engine = None
            for client, (engine, background) in self._ending.items():
                if engine is not None and engine.thread is here:
                    engine.abandon()
                    self._ending[client] = None, background
        # In a thread of its own: asyncio.run() would change the current event loop of this one.
        with ThreadPoolExecutor(1, "pg_layer-close") as executor:
            executor.submit(asyncio.run, self._reset(is_flushing)).result()

    def cut(self) -> None:
        """Shut the sockets of all connections down, without waiting for an event loop.

        For an event loop that is blocked: `close_now` has raised an error. From any thread.
        """
        with self._lock:
            engines = [self._main_engine, *(engine for engine, _ in self._ending.values())]
        for engine in engines:
            if engine is not None:
                engine.cut()

    async def _reset(self, is_flushing: bool) -> None:
        try:
            if is_flushing:
                await self.run(self.for_flushing, Engine.flush)
        finally:
            await self.close()

    def close_at_exit(self) -> None:
        """Close all clients that still have a lease, over a blocking connection.

        Called at the end of the process. Does not raise.
        """
        _close_now(self._config, self._unclosed_clients())

    def _unclosed_clients(self) -> list[Client]:
        return [
            client
            for client in (self._client, *self._ending)
            if client.has_lease and client.process == os.getpid()
        ]

    def _after_fork(self) -> None:
        # The child must not use the parent's sockets and loops. Keep the objects: deleting
        # them could close connections, or unregister sockets, that the parent still uses.
        _inherited.append(
            (self._main_engine, self._background, self._owner, self._ending, self._closings)
        )
        # A thread that does not exist in the child may have held the old lock.
        self._lock = threading.RLock()
        self._counters = Counters()
        self.announcer = Announcer()
        self._order = GroupOrder()
        # A pre-forking server may replace threads by greenlets in the child only.
        are_threads_real.cache_clear()
        self._ending, self._closings = {}, set()
        self._begin_client()


class Dropped:
    """What is left of a layer that no longer exists: its close has begun.

    The close may fail, or its loop may end before. Then the end of the process ends the leases.
    """

    _all: ClassVar[set[Dropped]] = set()

    def __init__(
        self,
        config: Config,
        database: object,
        clients: Sequence[Client],
        engines: Sequence[Engine],
    ) -> None:
        self._config = config
        self.database = database
        self._clients = clients
        self._engines = engines
        self._process = os.getpid()  # a child must not touch the connections of its parent
        self._expires_at = time.monotonic() + config.lease  # of the leases, at the latest
        # A copy: a finaliser that runs meanwhile may add another one.
        self._all.difference_update([each for each in list(self._all) if not each.is_used])
        self._all.add(self)
        termination.register(self)

    @property
    def is_used(self) -> bool:
        """Whether it may still have connections or leases in this process."""
        if self._process != os.getpid():
            return False
        return not all(engine.has_ended.is_set() for engine in self._engines) or (
            any(client.has_lease for client in self._clients)
            and time.monotonic() <= self._expires_at
        )

    def unserved_addresses(self) -> set[str]:
        """Return the addresses: the layer no longer exists, and nothing can receive."""
        return {client.address for client in self._clients}

    def close_now(self) -> None:
        """Block until it has no connections, and end the leases. Does not raise."""
        deadline = time.monotonic() + DROPPED_TIMEOUT
        for engine in self._engines:
            if engine.thread is threading.current_thread():  # its loop cannot run meanwhile
                engine.abandon()
            elif not engine.has_ended.wait(max(deadline - time.monotonic(), 0.0)):
                engine.cut()
        self.close_at_exit()

    def close_at_exit(self) -> None:
        """End the leases. Does not raise."""
        _close_now(
            self._config,
            [
                client
                for client in self._clients
                if client.has_lease and client.process == os.getpid()
            ],
        )


def unserved_addresses() -> set[str]:
    """Return the addresses of this process's clients that no loop receives for."""
    addresses: set[str] = set()
    for each in termination.registered():
        if isinstance(each, (Loops, Dropped)):
            addresses |= each.unserved_addresses()
    return addresses


def _close_now(config: Config, clients: Sequence[Client]) -> None:
    """Close clients over a blocking connection. Does not raise."""
    if not clients:
        return
    try:
        kwargs = {**config.connect_kwargs("pool"), "connect_timeout": 2, "autocommit": True}
        with closing_connection(psycopg.connect(**kwargs)) as conn:
            for client in clients:
                _close_on(conn, client)
    except Exception as error:  # the lease ends by itself
        logger.debug(
            "Could not close the client; its lease ends by itself: %s",
            error,
            extra={"event": log_events.EXIT_CLOSE_FAILED},
        )


def _close_on(conn: psycopg.Connection[Any], client: Client) -> None:
    closing = lease.Closing(client.config.prefix, client.address, client.close())
    try:
        lease.close_now(conn, closing, quiet=False)
    except psycopg.Error as error:
        if error.sqlstate not in NOTIFY_REFUSED:
            raise
        lease.close_now(conn, closing, quiet=True)
    client.lease_ended()


_inherited: list[object] = []  # objects of parent processes, which must not be deleted


def _after_fork_in_child() -> None:
    for loops in termination.registered():
        if isinstance(loops, Loops):
            loops._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _groups_of(operation: Operation) -> Collection[str]:
    """Return the groups that an operation sends to."""
    if isinstance(operation, Many):
        return {each.group for each in operation.operations if isinstance(each, GroupSend)}
    return (operation.group,) if isinstance(operation, GroupSend) else ()


def _stop(engine: Engine) -> None:
    """Stop an engine without waiting for it. Its loop may be about to end."""
    if engine.is_running:
        stopping = engine.stop()
        try:
            asyncio.run_coroutine_threadsafe(stopping, engine.loop)
            return
        except RuntimeError:  # the loop was closed just now
            stopping.close()
    if not engine.loop.is_running():
        engine.abandon()
