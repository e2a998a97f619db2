"""The sending side of a client on one event loop.

It has a batcher each for sends, group sends and membership requests.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from typing import Any, Protocol, TypeVar

from pg_layer._db.pool import Connections
from pg_layer._db.queries import lease
from pg_layer._db.queries import send as queries
from pg_layer._db.queries.receive import look_at_queue
from pg_layer._db.queries.send import GroupSent, Sent, Unannounced
from pg_layer._db.session import Session
from pg_layer._messages.rows import Key
from pg_layer._process.tasks import Spawn
from pg_layer._send.announcer import Announcer
from pg_layer._send.batcher import Batcher, Outcome
from pg_layer._send.operations import Change, GroupSend, Many, Operation, Send
from pg_layer._send.writes import write_changes, write_group_sends, write_sends
from pg_layer._state.capacity import KnownCapacity
from pg_layer._state.client import Client
from pg_layer.exceptions import ChannelFull, LayerUnavailable, OutcomeUnknown, PgLayerError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

CHANGE_SIZE = 100  # bytes that a membership change counts in a batch
ANNOUNCE_TIMEOUT = 5.0  # seconds
RETRY = 1.0  # seconds between attempts to announce


class Write(Protocol[T_co]):
    """A statement that writes. If it is quiet, it also returns the rows to announce."""

    async def __call__(self, session: Session, *, quiet: bool) -> tuple[T_co, list[Unannounced]]:
        """Run the statement on a session."""
        ...


class Sender:
    """The batched writes of operations.

    Bound to the event loop on which it is created. Its coroutines may be called on any loop.
    """

    def __init__(
        self,
        client: Client,
        connections: Connections,
        spawn: Spawn,
        announcer: Announcer,
    ) -> None:
        self.client = client
        self.connections = connections
        self._spawn = spawn
        self._announcer = announcer
        self._is_retrying = False
        self._known_capacity = KnownCapacity()
        loop = self._loop = asyncio.get_running_loop()
        timeout = client.config.send_timeout
        self._sends = Batcher[Send | Many](loop, self._send, spawn, _payload_size, timeout)
        self._group_sends = Batcher[GroupSend | Many](
            loop, self._group_send, spawn, _payload_size, timeout
        )
        self._requests = Batcher[Change](loop, self._request, spawn, lambda _: CHANGE_SIZE, timeout)
        self._batcher_of: dict[type, Batcher[Any]] = {
            Send: self._sends,
            GroupSend: self._group_sends,
            Change: self._requests,
        }
        self.announce_soon()

    def close(self) -> None:
        """Accept no more operations. Those that wait fail with `NotBegun`."""
        for batcher in self._batcher_of.values():
            batcher.close()

    @property
    def waiting(self) -> int:
        """Return the number of operations that wait for a write in flight. Thread-safe."""
        return sum(batcher.waiting for batcher in self._batcher_of.values())

    async def finish(self) -> None:
        """Accept no more operations. Return when the writes in flight have ended."""
        await asyncio.gather(*(batcher.finish() for batcher in self._batcher_of.values()))

    def submit(
        self, operation: Operation, deadline: float | None = None
    ) -> Coroutine[Any, Any, Any]:
        """Write an operation. Return when it is committed.

        May be called on any loop. For `Many` the result contains, for each message, whether it was
        accepted. ``deadline``: see `Batcher.submit`.

        Raises `ChannelFull`, and what `Batcher.submit` raises.
        """
        batcher = self._batcher_of[
            type(operation.operations[0] if isinstance(operation, Many) else operation)
        ]
        return batcher.submit(operation, deadline)

    # ------------------------------------------------------------------ writing

    async def _send(self, operations: list[Send | Many], timeout: float) -> Sequence[Outcome]:
        sends: list[Send] = _flat(operations)
        known = self._known_capacity

        async def write(session: Session, *, quiet: bool) -> tuple[Sent, list[Unannounced]]:
            prefix = self.client.config.prefix
            return await write_sends(session, prefix, sends, known, own=True, quiet=quiet)

        sent = await self._write(write, timeout)
        count_sent(self.client, len(sends), sent)
        return _outcomes(operations, sent.full, channel_full)

    async def _group_send(
        self, operations: list[GroupSend | Many], timeout: float
    ) -> Sequence[Outcome]:
        sends: list[GroupSend] = _flat(operations)

        async def write(session: Session, *, quiet: bool) -> tuple[GroupSent, list[Unannounced]]:
            prefix = self.client.config.prefix
            return await write_group_sends(session, prefix, sends, own=True, quiet=quiet)

        sent = await self._write(write, timeout)
        count_group_sent(self.client, sends, sent)
        return _outcomes(operations, {index for index, _ in sent.missed}, lambda send: None)

    async def _request(self, changes: list[Change], timeout: float) -> Sequence[Outcome]:
        numbered = self.client.next_number()

        async def write(session: Session, *, quiet: bool) -> tuple[None, list[Unannounced]]:
            config = self.client.config
            return None, await write_changes(
                session,
                config.prefix,
                config.group_expiry,
                changes,
                own=True,
                quiet=quiet,
                numbered=numbered,
            )

        # Idempotent: a second add or discard changes nothing.
        await self._write(write, timeout, is_idempotent=True)
        return [None] * len(changes)

    async def _write(self, write: Write[T], timeout: float, *, is_idempotent: bool = False) -> T:
        """Run a statement that writes, on a connection of the pool.

        First announce the rows that this process could not announce before: nothing may overtake
        them. If that fails, or the server refuses NOTIFY, the statement is quiet, and its rows are
        announced later.
        """
        deadline = time.monotonic() + timeout
        is_quiet = bool(self._announcer) and not await self._announce(
            min(timeout / 2, ANNOUNCE_TIMEOUT)
        )
        announcing, quietly = partial(write, quiet=False), partial(write, quiet=True)
        result, rows = await self.connections.run(
            quietly if is_quiet else announcing,
            quietly=quietly,
            timeout=deadline - time.monotonic(),
            is_idempotent=is_idempotent,
        )
        self.announce_later(rows)
        return result

    async def flush(self) -> Key | None:
        """Remove all messages and memberships of the prefix, in parts.

        Return the key of the control message to this client, if there is one.

        Raises `LayerUnavailable` if nothing was removed, `OutcomeUnknown` otherwise.
        """
        client = self.client
        part = partial(lease.flush_part, prefix=client.config.prefix, address=client.address)
        is_begun = is_done = False
        while not is_done:
            try:
                is_done, key, rows = await self.connections.run(
                    partial(part, quiet=False),
                    quietly=partial(part, quiet=True),
                    timeout=client.config.send_timeout,
                    is_idempotent=True,
                )
            except LayerUnavailable as error:
                if is_begun:
                    raise OutcomeUnknown(
                        "A part was removed; it is unknown whether all was."
                    ) from error
                raise
            is_begun = True
        self.announce_later(rows)
        return key

    # ------------------------------------------------------------------ announcing later

    def announce_later(self, rows: Sequence[Unannounced]) -> None:
        """Announce rows before the next write, or when the server takes NOTIFY. Thread-safe."""
        if rows:
            self._announcer.add(rows)
            self._loop.call_soon_threadsafe(self.announce_soon)

    async def _announce(self, timeout: float) -> bool:
        """Announce the rows of quiet statements. Return whether all are announced.

        ``timeout``: seconds for all of them together.
        """
        deadline = time.monotonic() + timeout
        while rows := self._announcer.first():
            try:
                await self.connections.run(
                    partial(queries.announce, rows=rows),
                    timeout=deadline - time.monotonic(),
                    is_idempotent=True,
                )
            except PgLayerError:
                return False
            self._announcer.announced(rows)
        return True

    def announce_soon(self) -> None:
        """Begin to announce the rows of quiet statements. Must be called on this loop."""
        if self._announcer and not self._is_retrying:
            self._is_retrying = True
            self._spawn("Announcing", self._keep_announcing)

    async def _keep_announcing(self) -> None:
        try:
            while not await self._announce(ANNOUNCE_TIMEOUT):
                await asyncio.sleep(RETRY)
                await self.connections.run(
                    look_at_queue, timeout=ANNOUNCE_TIMEOUT, is_idempotent=True
                )
        except PgLayerError:
            pass  # the next write tries again
        self._is_retrying = False


def count_sent(client: Client, messages: int, sent: Sent) -> None:
    """Count messages to channels in the counters of the client."""
    client.counters.add("batches")
    client.counters.add("sent", messages - len(sent.full))
    client.counters.add("refused_full", len(sent.full))


def count_group_sent(client: Client, sends: Sequence[GroupSend], sent: GroupSent) -> None:
    """Count messages to groups in the counters of the client."""
    client.counters.add("batches")
    client.counters.add("group_sent", len(sends))
    for index, channel in sent.missed:
        client.count_dropped(sends[index].group, channel)


def channel_full(send: Send) -> ChannelFull:
    """Return the error for a message that was refused."""
    return ChannelFull(f"Channel {send.channel} is full: {send.capacity} messages wait.")


def _flat(operations: list[Any]) -> list[Any]:
    if Many not in map(type, operations):
        return operations
    return [
        send
        for operation in operations
        for send in (operation.operations if isinstance(operation, Many) else (operation,))
    ]


def _outcomes(
    operations: list[Any], refused: set[int], refusal: Callable[[Any], Outcome]
) -> list[Outcome]:
    """Return the outcome of each operation.

    ``refused``: the indexes of refused messages in the flat list of all messages. ``refusal``
    returns the outcome of a refused message that was sent alone.
    """
    if not refused and Many not in map(type, operations):
        return [None] * len(operations)
    outcomes: list[Outcome] = []
    index = 0
    for operation in operations:
        if isinstance(operation, Many):
            outcomes.append(
                [i not in refused for i in range(index, index + len(operation.operations))]
            )
            index += len(operation.operations)
        else:
            outcomes.append(refusal(operation) if index in refused else None)
            index += 1
    return outcomes


def _payload_size(operation: Send | GroupSend | Many) -> int:
    return (
        sum(len(each.payload) for each in operation.operations)
        if isinstance(operation, Many)
        else len(operation.payload)
    )
