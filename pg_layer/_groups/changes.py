"""Changes of memberships of the client's own channels.

`Sender` requests those of other channels from their owners.
"""

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

DISCARDED = "The channel receives nothing more from the group, but the table may not show that yet."


class OwnChanges:
    """Membership changes of the client's own channels. Bound to the owner loop.

    ``lease`` waits for the first renewal of the lease, at most a number of seconds. ``gives_up``
    returns whether calls no longer wait for the database.
    """

    def __init__(
        self,
        client: Client,
        writer: MembershipWriter,
        receiver: Receiver,
        lease: Callable[[float], Awaitable[None]],
        gives_up: Callable[[], bool],
    ) -> None:
        self._client = client
        self._writer = writer
        self._receiver = receiver
        self._lease = lease
        self._gives_up = gives_up

    async def write(self, changes: list[Change], timeout: float) -> Sequence[Outcome]:
        """Make changes within ``timeout`` seconds. Return an outcome for each.

        Of several changes of one pair of group and channel, the last one counts.
        """
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
                    for pair in gone:  # close() or a sweep removes the rows
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
        # Listen before the rows are written, so that messages that are sent after that are heard.
        # Without a connection, the next one listens to the expected buckets and catches up.
        with self._receiver.expecting(buckets):
            await self._receiver.listen(buckets)
            while True:
                last_flush = client.memberships.last_flush
                since = await self._writer.write(present, gone, deadline - time.monotonic())
                # A flush that was applied during the statement is earlier in the owner's order, but
                # may have removed the new rows. Then write them again.
                if client.memberships.last_flush == last_flush:
                    break
            # No await from here on: the writer's lock is free, and the next statement of the owner
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
        """Return the outcome of a discard that is applied in memory and could not be written."""
        if self._gives_up():
            return None
        if isinstance(error, OutcomeUnknown):
            return error
        unknown = OutcomeUnknown(f"{DISCARDED} {error}")
        unknown.__cause__ = error
        return unknown
