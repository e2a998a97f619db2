"""The sending side of a client on one loop: a batcher each for sends, group sends and questions to owners."""

from __future__ import annotations

import asyncio
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
from pg_layer._state.capacity import Room
from pg_layer._state.client import Client
from pg_layer.exceptions import ChannelFull, LayerUnavailable, OutcomeUnknown, PgLayerError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

CHANGE_SIZE = 100  # bytes of a membership change, as a batcher counts them
ANNOUNCE_TIMEOUT = 5.0  # seconds
RETRY = 1.0  # seconds before what could not be announced is announced again


class Write(Protocol[T_co]):
    """A statement that writes, and returns rows to announce if it is quiet."""

    async def __call__(self, session: Session, *, quiet: bool) -> tuple[T_co, list[Unannounced]]:
        """Run it."""
        ...


class Sender:
    """Writes in batches. Bound to a loop; its coroutines may be called on any."""

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
        self._room = Room()
        loop = self._loop = asyncio.get_running_loop()
        timeout = client.config.send_timeout
        self._sends = Batcher[Send | Many](loop, self._send, spawn, _payload_size, timeout)
        self._group_sends = Batcher[GroupSend | Many](
            loop, self._group_send, spawn, _payload_size, timeout
        )
        self._asks = Batcher[Change](loop, self._ask, spawn, lambda _: CHANGE_SIZE, timeout)
        self._batcher_of: dict[type, Batcher[Any]] = {
            Send: self._sends,
            GroupSend: self._group_sends,
            Change: self._asks,
        }
        self.announce_soon()

    def close(self) -> None:
        """Take no more."""
        for batcher in self._batcher_of.values():
            batcher.close()

    @property
    def waiting(self) -> int:
        """How many operations wait for a write in flight to end. From any thread."""
        return sum(batcher.waiting for batcher in self._batcher_of.values())

    async def finish(self) -> None:
        """Take no more. Return when the writes in flight have ended."""
        await asyncio.gather(*(batcher.finish() for batcher in self._batcher_of.values()))

    def submit(self, operation: Operation) -> Coroutine[Any, Any, Any]:
        """Write it, from any loop. Return when it is committed: of `Many`, whether each was accepted.

        Raises `ChannelFull`, and what `Batcher.submit` raises.
        """
        batcher = self._batcher_of[
            type(operation.operations[0] if isinstance(operation, Many) else operation)
        ]
        return batcher.submit(operation)

    # ------------------------------------------------------------------ writing

    async def _send(self, operations: list[Send | Many], timeout: float) -> Sequence[Outcome]:
        sends: list[Send] = _flat(operations)
        room = self._room

        async def write(session: Session, *, quiet: bool) -> tuple[Sent, list[Unannounced]]:
            prefix = self.client.config.prefix
            return await write_sends(session, prefix, sends, room, own=True, quiet=quiet)

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

    async def _ask(self, changes: list[Change], timeout: float) -> Sequence[Outcome]:
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

        # Adding or discarding twice changes nothing.
        await self._write(write, timeout, is_idempotent=True)
        return [None] * len(changes)

    async def _write(self, write: Write[T], timeout: float, *, is_idempotent: bool = False) -> T:
        """Write, behind what this process could not announce before; remember what it cannot announce now."""
        is_quiet = bool(self._announcer) and not await self._announce(
            min(timeout / 2, ANNOUNCE_TIMEOUT)
        )
        loud, quietly = partial(write, quiet=False), partial(write, quiet=True)
        result, rows = await self.connections.run(
            quietly if is_quiet else loud,
            quietly=quietly,
            timeout=timeout,
            is_idempotent=is_idempotent,
        )
        self.announce_later(rows)
        return result

    async def flush(self) -> Key | None:
        """Remove all of the prefix. Return the key of the control message to this client, if there is one."""
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
        """Announce these rows before whatever is written next. From any thread."""
        if rows:
            self._announcer.add(rows)
            self._loop.call_soon_threadsafe(self.announce_soon)

    async def _announce(self, timeout: float) -> bool:
        """Announce what was written quietly. Return whether all is announced."""
        while rows := self._announcer.first():
            try:
                await self.connections.run(
                    partial(queries.announce, rows=rows), timeout=timeout, is_idempotent=True
                )
            except PgLayerError:
                return False
            self._announcer.announced(rows)
        return True

    def announce_soon(self) -> None:
        """Announce what was written quietly, as soon as the server takes it. On this loop."""
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
            pass  # what is written next tries again
        self._is_retrying = False


def count_sent(client: Client, messages: int, sent: Sent) -> None:
    """Count messages to channels."""
    client.counters.add("batches")
    client.counters.add("sent", messages - len(sent.full))
    client.counters.add("refused_full", len(sent.full))


def count_group_sent(client: Client, sends: Sequence[GroupSend], sent: GroupSent) -> None:
    """Count messages to groups."""
    client.counters.add("batches")
    client.counters.add("group_sent", len(sends))
    for index, channel in sent.missed:
        client.count_dropped(sends[index].group, channel)


def channel_full(send: Send) -> ChannelFull:
    """The error for a message that was refused."""
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
    """``refused``: indexes into the flat list of messages."""
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
