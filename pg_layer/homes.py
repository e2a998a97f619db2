"""Which event loop does the work: the home loop, or the hub.

The home loop is the first that uses the layer; connections are native there, and other loops borrow it. One
that receives takes over from one that only sends. The loops that `async_to_sync` makes for one call never
become home by sending: where there is none they borrow the hub, a background thread with a loop of its own.
The hub also keeps the lease of a process that has joined groups by synchronous calls and does not receive.
No call waits on a loop that nobody runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from contextlib import closing
from typing import Any

import psycopg
from asgiref.sync import AsyncToSync

from pg_layer import store, termination
from pg_layer.client import Client
from pg_layer.codec import Codec
from pg_layer.config import Config
from pg_layer.engine import Engine
from pg_layer.exceptions import LayerUnavailable, NotBegun
from pg_layer.ops import Op
from pg_layer.stats import Counters, State

logger = logging.getLogger("pg_layer")


class Hub:
    """A background thread with an event loop and an engine that only sends."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._ready = threading.Event()
        self._engine: Engine | None = None
        self._error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="pg_layer-hub", daemon=True)
        self._thread.start()

    @property
    def engine(self) -> Engine:
        """The hub's engine; waits for the thread's start. Raises `LayerUnavailable` if that failed."""
        self._ready.wait()
        if self._engine is None:
            raise LayerUnavailable(f"The channel layer's thread could not start: {self._error}")
        return self._engine

    @property
    def lane_operations(self) -> int:
        """How many operations wait in its lanes. Waits for nothing."""
        return 0 if self._engine is None else self._engine.sender.waiting

    @property
    def is_over(self) -> bool:
        """Whether it could not start, or has ended."""
        return self._ready.is_set() and not (self._engine is not None and self._engine.is_running)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except Exception as error:
            self._error = error
            logger.error("The channel layer's thread failed.", exc_info=error)
        finally:
            self._ready.set()

    async def _serve(self) -> None:
        self._engine = engine = Engine(self._client)
        self._is_retired = asyncio.Event()
        self._ready.set()
        try:
            await self._is_retired.wait()
        finally:
            await engine.stop()

    def retire(self) -> None:
        """Close the connection and end the thread, when what was begun is done."""
        if self._ready.wait() and self._engine is not None:
            self._engine.call(self._is_retired.set)

    def close(self) -> None:
        """Retire, and wait for it."""
        self.retire()
        if threading.current_thread() is not self._thread:
            self._thread.join()


class Homes:
    """Finds the engine for whoever calls. Thread-safe."""

    def __init__(self, config: Config, codec: Codec) -> None:
        self._config = config
        self._codec = codec
        self._lock = threading.RLock()
        self._counters = Counters()
        self._begin()
        termination.remember(self)

    def _begin(self) -> None:
        self.client = Client(self._config, self._codec, self._counters)
        self._home: Engine | None = None
        self._hub: Hub | None = None

    @property
    def home(self) -> Engine | None:
        """The engine of the home loop, whether that runs or not."""
        return self._home

    @property
    def is_used(self) -> bool:
        """Whether there is something to close."""
        return self._home is not None or self._hub is not None or self.client.has_lease

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
                home.start_receiving()
                # Also where this loop ends with its one call: a test runner soon drops the database.
                self._retire_hub()
                termination.heed_sigterm()
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
            if not _is_passing(asyncio.get_running_loop()):
                return self._move_here()
            return self._borrow_hub()

    async def submit(self, op: Op) -> Any:
        """Send, or change a membership, wherever that is done now; as `Sender.submit`."""
        loop = asyncio.get_running_loop()
        while True:
            home = self._home
            try:
                if home is not None and home.loop is loop and not home.is_closed:
                    return await home.sender.submit(op)
                # Such a loop is run until its one call has ended, and cancels what it leaves.
                return await self.for_sending().sender.submit(op, may_write=_is_passing(loop))
            except NotBegun:
                continue  # that loop has ended: another takes over

    def joined(self, channel: str) -> None:
        """A channel has joined a group, or will when somebody's transaction commits; on no loop's thread.

        If it is of this process, that has a lease to keep. Who receives does; before, it is the hub: a loop
        that sends may end after its one call.
        """
        if not self.client.owns(channel):
            return
        with self._lock:
            self.client.has_lease = True
            home = self._home
            if home is None or not (home.is_running and home.is_receiving) or _is_passing(home.loop):
                engine = self._borrow_hub()
                engine.call(engine.liveness.keep)

    def state(self) -> State:
        """How things stand. From any thread; waits for nothing."""
        client, home, hub = self.client, self._home, self._hub
        mailboxes = client.mailboxes()
        return State(
            mailboxes=len(mailboxes),
            mailbox_messages=sum(map(len, mailboxes)),
            lane_operations=(0 if home is None else home.sender.waiting)
            + (0 if hub is None else hub.lane_operations),
            memberships=len(client.memberships),
            listener=home.liveness.listening if home is not None and home.is_running else "off",
            lease_age=time.monotonic() - client.renewed_at if client.renewed_at else None,
        )

    def _borrow_hub(self) -> Engine:
        if self._hub is None or self._hub.is_over:
            self._config.connect_kwargs("pool")
            self._hub = Hub(self.client)
        return self._hub.engine

    def _move_here(self) -> Engine:
        old = self._home
        if old is not None:
            if old.is_running:
                asyncio.run_coroutine_threadsafe(old.stop(), old.loop)
            elif not old.loop.is_running():
                old.abandon()
            # Else it is about to end by itself.
        self._config.connect_kwargs(
            "pool"
        )  # what is wrong with it is said here, and not tried again for ever
        self._home = Engine(self.client)
        if not self.client.has_lease:
            self._retire_hub()
        return self._home

    def _retire_hub(self) -> None:
        hub, self._hub = self._hub, None
        if hub is not None:
            hub.retire()

    async def close(self) -> None:
        """Take leave of the database. The next call begins with a new client."""
        with self._lock:
            home, hub = self._home, self._hub
            client = self.client
            self._begin()
        if hub is not None:
            await asyncio.to_thread(hub.close)
        loop = asyncio.get_running_loop()
        if home is not None and home.loop is not loop:
            if home.is_running:
                await home.bridge(home.close)
                return
            if not home.loop.is_running():
                home.abandon()
            home = None
        if home is None or home.is_closed:
            if not client.has_lease:
                client.farewell()
                return
            home = Engine(client)
        await home.close()

    def leave(self) -> None:
        """At the end of the process: take leave of the database, if nobody has."""
        client = self.client
        if not client.has_lease or client.process != os.getpid():
            return
        client.has_lease = False
        try:
            kwargs = {**self._config.connect_kwargs("pool"), "connect_timeout": 2, "autocommit": True}
            with closing(psycopg.connect(**kwargs)) as conn:
                store.close_now(conn, client.farewell())
        except Exception as error:  # the lease runs out by itself
            logger.debug("Could not give back the lease on closing; it runs out by itself: %s", error)

    def _after_fork(self) -> None:
        # The parent's sockets and loops are not ours: forget them without a word on the wire.
        _inherited.append((self._home, self._hub))
        self._lock = threading.RLock()  # the old one may be held by a thread that is not here
        self._counters = Counters()
        self._begin()


def _is_passing(loop: asyncio.AbstractEventLoop) -> bool:
    """Whether the loop is one that `async_to_sync` made for one call."""
    return loop in getattr(AsyncToSync, "loop_thread_executors", ())


_inherited: list[object] = []


def _after_fork_in_child() -> None:
    for homes in termination.leavers():
        if isinstance(homes, Homes):
            homes._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
