"""Changes of memberships of own channels. Those of other channels are asked for by `Sender`."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from pg_layer._groups.writer import MembershipWriter
from pg_layer._messages.addresses import group_address, notification_channel
from pg_layer._send.batcher import Outcome
from pg_layer._send.operations import Change
from pg_layer._state.client import Client
from pg_layer._state.memberships import Pair
from pg_layer.exceptions import LayerUnavailable, OutcomeUnknown

if TYPE_CHECKING:
    from pg_layer._receive.receiver import Receiver

DISCARDED = "Discarded channels receive nothing more, but the table is not known to be changed yet."


class OwnChanges:
    """Adds and discards the client's own channels. Bound to the owner loop."""

    def __init__(
        self,
        client: Client,
        writer: MembershipWriter,
        receiver: Receiver,
        lease: Callable[[float], Awaitable[None]],
        gives_up: Callable[[], bool],
    ) -> None:
        # lease: waits for the first renewal. gives_up: whether nothing waits for the database any more.
        self._client = client
        self._writer = writer
        self._receiver = receiver
        self._lease = lease
        self._gives_up = gives_up

    async def write(self, changes: list[Change], timeout: float) -> Sequence[Outcome]:
        """Make these changes, of which the last one of a pair counts. Return an outcome for each."""
        assert self._client.is_owned_here()
        deadline = time.monotonic() + timeout
        last = {(change.group, change.channel): change.added for change in changes}
        present = [pair for pair, added in last.items() if added]
        gone = [pair for pair, added in last.items() if not added]
        with self._receiver.dispatcher.own_change(last):
            for pair in gone:
                self._client.memberships.discard(*pair)
            try:
                if self._gives_up() and not present:
                    for pair in gone:  # the end of the client or of its lease removes the rows
                        self._writer.write_soon(*pair)
                else:
                    await self._write(present, gone, deadline)
            except LayerUnavailable as error:
                return [error if change.added else self._discarded(error) for change in changes]
            return [None] * len(changes)

    async def _write(self, present: list[Pair], gone: list[Pair], deadline: float) -> None:
        client = self._client
        await self._lease(deadline - time.monotonic())
        prefix = client.config.prefix
        buckets = {notification_channel(group_address(prefix, group)) for group, _ in present}
        # Before the rows are written: what is sent after that is heard. Without a connection the next one
        # listens to what is expected, and catches up.
        with self._receiver.expecting(buckets):
            await self._receiver.listen(buckets)
            while True:
                last_flush = client.memberships.last_flush
                since = await self._writer.write(present, gone, deadline - time.monotonic())
                # A flush that was applied during the statement came first in the owner's order, but may have
                # removed the new rows. Then write them again.
                if client.memberships.last_flush == last_flush:
                    break
            # No await from here on: as soon as the writer's lock is free, the next statement of the owner
            # takes its rows from memory.
            expiry = client.config.group_expiry
            expires_at = math.inf if expiry is None else client.clock.now() + expiry
            opened: set[str] = set()
            for group, channel in present:
                if group not in client.memberships.groups:
                    opened.add(group)
                client.memberships.add(group, client.queue(channel), expires_at, since)
            for group in opened:
                client.memberships.note_join(group, since)
            client.memberships.note_own_change((*present, *gone), since)

    def _discarded(self, error: LayerUnavailable) -> Outcome:
        """The outcome of a discard that the owner has applied in memory, and could not write."""
        if self._gives_up():
            return None
        if isinstance(error, OutcomeUnknown):
            return error
        unknown = OutcomeUnknown(f"{DISCARDED} {error}")
        unknown.__cause__ = error
        return unknown
