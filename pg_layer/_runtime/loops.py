"""Which event loop does the work: the owner loop, or the background loop.

The first loop that uses the layer holds the connections, and other loops borrow it. A loop that receives
takes over from one that only sends, and becomes the owner loop. The loops that `async_to_sync` makes for one
call never take over by sending: where there is no other they borrow the background loop, which runs in a
thread of its own. (gevent and eventlet have no such thread: each of those loops takes over there.) The
background loop is also the owner loop of a process that adds its channels to groups by synchronous calls and
does not receive. A new owner begins when the old one has stopped, so that one thread at a time touches the
state of receiving. No call waits on a loop that does not run.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import closing as closing_connection
from functools import partial
from typing import Any, NoReturn, TypeVar

import psycopg

from pg_layer._config.options import Config
from pg_layer._db.errors import REFUSALS, at_the_end
from pg_layer._db.queries import lease
from pg_layer._messages.codec import Codec
from pg_layer._process import shutdown as termination
from pg_layer._process.threads import are_threads_real, is_passing
from pg_layer._runtime.engine import Engine
from pg_layer._send.announcer import Announcer
from pg_layer._send.operations import Change, Operation
from pg_layer._state import log_events
from pg_layer._state.client import Client
from pg_layer._state.counters import Counters, State
from pg_layer.exceptions import LayerUnavailable, NotBegun, OutcomeUnknown

T = TypeVar("T")
Work = Callable[[Engine], Coroutine[Any, Any, T]]

logger = logging.getLogger("pg_layer")


class BackgroundLoop:
    """A thread with an event loop and an engine."""

    def __init__(self, client: Client, announcer: Announcer) -> None:
        self._client = client
        self._announcer = announcer
        self._ready = threading.Event()
        self._engine: Engine | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="pg_layer-background", daemon=True)
        self._thread.start()

    @property
    def engine(self) -> Engine:
        """The engine; waits for the thread's start. Raises `LayerUnavailable` if that failed."""
        self._ready.wait()
        if self._engine is None:
            raise LayerUnavailable(f"The channel layer's thread could not start: {self._error}")
        return self._engine

    @property
    def pending_operations(self) -> int:
        """How many operations wait for a write in flight. Waits for nothing."""
        return 0 if self._engine is None else self._engine.pending_operations

    @property
    def is_over(self) -> bool:
        """Whether it could not start, or has ended."""
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
        self._is_retired = asyncio.Event()
        self._ready.set()
        try:
            await self._is_retired.wait()
        finally:
            await engine.stop()

    def retire(self, *, is_end: bool = False) -> None:
        """Close the connections and end the thread, when what was begun is done. ``is_end``: the client's."""
        if self._ready.wait() and self._engine is not None:
            self._engine.connections.is_ending |= is_end
            self._engine.call(self._is_retired.set)

    def close(self) -> None:
        """Retire, and wait for it."""
        self.retire(is_end=True)
        if threading.current_thread() is not self._thread:
            self._thread.join()


class Loops:
    """Finds the engine for a caller. Thread-safe."""

    def __init__(self, config: Config, codec: Codec) -> None:
        self._config = config
        self._codec = codec
        self._lock = threading.RLock()
        self._counters = Counters()
        self.announcer = Announcer()
        # Clients whose end has begun and is not known to be complete, and where that is done.
        self._ending: dict[Client, tuple[Engine | None, BackgroundLoop | None]] = {}
        self._closings: set[asyncio.Task[None]] = set()  # asyncio itself forgets tasks
        self._begin()
        termination.register(self)

    def _begin(self) -> None:
        self.client = Client(self._config, self._codec, self._counters)
        self._home: Engine | None = None
        self._background: BackgroundLoop | None = None
        self._owner: Engine | None = None  # the last that became the owner
        self.receives_in_background = False  # the background loop is the owner loop

    @property
    def home(self) -> Engine | None:
        """The engine of the loop that holds the connections, whether that runs or not."""
        return self._home

    @property
    def is_used(self) -> bool:
        """Whether there is something to close."""
        is_begun = self._home is not None or self._background is not None or self.client.has_lease
        return is_begun or bool(self._ending)

    @property
    def gives_up(self) -> bool:
        """Whether nothing waits for the database: see `Connections.gives_up`. From any thread."""
        engines = (self._home, self._owner)
        return any(
            engine is not None and not engine.is_closed and engine.connections.gives_up
            for engine in engines
        )

    # ------------------------------------------------------------------ which engine

    def for_receiving(self, loop: asyncio.AbstractEventLoop) -> Engine:
        """The engine that receives for the running loop: its own, or that of one that runs elsewhere."""
        home = self._home
        if home is not None and home.is_receiving and home.loop is loop and not home.is_closed:
            return home
        with self._lock:
            home = self._home
            if home is None or not (home.is_running and (home.is_receiving or home.loop is loop)):
                home = self._move_here()
            if home.loop is loop and not home.is_receiving:
                self._make_owner(home)
                # Also where this loop ends with its one call: a test runner soon drops the database.
                self._retire_background()
                self._close_on_sigterm()
            return home

    def for_sending(self) -> Engine:
        """The engine that sends for this loop."""
        home = self._home
        if home is not None and home.is_running:
            return home
        with self._lock:
            home = self._home
            if home is not None and home.is_running:
                return home
            if not is_passing(asyncio.get_running_loop()):
                return self._move_here()
            engine = self._borrow_background()
            if self.client.has_lease:
                self._make_owner(
                    engine
                )  # the loop that received has ended: another must keep the lease
            return engine

    def for_own_changes(self) -> Engine:
        """The engine that owns the client's memberships. From any thread, with or without a loop."""
        with self._lock:
            home = self._home
            if home is not None and home.is_running:
                if home.is_receiving:
                    return home
                if not is_passing(home.loop):
                    self._make_owner(home)
                    return home
            loop = asyncio._get_running_loop()
            if loop is not None and not is_passing(loop):
                home = self._move_here()
                self._make_owner(home)
                self._retire_background()
                self._close_on_sigterm()
                return home
            engine = self._borrow_background()
            self._make_owner(engine)
            return engine

    async def submit(self, operation: Operation) -> Any:
        """Send, or change a membership, wherever that is done now; as `Sender.submit`."""
        if isinstance(operation, Change):
            change = operation
            find = self.for_own_changes if self.client.owns(operation.channel) else self.for_sending
            return await self.run(find, lambda engine: engine.change(change))
        client, loop = self.client, asyncio.get_running_loop()
        while True:
            try:
                home = self._home
                if home is not None and home.loop is loop and not home.is_closed:
                    return await home.sender.submit(operation)
                # Such a loop runs until its one call has ended, and cancels what it leaves.
                return await self.for_sending().sender.submit(operation, may_write=is_passing(loop))
            except NotBegun:  # that loop has ended: another takes over
                await asyncio.sleep(0)
            except LayerUnavailable as error:
                self._raise(error, client)

    def _raise(self, error: LayerUnavailable, client: Client) -> NoReturn:
        """Raise an error of a call. While a process stops, a closed client or a lost database is no news."""
        if self.gives_up or client is not self.client:
            raise at_the_end(error) from error.__cause__
        raise error

    async def run(self, find: Callable[[], Engine], work: Work[T], *, is_read: bool = False) -> T:
        """Run on an engine what may be done twice; on the next one if the engine ends before that is done.

        ``find``: one of the methods above. ``is_read``: it changes nothing. Raises `LayerUnavailable` if the
        client is closed meanwhile.
        """
        client = self.client
        may_have_begun = False
        try:
            while client is self.client:
                engine = find()
                try:
                    return await engine.bridge(partial(work, engine), is_read=is_read)
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
        """A channel was added to a group without a loop, or will be when a transaction commits.

        If it is of this process, an owner must apply that.
        """
        if self.client.owns(channel):
            self.client.has_lease = (
                True  # its end removes the row, also if it comes before the first renewal
            )
            if are_threads_real():  # otherwise the next loop that receives applies it
                self.for_own_changes()

    def announce_soon(self) -> None:
        """Rows could not be announced without a loop: one that sends tries again, if there is one."""
        for engine in (self._home, self._owner):
            if engine is not None and engine.is_running:
                engine.call(engine.sender.announce_soon)
                return

    def state(self) -> State:
        """The state now. From any thread; waits for nothing."""
        client, home, background = self.client, self._home, self._background
        queues = client.queues()
        receiving = self._owner is not None and self._owner.is_running and self._owner.owner
        return State(
            channels=len(queues),
            queued_messages=sum(map(len, queues)),
            pending_announcements=len(client.announcements),
            pending_operations=(0 if home is None else home.pending_operations)
            + (0 if background is None else background.pending_operations),
            memberships=len(client.memberships),
            remembered_keys=client.cursor.remembered,
            listener=receiving.listening if receiving else "off",
            lease_age=time.monotonic() - client.renewed_at if client.renewed_at else None,
            failing_tasks=len(client.failures),
        )

    # ------------------------------------------------------------------ changes of loops

    def _make_owner(self, engine: Engine) -> None:
        """Have an engine receive for the client, when the one before has stopped."""
        before = self._owner
        if before is engine:
            return
        self._owner = engine
        self.receives_in_background = engine is not self._home
        termination.close_at_end_of_child()
        if before is not None and not before.stopped.done():
            _stop(before)
        engine.call(engine.start_receiving, before)

    def _borrow_background(self) -> Engine:
        if self._background is None or self._background.is_over:
            self._config.connect_kwargs("pool")
            self._background = BackgroundLoop(self.client, self.announcer)
        return self._background.engine

    def _move_here(self) -> Engine:
        old = self._home
        if old is not None:
            _stop(old)
        # A bad configuration is reported here, and not tried again for ever.
        self._config.connect_kwargs("pool")
        self._home = Engine(self.client, self.announcer)
        if not self.client.has_lease:
            self._retire_background()
        return self._home

    def _retire_background(self) -> None:
        background, self._background = self._background, None
        if background is not None:
            background.retire()

    def _close_on_sigterm(self) -> None:
        if self._config.handle_sigterm:
            termination.close_on_sigterm()

    # ------------------------------------------------------------------ the end

    async def close(self) -> None:
        """Close the client, and those that an earlier call has left. The next call begins with a new one.

        A close that is cancelled goes on. What does not end with its loop is left to the next close, or to
        the end of the process.
        """
        with self._lock:
            client = self.client
            self._ending[client] = self._home, self._background
            self._begin()
        client.close()  # at once: no receiver waits for a close that may fail
        closing = asyncio.create_task(self._end_all(client))
        self._closings.add(closing)
        closing.add_done_callback(self._closings.discard)
        await asyncio.shield(closing)

    async def _end_all(self, present: Client) -> None:
        earlier = [client for client in list(self._ending) if client is not present]
        error, *others = await asyncio.gather(
            *map(self._end, (present, *earlier)), return_exceptions=True
        )
        for other in filter(None, others):
            logger.debug(
                "Could not close an earlier client.",
                exc_info=other,
                extra={"event": log_events.EARLIER_CLOSE_FAILED},
            )
        if error is not None:
            raise error

    async def _end(self, client: Client) -> None:
        """End a client. It does no harm if two calls do so at once."""
        home, background = self._ending.get(client, (None, None))
        if background is not None:
            await asyncio.to_thread(background.close)
        try:
            if home is None:
                raise NotBegun
            await home.close()
        except NotBegun:
            if client.has_lease:
                home = Engine(client, self.announcer)
                self._ending[client] = home, None
                await home.close()
        if not client.has_lease:
            self._ending.pop(client, None)

    def close_at_exit(self) -> None:
        """At the end of the process: close the clients that were not closed in order."""
        clients = [
            client
            for client in (self.client, *self._ending)
            if client.has_lease and client.process == os.getpid()
        ]
        if not clients:
            return
        try:
            kwargs = {
                **self._config.connect_kwargs("pool"),
                "connect_timeout": 2,
                "autocommit": True,
            }
            with closing_connection(psycopg.connect(**kwargs)) as conn:
                for client in clients:
                    self._close_on(conn, client)
        except Exception as error:  # the lease ends by itself
            logger.debug(
                "Could not close the client; its lease ends by itself: %s",
                error,
                extra={"event": log_events.EXIT_CLOSE_FAILED},
            )

    def _close_on(self, conn: psycopg.Connection[Any], client: Client) -> None:
        closing = lease.Closing(self._config.prefix, client.address, client.close())
        try:
            lease.close_now(conn, closing, quiet=False)
        except psycopg.Error as error:
            if error.sqlstate not in REFUSALS:
                raise
            lease.close_now(conn, closing, quiet=True)
        client.has_lease = False

    def _after_fork(self) -> None:
        # The parent's sockets and loops are not ours: forget them without a word on the wire.
        _inherited.append((self._home, self._background, self._owner, self._ending, self._closings))
        self._lock = threading.RLock()  # the old one may be held by a thread that is not here
        self._counters = Counters()
        self.announcer = Announcer()
        are_threads_real.cache_clear()  # a pre-forking server may replace them in the child only
        self._ending, self._closings = {}, set()
        self._begin()


_inherited: list[object] = []


def _after_fork_in_child() -> None:
    for loops in termination.registered():
        if isinstance(loops, Loops):
            loops._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)


def _stop(engine: Engine) -> None:
    """Have an engine stop. Its loop may be about to end by itself."""
    if engine.is_running:
        stopping = engine.stop()
        try:
            asyncio.run_coroutine_threadsafe(stopping, engine.loop)
            return
        except RuntimeError:  # the loop was closed just now
            stopping.close()
    if not engine.loop.is_running():
        engine.abandon()
