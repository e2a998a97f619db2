"""The channel layer: the interface of Channels."""

from __future__ import annotations

import asyncio
import re
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from channels.layers import BaseChannelLayer
from django.core.exceptions import ImproperlyConfigured

from pg_layer._config.installation import report_missing_app
from pg_layer._config.options import load
from pg_layer._messages.codec import Codec
from pg_layer._runtime.flush import flush
from pg_layer._runtime.health import Health, examine
from pg_layer._runtime.loops import Loops
from pg_layer._send.operations import OperationBuilder
from pg_layer._state.channel_queue import ChannelQueue, QueuedMessage, Waiter
from pg_layer._state.client import Client
from pg_layer._state.counters import Stats, make_stats
from pg_layer._sync.api import Sync
from pg_layer.exceptions import (
    ChannelFull,
    LayerUnavailable,
    MessageTooLarge,
    UndecodableMessage,
)

# Characters of a new channel's prefix. The name adds 26 and a growing number; Channels allows 99.
MAX_PREFIX = 60
# Seconds after which a receiver on another loop checks that the owner loop still runs.
FOREIGN_WAIT = 1.0


class PostgresChannelLayer(BaseChannelLayer):
    """A channel layer on PostgreSQL.

    The keyword arguments are the options of ``CONFIG`` in ``CHANNEL_LAYERS``. An invalid option
    raises `django.core.exceptions.ImproperlyConfigured`. The layer opens its connections with the
    first call that needs them. Every method may be called from any event loop in any thread.
    """

    extensions = ["groups", "flush"]  # noqa: RUF012  # a list, as in other layers
    # The specification names these exceptions as attributes of the layer.
    ChannelFull = ChannelFull
    MessageTooLarge = MessageTooLarge

    # The rules of Channels. Its own expressions also accept Unicode digits and a final newline.
    channel_name_regex = re.compile(r"[a-zA-Z\d\-_.]+(![\w\-.]*)?\Z", re.ASCII)
    group_name_regex = re.compile(r"[a-zA-Z\d\-_.]+\Z", re.ASCII)

    def __init__(self, **options: object) -> None:
        self.config = load(options)
        report_missing_app()
        config = self.config
        self._codec = Codec(
            config.serializer_format,
            config.max_message_size,
            config.symmetric_encryption_keys,
            prefix=config.prefix,
            allow_unencrypted=config.allow_unencrypted,
        )
        overridden = {
            name
            for name in ("get_capacity", "serialize", "deserialize")
            if getattr(type(self), name) is not getattr(PostgresChannelLayer, name)
        }
        self._has_own_deserialize = "deserialize" in overridden
        self._operations = OperationBuilder(self, config, self._codec, overridden)
        self._loops = self._make_loops()
        self._sync: Callable[[], Sync | None] = lambda: None  # a weak reference
        # Its attributes are properties here, which keep their values in `config`.
        super().__init__(config.expiry, config.capacity, config.channel_capacity)  # type: ignore[arg-type]

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r})"

    @property
    def sync(self) -> Sync:
        """The calls for synchronous code. Holds the layer, and the layer does not hold it."""
        sync = self._sync()
        if sync is None:
            sync = self._make_sync()
            self._sync = weakref.ref(sync)
        return sync

    def _make_loops(self) -> Loops:
        return Loops(self.config, self._codec, self._operations.queue_capacity)

    def _make_sync(self) -> Sync:
        return Sync(self, self.config, self._operations, self._loops)

    # ------------------------------------------------------------------ options as attributes

    @property
    def prefix(self) -> str:
        """The option ``prefix``. Cannot be changed."""
        return self.config.prefix

    @property
    def client_prefix(self) -> str:
        """The part of specific channel names that only this process uses. `close` changes it."""
        return self._loops.client.id

    @property  # type: ignore[override]  # here fractions of a second count
    def expiry(self) -> float:
        """The option ``expiry``. A change applies to the messages that are sent after it."""
        return self.config.expiry

    @expiry.setter
    def expiry(self, seconds: float) -> None:
        self.config.change("expiry", seconds)

    @property
    def group_expiry(self) -> float | None:
        """The option ``group_expiry``. A change applies to each `group_add` after it."""
        return self.config.group_expiry

    @group_expiry.setter
    def group_expiry(self, seconds: float | None) -> None:
        self.config.change("group_expiry", seconds)

    @property
    def capacity(self) -> int:
        """The option ``capacity``. A change applies at once in this process.

        Except to a normal channel in a group: the next `group_add` of the channel to the group
        stores the capacity that then counts for the messages of the group.
        """
        return self.config.capacity

    @capacity.setter
    def capacity(self, messages: int) -> None:
        self.config.change("capacity", messages)
        self._loops.client.capacities_changed()

    @property  # type: ignore[override]  # compiled, as the base class's `get_capacity` expects it
    def channel_capacity(self) -> tuple[tuple[re.Pattern[str], int], ...]:
        """The option ``channel_capacity``, compiled: pairs of a pattern and a capacity.

        Set it to a dict as in the option, or to such pairs. A change applies as one of `capacity`.
        """
        return self.config.capacity_patterns

    @channel_capacity.setter
    def channel_capacity(self, capacities: Any) -> None:
        if isinstance(capacities, (list, tuple)):  # as `compile_capacities` returns it
            pairs, capacities = capacities, {}
            try:
                for pattern, capacity in pairs:
                    capacities.setdefault(pattern, capacity)  # of equal patterns the first counts
            except (TypeError, ValueError):
                raise ImproperlyConfigured(
                    "pg_layer: channel_capacity must be a dict, or a list of pairs of a pattern and"
                    f" a capacity, not {pairs!r}."
                ) from None
        self.config.change("channel_capacity", None if capacities == {} else capacities)
        self._loops.client.capacities_changed()

    # ------------------------------------------------------------------ methods to override

    def get_capacity(self, channel: str) -> int:
        """Return how many messages may wait in a channel. A subclass may override this.

        Every send to the channel calls it. The process that reads the channel calls it when the
        channel is first used, and when `capacity` or `channel_capacity` is set.
        """
        return self.config.capacity_of(channel)

    def serialize(self, message: dict[str, Any]) -> bytes:
        """Return the bytes of a message, before encryption. A subclass may override this.

        They must be a map of msgpack or an object of JSON. ``max_message_size`` applies to them.
        Errors are raised to the sender. Raises `InvalidMessage` for a value that the layer does not
        support.
        """
        return self._codec.serialise(message)

    def deserialize(self, payload: bytes) -> dict[str, Any]:
        """Return the message in bytes, after decryption. A subclass may override this.

        Return a new dict at each call. The bytes may also be those of a message that was sent from
        SQL (JSON), or of ``on_disconnect`` and ``on_reconnect``. If an override raises an error,
        the message is counted as undecodable, logged and skipped.
        """
        return self._codec.deserialise(payload)

    # ------------------------------------------------------------------ channels

    async def send(
        self, channel: str, message: dict[str, Any], *, expiry: float | None = None
    ) -> None:
        """Send a message to a channel.

        Return when the message is committed. A message to a channel of a client that has ended
        expires.

        ``expiry``: seconds the message may wait; default: the option ``expiry``.

        Raises `ChannelFull` if the channel has no free capacity; `MessageTooLarge`; `TypeError` for
        an invalid name or message; `ValueError` for an invalid expiry; `LayerUnavailable` if the
        database cannot be reached within ``send_timeout``; its subclass `OutcomeUnknown` if the
        connection broke before the result was known; `NotMigrated` if the tables are missing.
        """
        await self._loops.submit(self._operations.send(channel, message, expiry))

    async def send_many(
        self, messages: Iterable[tuple[str, dict[str, Any]]], *, expiry: float | None = None
    ) -> list[bool]:
        """Send ``(channel, message)`` pairs in one statement.

        Return a list of booleans in the order of the pairs: False if the channel was full and the
        message was not sent. ``expiry``: seconds the messages may wait; default: the option.

        At most 100,000 messages, together 256 MiB. An error in one pair is raised before any
        message is sent. Raises what `send` raises, except `ChannelFull`.
        """
        many = self._operations.send_many(messages, expiry)
        return await self._loops.submit(many) if many.operations else []

    async def receive(self, channel: str) -> dict[str, Any]:
        """Wait for the next message of a channel, and return it.

        A specific channel must be a channel that `new_channel` returned in this process. A
        cancelled call takes no message. While the database is unavailable, the call waits.

        Raises `TypeError` for an invalid name or a channel of another process; `LayerUnavailable`
        if the layer was closed and the channel no longer exists.
        """
        loops = self._loops
        client = loops.client
        queue = client.find_queue(channel) if channel.__class__ is str else None
        if queue is None or not queue.is_receivable:
            queue = self._queue_to_receive(client, channel)
        is_specific = "!" in channel
        if loops.receives_in_background:
            # Move receiving to this loop even if the queue has a message. Otherwise the background
            # thread keeps its connections, and a test runner cannot drop its database.
            loops.for_receiving(asyncio.get_running_loop())
        waiter: Waiter | None = None
        while True:
            taken = queue.pop(client.pending_deletes, waiter)
            if taken is None:
                waiter = await self._wait(queue, is_specific)
                if queue.is_retired or queue.is_closed:
                    client, queue = self._replace(client, queue)
                continue
            waiter = None
            message = self._open(client, queue, taken)
            if message is None:
                continue
            if is_specific and taken.key is not None and queue.is_pressed:
                await self._settle(queue, taken)
            client.counters.delivered()
            return message

    async def new_channel(self, prefix: str = "specific") -> str:
        """Return a new channel name on which only this process can receive. No round trip.

        ``prefix``: the beginning of the name: letters, digits, ``-``, ``_`` and ``.``, at most 60
        characters. Raises `TypeError` for another prefix.
        """
        if not isinstance(prefix, str):
            raise TypeError(
                f"The prefix of a channel's name must be a str, not {type(prefix).__name__}."
            )
        if len(prefix) > MAX_PREFIX:
            raise TypeError(
                f"The prefix of a channel's name must have at most {MAX_PREFIX} characters."
            )
        channel = self._loops.client.new_channel(prefix)
        self.require_valid_channel_name(channel)
        return channel

    # ------------------------------------------------------------------ groups

    async def group_add(self, group: str, channel: str) -> None:
        """Add a channel to a group.

        After this returns, the channel receives every later `group_send` of any process. The
        membership ends ``group_expiry`` seconds after the last call; if the option is None, with
        the process of the channel. Raises what `send` raises, except `ChannelFull`.
        """
        await self._loops.submit(self._operations.change(group, channel, added=True))

    async def group_discard(self, group: str, channel: str) -> None:
        """Remove a channel from a group. It is no error if the channel is not a member.

        The channel may miss messages that were sent before and are not dispatched yet.

        Raises what `group_add` raises.
        """
        await self._loops.submit(self._operations.change(group, channel, added=False))

    async def group_send(
        self,
        group: str,
        message: dict[str, Any],
        *,
        expiry: float | None = None,
        exclude: str | None = None,
    ) -> None:
        """Send a message to every channel in a group.

        Return when the message is committed. Members added by a `group_add` that has returned, in
        any process, receive it. A member whose channel is full misses it: the message is dropped
        for that member, counted in `stats` and logged.

        ``expiry``: seconds the message may wait; default: the option ``expiry``.
        ``exclude``: a channel that must not receive it, usually the sender's own.

        Raises what `send` raises, except `ChannelFull`.
        """
        await self._loops.submit(self._operations.group_send(group, message, expiry, exclude))

    async def group_send_many(
        self,
        messages: Iterable[tuple[str, dict[str, Any]]],
        *,
        expiry: float | None = None,
        exclude: str | None = None,
    ) -> list[bool]:
        """Send ``(group, message)`` pairs in one statement.

        Return a list of booleans in the order of the pairs: False if a normal channel in the group
        was full and misses the message. ``expiry`` and ``exclude`` apply to all messages, as in
        `group_send`. The limits and the errors are the same as for `send_many`.
        """
        many = self._operations.group_send_many(messages, expiry, exclude)
        return await self._loops.submit(many) if many.operations else []

    async def group_channels(self, group: str) -> list[str]:
        """Return the channels in a group, without channels of processes that have ended.

        Raises `TypeError` for an invalid name, `LayerUnavailable` and `NotMigrated`.
        """
        name = self._operations.group(group)
        return await self._loops.read(name, lambda engine, end: engine.group_channels(name, end))

    async def group_count(self, group: str) -> int:
        """Return the number of channels in a group, without channels of processes that have ended.

        Raises `TypeError` for an invalid name, `LayerUnavailable` and `NotMigrated`.
        """
        name = self._operations.group(group)
        return await self._loops.read(name, lambda engine, end: engine.group_count(name, end))

    # ------------------------------------------------------------------ all

    async def flush(self) -> None:
        """Remove all messages and memberships of this layer's prefix, in every process.

        Return when the tables are empty and every live process has emptied its channels: later
        calls in any process find nothing from before. A process that does not answer, because it
        was stopped or killed, delays the call by ``send_timeout`` seconds once, and is logged. It
        empties its channels when it continues.

        Rows that an open transaction has written or locked remain. Jobs that are being claimed at
        this moment also remain.

        Raises `LayerUnavailable` if nothing was removed; its subclass `OutcomeUnknown` if it is
        unknown whether all was removed and noticed; `NotMigrated`.
        """
        await flush(self._loops)

    async def health(self) -> Health:
        """Try the path to the database and back, and return the result: see `Health`.

        Raises no error of the layer: ``problems`` lists what is wrong.
        """
        try:
            return await self._loops.run(self._loops.for_sending, examine, is_read=True)
        except LayerUnavailable as error:
            return Health(
                lease_age=None,
                listener="off",
                last_notification_age=None,
                round_trip=None,
                problems=[str(error)],
            )

    def stats(self) -> Stats:
        """Return the counters and the state of the layer in this process: see `Stats`.

        The dict can be serialised as JSON. The call runs no query and does not wait. It may be made
        at any time, from any thread, with or without an event loop. `close` does not reset the
        counters. In a child after ``fork`` they begin at zero.
        """
        return make_stats(self._loops.client.counters.read(), self._loops.state())

    async def close(self) -> None:
        """Close the layer in this process.

        End the lease and the memberships, release the jobs that `receive` has not returned, and
        close the connections. The layer can be used again afterwards, but its channels no longer
        exist.

        If the call is cancelled, closing continues. If its event loop ends first, the next `close`
        or the end of the process completes it.
        """
        await self._loops.close()

    # ------------------------------------------------------------------ helpers

    def _queue_to_receive(self, client: Client, channel: str) -> ChannelQueue:
        self._operations.check_channel(channel)
        if "!" in channel and not client.owns(channel):
            raise TypeError(
                f"Channel {channel} belongs to another process: "
                "new_channel() has not returned it here."
            )
        queue = client.queue(channel)
        queue.allow_receive()
        return queue

    async def _wait(self, queue: ChannelQueue, is_specific: bool) -> Waiter | None:
        """Wait until the queue may have a message, or has ended. Return the waiter for `pop`."""
        loop = asyncio.get_running_loop()
        engine = self._loops.for_receiving(loop)
        if not is_specific or engine.loop is not loop:
            want = None if is_specific else partial(engine.call, engine.want, queue.channel)
            return await queue.wait(None if engine.loop is loop else FOREIGN_WAIT, want)
        waiter = queue.add_waiter(loop)
        if waiter is not None:
            try:
                await waiter
            except BaseException:
                queue.remove_waiter(waiter)
                raise
        return waiter

    def _replace(self, client: Client, queue: ChannelQueue) -> tuple[Client, ChannelQueue]:
        """Return the client and the queue that take the place of a queue that has ended.

        Raises `LayerUnavailable` if the layer was closed and the channel no longer exists. A normal
        channel continues with the next client; if there is none, the process is ending.
        """
        if not queue.is_retired:
            if "!" in queue.channel or self._loops.client is client:
                raise LayerUnavailable("The channel layer was closed, and its channels are gone.")
            client = self._loops.client
        return client, self._queue_to_receive(client, queue.channel)

    def _open(
        self, client: Client, queue: ChannelQueue, message: QueuedMessage
    ) -> dict[str, Any] | None:
        """Decode a message of the queue. Return None if it has expired or is undecodable."""
        payload, expires_at, key = message
        if key is not None:
            engine = self._loops.main_engine
            if engine is not None:
                engine.call(engine.schedule_deletion, queue)
        if expires_at <= client.clock.now():
            client.counters.add("dropped_expired")
            return None
        try:
            return self._codec.decode(
                payload, self.deserialize if self._has_own_deserialize else None
            )
        except UndecodableMessage as error:
            client.log_undecodable(queue.channel, error)
            return None

    async def _settle(self, queue: ChannelQueue, message: QueuedMessage) -> None:
        """Wait until the row of a received message is deleted, because senders count it."""
        find = partial(self._loops.for_receiving, asyncio.get_running_loop())
        try:
            await self._loops.run(find, lambda engine: engine.settle(queue), is_read=True)
        except LayerUnavailable:
            pass
        except asyncio.CancelledError:
            # The caller does not receive the message. Put it back, without its deleted row.
            queue.push_front(message._replace(key=None))
            raise
