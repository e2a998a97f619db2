"""The channel layer: Channels' interface, and nothing else."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any, TypeVar

from channels.layers import BaseChannelLayer

from pg_layer._config.options import load
from pg_layer._messages.codec import Codec
from pg_layer._runtime.engine import Engine
from pg_layer._runtime.health import Health, examine
from pg_layer._runtime.loops import Loops
from pg_layer._send.operations import OperationBuilder
from pg_layer._state.channel_queue import ChannelQueue, QueuedMessage, Waiter
from pg_layer._state.client import Client
from pg_layer._state.counters import Stats, make_stats
from pg_layer._sync.api import Sync
from pg_layer.exceptions import LayerUnavailable, UndecodableMessage

T = TypeVar("T")

NAMES_MOST = 10_000
# Characters of a new channel's prefix. Its name adds 26 and a number that grows; Channels allows 99.
MAX_PREFIX = 60
BRIDGED_WAIT = (
    1.0  # seconds after which a receiver on another loop looks whether the home loop still runs
)


class PostgresChannelLayer(BaseChannelLayer):
    """A channel layer on PostgreSQL.

    Options are those of ``CONFIG`` in ``CHANNEL_LAYERS``, keyword-only, and described in the README; a
    wrong one raises `django.core.exceptions.ImproperlyConfigured`. Nothing is connected before the first
    call that needs it. Every method may be called from any event loop in any thread.
    """

    extensions = ("groups", "flush")

    # Channels' own rules, without the loopholes of Unicode digits and a newline at the end.
    channel_name_regex = re.compile(r"[a-zA-Z\d\-_.]+(![\w\-.]*)?\Z", re.ASCII)
    group_name_regex = re.compile(r"[a-zA-Z\d\-_.]+\Z", re.ASCII)

    def __init__(self, **options: object) -> None:
        self.config = load(options)
        super().__init__(capacity=self.config.capacity)
        self.expiry = self.config.expiry  # type: ignore[assignment]  # here fractions of a second count
        config = self.config
        self._codec = Codec(
            config.serializer_format,
            config.max_message_size,
            config.symmetric_encryption_keys,
            prefix=config.prefix,
            allow_unencrypted=config.allow_unencrypted,
        )
        self._loops = Loops(config, self._codec)
        self._operations = OperationBuilder(
            config, self._codec, self._check_channel, self._check_group
        )
        self.sync = Sync(config, self._operations, self._loops)
        # Names that were found valid, as the check costs more than much of the rest.
        self._valid_channels: set[str] = set()
        self._valid_groups: set[str] = set()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config!r})"

    def get_capacity(self, channel: str) -> int:
        """How many messages may wait in a channel."""
        return self.config.capacity_of(channel)

    # ------------------------------------------------------------------ channels

    async def send(
        self, channel: str, message: dict[str, Any], *, expiry: float | None = None
    ) -> None:
        """Send a message to a channel; when this returns, it is committed.

        ``expiry``: seconds for which this message may wait, if not as the option says. Raises `ChannelFull`
        if as many messages wait in the channel as it holds, `MessageTooLarge`, `TypeError` for a bad name or
        message, `ValueError` for a bad expiry, `LayerUnavailable` if the database cannot be reached within
        ``send_timeout``, `OutcomeUnknown` (which is one) if it cannot be told whether the message was sent,
        `NotMigrated`. What is sent to the channel of a client that is gone expires.
        """
        await self._loops.submit(self._operations.send(channel, message, expiry))

    async def send_many(
        self, messages: Iterable[tuple[str, dict[str, Any]]], *, expiry: float | None = None
    ) -> list[bool]:
        """Send ``(channel, message)`` pairs in one statement; returns of each whether it was accepted.

        False: its channel is full. Otherwise as `send`; what is wrong with one is raised before any is sent.
        At most 100,000 messages, together 256 MiB.
        """
        many = self._operations.send_many(messages, expiry)
        return await self._loops.submit(many) if many.operations else []

    async def receive(self, channel: str) -> dict[str, Any]:
        """Wait for the next message of a channel, and return it.

        A specific channel must be one of this process's own. A cancelled call takes no message. Never
        raises because the database is away: it waits.
        """
        loops = self._loops
        client = loops.client
        queue = client.find_queue(channel) if channel.__class__ is str else None
        if queue is None or not queue.is_receivable:
            queue = self._queue_to_receive(client, channel)
        is_specific = "!" in channel
        if loops.receives_in_background:
            # Also if a message is here already: the thread would keep its connections, which test runners
            # wait for when they drop their database.
            loops.for_receiving(asyncio.get_running_loop())
        waiter: Waiter | None = None
        while True:
            taken = queue.pop(client.pending_deletes, waiter)
            if taken is None:
                loop = asyncio.get_running_loop()
                engine = loops.for_receiving(loop)
                if is_specific and engine.loop is loop:
                    waiter = queue.enlist(loop)
                    if waiter is not None:
                        try:
                            await waiter
                        except BaseException:
                            queue.desert(waiter)
                            raise
                else:
                    want = None if is_specific else partial(engine.call, engine.want, channel)
                    waiter = await queue.wait(None if engine.loop is loop else BRIDGED_WAIT, want)
                if queue.is_retired:
                    queue = self._queue_to_receive(client, channel)
                elif queue.is_closed:
                    if is_specific or loops.client is client:  # closed: the process ends
                        raise LayerUnavailable(
                            "The channel layer was closed, and its channels are gone."
                        )
                    client = loops.client
                    queue = self._queue_to_receive(client, channel)
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
        """A new channel name that only this process can receive on. Costs no round trip.

        ``prefix``: what the name begins with; letters, digits, ``-``, ``_`` and ``.``, at most 60.
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
        """Add a channel to a group: when this returns, it gets every later `group_send` from anywhere.

        Ends ``group_expiry`` seconds after the last call, or, where that is None, with the channel's process.
        """
        await self._loops.submit(self._operations.change(group, channel, added=True))

    async def group_discard(self, group: str, channel: str) -> None:
        """Remove a channel from a group; no error if it is not in it."""
        await self._loops.submit(self._operations.change(group, channel, added=False))

    async def group_send(
        self,
        group: str,
        message: dict[str, Any],
        *,
        expiry: float | None = None,
        exclude: str | None = None,
    ) -> None:
        """Send a message to all channels of a group; when this returns, it is committed.

        ``exclude``: a channel that is not to get it, most often the sender's own. A member whose channel is
        full misses it, silently but for a counter and a log line. Otherwise as `send`.
        """
        await self._loops.submit(self._operations.group_send(group, message, expiry, exclude))

    async def group_send_many(
        self,
        messages: Iterable[tuple[str, dict[str, Any]]],
        *,
        expiry: float | None = None,
        exclude: str | None = None,
    ) -> list[bool]:
        """Send ``(group, message)`` pairs in one statement; returns of each whether all could have it.

        False: a normal channel in its group is full and misses it. Otherwise as `group_send` and `send_many`.
        """
        many = self._operations.group_send_many(messages, expiry, exclude)
        return await self._loops.submit(many) if many.operations else []

    async def group_channels(self, group: str) -> list[str]:
        """The channels in a group, without those of processes that are gone. Raises as `send`."""
        name = self._operations.group(group)
        return await self._read(lambda engine: engine.group_channels(name))

    async def group_count(self, group: str) -> int:
        """How many channels are in a group, without those of processes that are gone. Raises as `send`."""
        name = self._operations.group(group)
        return await self._read(lambda engine: engine.group_count(name))

    # ------------------------------------------------------------------ all

    async def flush(self) -> None:
        """Remove all messages and memberships of this layer's prefix, for every process.

        What open transactions have written or locked stays, and so do jobs that are handed out just now.
        """
        await self._loops.run(self._loops.for_sending, Engine.flush)

    async def health(self) -> Health:
        """How this process's use of the layer fares. Raises nothing: what is wrong stands in ``problems``."""
        try:
            return await self._read(examine)
        except LayerUnavailable as error:
            return Health(
                lease_age=None,
                listener="off",
                last_notification_age=None,
                round_trip=None,
                problems=[str(error)],
            )

    def stats(self) -> Stats:
        """What the layer did in this process since it was made, and how it stands now: see `Stats`.

        A plain dict that JSON can carry. Costs no query and waits for nothing; may be called at any time,
        from any thread, with or without an event loop. `close` leaves the counters as they are; in a child
        after ``fork`` all begin at zero.
        """
        return make_stats(self._loops.client.counters.read(), self._loops.state())

    async def close(self) -> None:
        """Take leave: give back the lease, the memberships and the jobs not handed over, and close the
        connections.

        The layer can be used again afterwards; channels made before are gone. A close that is cancelled goes
        on; what does not end with its event loop is done by the next close, or at the end of the process.
        """
        self.sync.forget()
        await self._loops.close()

    # ------------------------------------------------------------------ helpers

    async def _read(self, work: Callable[[Engine], Coroutine[Any, Any, T]]) -> T:
        return await self._loops.run(self._loops.for_sending, work, is_read=True)

    def _check_channel(self, channel: str) -> None:
        if channel.__class__ is not str or channel not in self._valid_channels:
            self.require_valid_channel_name(channel)
            _remember(self._valid_channels, channel)

    def _check_group(self, group: str) -> None:
        if group.__class__ is not str or group not in self._valid_groups:
            self.require_valid_group_name(group)
            _remember(self._valid_groups, group)

    def _queue_to_receive(self, client: Client, channel: str) -> ChannelQueue:
        self._check_channel(channel)
        if "!" in channel and not client.owns(channel):
            raise TypeError(
                f"Channel {channel} is of another process: here new_channel() has not returned it."
            )
        queue = client.queue(channel)
        queue.is_receivable = True
        return queue

    def _open(
        self, client: Client, queue: ChannelQueue, message: QueuedMessage
    ) -> dict[str, Any] | None:
        """Decode a message that was taken; None if it has expired or cannot be decoded."""
        payload, expires_at, key = message
        if key is not None:
            engine = self._loops.home
            if engine is not None:
                engine.call(engine.received, queue)
        if expires_at <= client.clock.now():
            client.counters.add("dropped_expired")
            return None
        try:
            return self._codec.decode(payload)
        except UndecodableMessage as error:
            client.undecodable(queue.channel, error)
            return None

    async def _settle(self, queue: ChannelQueue, message: QueuedMessage) -> None:
        """Wait until what was received makes room: senders count its row until that is gone."""
        find = partial(self._loops.for_receiving, asyncio.get_running_loop())
        try:
            await self._loops.run(find, lambda engine: engine.settle(queue), is_read=True)
        except LayerUnavailable:
            pass
        except asyncio.CancelledError:
            # Not handed over. Its row is being deleted, so that it has none any more.
            queue.push_front(message._replace(key=None))
            raise


def _remember(names: set[str], name: str) -> None:
    if len(names) >= NAMES_MOST:
        names.clear()
    names.add(name)
