"""A layer in the memory of one process, with the interface of `PostgresChannelLayer`."""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from django.core.exceptions import ImproperlyConfigured
from django.db import connections, transaction
from django.db.backends.base.base import BaseDatabaseWrapper
from django.utils.asyncio import async_unsafe
from django.utils.connection import ConnectionDoesNotExist

from pg_layer._config.options import Config
from pg_layer._messages.addresses import group_name
from pg_layer._messages.codec import Codec, Template
from pg_layer._process.shutdown import register, registered
from pg_layer._runtime.health import Health
from pg_layer._send.operations import Change, GroupSend, Many, Operation, OperationBuilder, Send
from pg_layer._send.sender import channel_full
from pg_layer._state.channel_queue import ChannelQueue, QueuedMessage, Waiter
from pg_layer._state.client import Client
from pg_layer._state.counters import Counters, State
from pg_layer._sync.api import IN_ASYNC_CODE, Sync
from pg_layer.layer import PostgresChannelLayer


class Sent(NamedTuple):
    """A message that was sent to a channel, or to a group without the member ``exclude``."""

    message: dict[str, Any]
    group: str | None = None
    channel: str | None = None
    exclude: str | None = None


class InMemoryChannelLayer(PostgresChannelLayer):
    """A channel layer in the memory of this process, for tests and for work without a database.

    It takes the options of `PostgresChannelLayer`, and checks names and messages like it. Options
    that concern only a database have no effect. Other processes do not share its channels and
    groups. Inside `transaction.atomic` its ``sync`` sends after the commit, on any database.
    """

    def _make_loops(self) -> Memory:  # type: ignore[override]  # the part of it that a layer uses
        self._memory = Memory(self.config, self._codec, self._operations.queue_capacity)
        return self._memory

    def _make_sync(self) -> Sync:
        return InMemorySync(self, self.config, self._operations, self._memory)

    async def group_channels(self, group: str) -> list[str]:
        """Return the channels in a group. Raises `TypeError` for an invalid name."""
        return self._memory.members(self._operations.group(group))

    async def group_count(self, group: str) -> int:
        """Return the number of channels in a group. Raises `TypeError` for an invalid name."""
        return len(self._memory.members(self._operations.group(group)))

    async def flush(self) -> None:
        """Remove all messages and memberships."""
        self._memory.flush()

    async def health(self) -> Health:
        """Return the health of a layer that has no problems."""
        return Health(
            lease_age=None, listener="off", last_notification_age=None, round_trip=0.0, problems=[]
        )

    async def _wait(self, queue: ChannelQueue, is_specific: bool) -> Waiter | None:
        return await queue.wait()

    @contextmanager
    def _capture(self) -> Iterator[list[Sent]]:
        """Yield a list that has the messages that the block sent, when it has ended.

        Messages of transactions that are still open are in it, unless they were rolled back.
        """
        sent: list[Sent] = []
        with self._memory.recording() as (begun_at, recorded):
            yield sent
            for connection in connections.all(initialized_only=True):
                recorded += [
                    (each.number, operation)
                    for each in _pending(connection, self._memory)
                    for operation in each.operations
                    if not isinstance(operation, Change)
                ]
        for number, operation in sorted(recorded, key=lambda each: each[0]):
            if number > begun_at:
                sent += self._memory.as_sent(operation, self.deserialize)


class Memory:
    """The channels and groups of a layer, in place of `pg_layer._runtime.loops.Loops`.

    ``capacity_of``: see `Client`. Thread-safe. A receiver is woken on its own event loop.
    """

    receives_in_background = False
    main_engine = None
    gives_up = False

    def __init__(self, config: Config, codec: Codec, capacity_of: Callable[[str], int]) -> None:
        self._config = config
        self._codec = codec
        self._capacity_of = capacity_of
        self._counters = Counters()
        self._begin()
        register(self)

    def _begin(self) -> None:
        self._lock = threading.RLock()
        self._groups: dict[str, dict[str, float]] = {}  # the channels, and the end of each
        self._recorders: list[list[tuple[int, Send | GroupSend]]] = []
        self._numbers = itertools.count(1)
        self._tidied_at = time.monotonic()
        self._begin_client()

    def _begin_client(self) -> None:
        self.client = Client(self._config, self._codec, self._counters, self._capacity_of)
        self.client.clock.observe(self.client.clock.ticks(), time.time())

    # ------------------------------------------------------------------ the calls of the layer

    async def submit(self, operation: Operation) -> Any:
        """Do at once what a call asks for. Return and raise what `Loops.submit` does."""
        if isinstance(operation, Change):
            self.change(operation)
            return None
        if isinstance(operation, Many):
            return self.send(operation.operations)
        (is_accepted,) = self.send([operation])
        if isinstance(operation, Send) and not is_accepted:
            raise channel_full(operation)
        return None

    def next_number(self) -> int:
        """Return a number that is larger than before."""
        return next(self._numbers)

    def send(
        self,
        operations: Sequence[Send | GroupSend],
        *,
        number: int | None = None,
        is_checked: bool = False,
    ) -> list[bool]:
        """Put messages into the channels. Return for each whether no normal channel was full.

        ``number``: when the call was made; default: now. ``is_checked``: the capacity was checked.
        """
        with self._lock:
            self._tidy()
            self._counters.add("batches")
            return [
                self._send(operation, self.next_number() if number is None else number, is_checked)
                for operation in operations
            ]

    def _send(self, operation: Send | GroupSend, number: int, is_checked: bool) -> bool:
        client = self.client
        if isinstance(operation, Send):
            if not (is_checked or self.has_room(operation.channel)):
                self._counters.add("refused_full")
                return False
            self._record(number, operation)
            self._counters.add("sent")
            payload = self._codec.open(operation.payload, operation.channel)
            self._queue(operation.channel).put(self._queued(payload, operation.expiry))
            return True
        self._record(number, operation)
        self._counters.add("group_sent")
        payload = self._codec.open(operation.payload, group_name(operation.group))
        message = self._queued(Template(payload), operation.expiry)
        is_complete = True
        for channel in self.members(operation.group):
            if channel != operation.excluded and self._queue(channel).put_fitting([message]):
                client.count_dropped(operation.group, channel)
                is_complete &= "!" in channel
        return is_complete

    def _queued(self, payload: bytes | Template, expiry: float) -> QueuedMessage:
        self._counters.add("received")
        return QueuedMessage(payload, self.client.clock.now() + expiry, None)

    def _queue(self, channel: str) -> ChannelQueue:
        queue = self.client.queue(channel)
        self.client.drop_expired(queue)
        return queue

    def has_room(self, channel: str, pending: int = 0) -> bool:
        """Return whether a channel takes one more message, after ``pending`` others."""
        queue = self._queue(channel)
        return len(queue) + pending < queue.capacity

    def change(self, change: Change) -> None:
        """Add a channel to a group, or discard it."""
        expiry = self._config.group_expiry
        with self._lock:
            if change.added:
                ends_at = math.inf if expiry is None else self.client.clock.now() + expiry
                self._groups.setdefault(change.group, {})[change.channel] = ends_at
            else:
                self._discard(change.group, [change.channel])

    def members(self, group: str) -> list[str]:
        """Return the channels in a group."""
        with self._lock:
            now = self.client.clock.now()
            channels = self._groups.get(group, {})
            self._discard(group, [name for name, ends_at in channels.items() if ends_at <= now])
            return list(channels)

    def _discard(self, group: str, channels: Iterable[str]) -> None:
        """Remove channels from a group, and the group with its last channel."""
        members = self._groups.get(group, {})
        for channel in channels:
            members.pop(channel, None)
        if not members:
            self._groups.pop(group, None)

    def state(self) -> State:
        """Return the state at this moment."""
        queues = self.client.queues()
        with self._lock:
            memberships = sum(map(len, self._groups.values()))
        return State(
            channels=len(queues),
            queued_messages=sum(map(len, queues)),
            pending_announcements=0,
            pending_operations=0,
            memberships=memberships,
            remembered_keys=0,
            listener="off",
            lease_age=None,
            failing_tasks=0,
        )

    def flush(self) -> None:
        """Remove all messages and memberships."""
        with self._lock:
            self._groups.clear()
            for queue in self.client.queues():
                queue.pop_all()

    async def close(self) -> None:
        """End the specific channels and their memberships. Messages in normal channels remain."""
        self.end_channels()

    def reset(self) -> None:
        """Remove all messages and memberships, and end the specific channels."""
        self.flush()
        self.end_channels()

    def end_channels(self) -> None:
        """Do what `close` does."""
        with self._lock:
            before = self.client
            self._begin_client()
            for group, channels in list(self._groups.items()):
                self._discard(group, [name for name in channels if "!" in name])
            for queue in before.queues():
                if "!" not in queue.channel:
                    for message in queue.pop_all():
                        self.client.queue(queue.channel).put(message)
        before.close()

    def close_at_exit(self) -> None:
        """Do nothing: the memory of a process ends with it."""

    def after_fork(self) -> None:
        """Begin without messages and members: other processes do not share them."""
        self._counters = Counters()
        self._begin()

    def _tidy(self) -> None:
        """Forget expired messages, and queues that nobody has used for a while."""
        if time.monotonic() > self._tidied_at + self._config.heartbeat:
            self._tidied_at = time.monotonic()
            for queue in self.client.queues():
                self.client.drop_expired(queue)
            self.client.forget_idle_queues()

    # ------------------------------------------------------------------ recording

    @contextmanager
    def recording(self) -> Iterator[tuple[int, list[tuple[int, Send | GroupSend]]]]:
        """Record sent operations during a block, with the numbers of their calls.

        Yield the number at its beginning, and the list of operations.
        """
        recorder: list[tuple[int, Send | GroupSend]] = []
        with self._lock:
            self._recorders.append(recorder)
        try:
            yield self.next_number(), recorder
        finally:
            with self._lock:
                # By identity: lists with the same operations are equal.
                self._recorders = [each for each in self._recorders if each is not recorder]

    def _record(self, number: int, operation: Send | GroupSend) -> None:
        for recorder in self._recorders:
            recorder.append((number, operation))

    def as_sent(
        self, operation: Send | GroupSend, deserialize: Callable[[bytes], dict[str, Any]]
    ) -> list[Sent]:
        """Return what an operation sent, also to normal channels in a group."""
        codec = self._codec
        if isinstance(operation, Send):
            payload = codec.open(operation.payload, operation.channel)
            return [Sent(codec.decode(payload, deserialize), channel=operation.channel)]
        group, excluded = operation.group, operation.excluded
        payload = codec.open(operation.payload, group_name(group))
        jobs = [name for name in self.members(group) if "!" not in name and name != excluded]
        return [
            Sent(codec.decode(payload, deserialize), group, exclude=excluded),
            *(Sent(codec.decode(payload, deserialize), channel=name) for name in jobs),
        ]


class InMemorySync(Sync):
    """``sync`` of the layer in memory. Inside `transaction.atomic` it waits for the commit."""

    def __init__(
        self, layer: object, config: Config, operations: OperationBuilder, memory: Memory
    ) -> None:
        super().__init__(layer, config, operations, memory)  # type: ignore[arg-type]
        self._memory = memory

    def group_channels(self, group: str, *, using: str | None = None) -> list[str]:
        """Return the channels in a group, with the changes of the open transaction."""
        channels = dict.fromkeys(self._memory.members(self._operations.group(group)))
        for delivery in _pending(self._connection(using), self._memory):
            for each in delivery.operations:
                if isinstance(each, Change) and each.group == group:
                    channels.pop(each.channel, None)
                    if each.added:
                        channels[each.channel] = None
        return list(channels)

    def group_count(self, group: str, *, using: str | None = None) -> int:
        """Return the number of channels in a group."""
        return len(self.group_channels(group, using=using))

    def _send(self, using: str | None, sends: Any) -> list[bool]:
        connection = self._connection(using)
        if not connection.in_atomic_block:
            return self._memory.send(sends)
        pending = [
            each.channel
            for delivery in _pending(connection, self._memory)
            for each in delivery.operations
            if isinstance(each, Send)
        ]
        accepted, results = [], []
        for each in sends:
            results.append(self._memory.has_room(each.channel, pending.count(each.channel)))
            if results[-1]:
                accepted.append(each)
                pending.append(each.channel)
        self._deliver_after_commit(connection, accepted)
        return results

    def _group_send(self, using: str | None, sends: Any) -> list[bool]:
        connection = self._connection(using)
        if not connection.in_atomic_block:
            return self._memory.send(sends)
        self._deliver_after_commit(connection, sends)
        return [True] * len(sends)

    def _change(self, using: str | None, change: Change) -> None:
        connection = self._connection(using)
        if connection.in_atomic_block:
            self._deliver_after_commit(connection, [change])
        else:
            self._memory.change(change)

    def _deliver_after_commit(
        self, connection: BaseDatabaseWrapper, operations: Sequence[Send | GroupSend | Change]
    ) -> None:
        if operations:
            transaction.on_commit(Delivery(self._memory, operations), using=connection.alias)

    @async_unsafe(IN_ASYNC_CODE)
    def _connection(self, using: str | None) -> BaseDatabaseWrapper:
        alias = using or self._config.using or "default"
        try:
            return connections[alias]
        except ConnectionDoesNotExist as error:
            raise ImproperlyConfigured(
                f"pg_layer: there is no alias {alias!r} in DATABASES."
                f" There are: {', '.join(connections)}."
            ) from error


class Delivery:
    """The callback for `transaction.on_commit` that does what one call asked for."""

    def __init__(self, memory: Memory, operations: Sequence[Send | GroupSend | Change]) -> None:
        self.memory = memory
        self.operations = operations
        self.number = memory.next_number()
        self.is_called = False

    def __call__(self) -> None:
        """Send the messages, or change the membership."""
        self.is_called = True
        for operation in self.operations:
            if isinstance(operation, Change):
                self.memory.change(operation)
            else:
                self.memory.send([operation], number=self.number, is_checked=True)


def _pending(connection: BaseDatabaseWrapper, memory: Memory) -> list[Delivery]:
    """Return the deliveries that the open transaction has not undone."""
    callbacks = (callback for _, callback, *_ in connection.run_on_commit)
    return [
        each
        for each in callbacks
        if isinstance(each, Delivery) and each.memory is memory and not each.is_called
    ]


def _after_fork_in_child() -> None:
    for memory in registered():
        if isinstance(memory, Memory):
            memory.after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
