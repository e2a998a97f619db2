"""The scenarios' statements in plain psycopg, to measure what PostgreSQL itself can do.

They involve no layer: no inboxes, no capacity, no leases, no retries, and one sender whose batches
are full from the start. So each figure is a ceiling, and a layer's share of it shows the cost of
the layer. Messages are numbered and counted as in all scenarios.
"""

from __future__ import annotations

import asyncio
import binascii
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import msgpack  # type: ignore[import-untyped]
import psycopg
from psycopg.types.numeric import Int8

from benchmarks.board import Window, warm_up
from benchmarks.scenarios.base import Receipt, Roles, Sent, Stage, message, pace, report_at_end
from benchmarks.statistics import Stream, Tally, rate

_pack: Callable[[dict[str, Any]], bytes] = msgpack.packb
_unpack: Callable[[bytes], dict[str, Any]] = msgpack.unpackb

Rows = psycopg.AsyncConnection[tuple[Any, ...]]

_JOBS = "bare_jobs"
_TAKE_AT_MOST = 32
#: At most so many notifications, each of one statement, are read at once.
_RANGES_AT_MOST = 10

_INSERT_ONE = """
    INSERT INTO bare_message AS m (inbox, nonce, payload, expires_at)
    SELECT i.inbox, (random() * 9007199254740992)::bigint, %b, clock_timestamp() + interval '60 s'
    FROM unnest(%b::text[]) AS i (inbox)
    RETURNING pg_notify(m.inbox, m.id || ' ' || encode(m.payload, 'base64'))
"""
_INSERT_BATCH = """
    WITH nonce AS MATERIALIZED (
        SELECT (random() * 9007199254740992)::bigint AS nonce
    ), written AS (
        INSERT INTO bare_message (inbox, nonce, payload, expires_at)
        SELECT i.inbox, n.nonce, p.payload, clock_timestamp() + interval '60 s'
        FROM nonce AS n, unnest(%b::bytea[]) WITH ORDINALITY AS p (payload, position),
            unnest(%b::text[]) AS i (inbox)
        ORDER BY p.position
        RETURNING inbox, id
    )
    SELECT pg_notify(inbox, min(id) || ' ' || max(id)) FROM written GROUP BY inbox
"""
_READ = "SELECT payload FROM bare_message WHERE inbox = %b AND id BETWEEN %b AND %b ORDER BY id"
_DELETE = "DELETE FROM bare_message WHERE inbox = %b AND id > %b AND id <= %b"
_TAKE = f"""
    DELETE FROM bare_message WHERE inbox = %b AND id = ANY (ARRAY(
        SELECT id FROM bare_message WHERE inbox = %b ORDER BY id LIMIT {_TAKE_AT_MOST}
        FOR UPDATE SKIP LOCKED))
    RETURNING id, payload
"""
_JOIN = """
    INSERT INTO bare_membership (group_name, inbox, channel, expires_at)
    SELECT m.group_name, 'bare_0', m.channel, 'infinity'
    FROM unnest(%b::text[], %b::text[]) AS m (group_name, channel)
    ON CONFLICT (group_name, inbox, channel) DO UPDATE SET expires_at = excluded.expires_at
"""
_LEAVE = """
    DELETE FROM bare_membership WHERE (group_name, inbox, channel) IN (
        SELECT m.group_name, 'bare_0', m.channel
        FROM unnest(%b::text[], %b::text[]) AS m (group_name, channel))
"""


async def _connect(stage: Stage, *, durable: bool = False) -> Rows:
    """A connection in autocommit. Commits wait for the disk only if ``durable``."""
    connection = await psycopg.AsyncConnection.connect(
        stage.spec.address, autocommit=True, prepare_threshold=0
    )
    if not durable:
        await connection.execute("SET synchronous_commit = off")
    return connection


def _inboxes(stage: Stage) -> list[str]:
    """Return the inboxes of the receiving processes, which also name their NOTIFY channels."""
    return [f"bare_{process}" for process in range(stage.sizes.processes)]


# ------------------------------------------------------------------ sending


async def _send_paced(stage: Stage) -> Sent:
    async with await _connect(stage) as connection:
        inboxes = _inboxes(stage)

        async def send(number: int, sent_ns: int) -> None:
            await connection.execute(_INSERT_ONE, (_pack(message(0, number, sent_ns)), inboxes))

        await warm_up(stage.board, [1] * stage.sizes.processes, partial(send, -1, 0))
        stage.board.start()
        return Sent([await pace(stage.sizes.seconds, stage.sizes.rate, send)])


async def _send_in_a_row(stage: Stage) -> Sent:
    """Send one message at a time, inside its notification. There is nothing to batch."""
    async with await _connect(stage) as connection:
        inboxes = _inboxes(stage)

        async def send(number: int, sent_ns: int) -> None:
            await connection.execute(_INSERT_ONE, (_pack(message(0, number, sent_ns)), inboxes))

        await warm_up(stage.board, [1] * stage.sizes.processes, partial(send, -1, 0))
        end = stage.board.start() + int(stage.sizes.seconds * 1e9)
        number = 0
        while (now := time.monotonic_ns()) < end:
            await send(number, now)
            number += 1
        return Sent([number])


async def _send_batches(stage: Stage, inboxes: Sequence[str], arrived: Callable[[], int]) -> Sent:
    """Send one message of each task in a statement, the largest batch of a layer's tasks."""
    board, sizes = stage.board, stage.sizes
    async with (
        await _connect(stage) as connection,
        Window(sizes.window or sys.maxsize, arrived) as window,
    ):

        async def send(number: int) -> None:
            now = time.monotonic_ns()
            batch = [_pack(message(task, number, now)) for task in range(sizes.tasks)]
            await connection.execute(_INSERT_BATCH, (batch, list(inboxes)))

        await warm_up(board, [1] * sizes.processes, partial(send, -1))
        end = board.start() + int(sizes.seconds * 1e9)
        number = 0
        while True:
            for _ in range(sizes.tasks):
                await window.take()
            if time.monotonic_ns() >= end:
                break
            await send(number)
            number += 1
        return Sent(
            [number] * sizes.tasks,
            notes={"written off": window.written_off} if sizes.window else {},
        )


async def _send_to_channels(stage: Stage) -> Sent:
    return await _send_batches(stage, _inboxes(stage), lambda: stage.board.deliveries)


async def _send_to_members(stage: Stage) -> Sent:
    board, sizes = stage.board, stage.sizes

    def arrived() -> int:
        return min(board.delivered(process) for process in range(sizes.processes)) // sizes.members

    return await _send_batches(stage, _inboxes(stage), arrived)


async def _send_jobs(stage: Stage) -> Sent:
    return await _send_batches(stage, [_JOBS], lambda: stage.board.deliveries)


@contextmanager
def sending_in_a_row(stage: Stage) -> Iterator[Callable[[str, dict[str, Any]], None]]:
    """Return a function for a plain thread that inserts a message and notifies."""
    with psycopg.connect(stage.spec.address, autocommit=True, prepare_threshold=0) as connection:
        connection.execute("SET synchronous_commit = off")
        inboxes = _inboxes(stage)

        def send(group: str, body: dict[str, Any]) -> None:
            connection.execute(_INSERT_ONE, (_pack(body), inboxes))

        yield send


# ------------------------------------------------------------------ receiving


class Record:
    """A count of received messages, for all members or for the member of their sender."""

    def __init__(
        self, stage: Stage, *, for_all: bool, ages: bool = False, log: bool = False
    ) -> None:
        members = stage.sizes.members
        everybody: dict[int, Stream] = {}
        # For a message to all members, one stream represents the equal streams of the members.
        self.receipt = Receipt([everybody] * members if for_all else [{} for _ in range(members)])
        self._stage = stage
        self._for_all = for_all
        self._deliveries = members if for_all else 1
        self._ages = ages
        self._log = log
        self._warm = False

    def warm(self) -> None:
        """Note that a notification arrived."""
        if not self._warm:
            self._warm = True
            self._stage.board.warm(self._stage.index)

    def take(self, body: Mapping[str, Any]) -> None:
        sender, number = body["s"], body["n"]
        if number < 0:
            self.warm()
            return
        now = time.monotonic_ns()
        streams = self.receipt.streams[0 if self._for_all else sender]
        if sender not in streams:
            streams[sender] = Stream()
        first = streams[sender].see(number)
        if self._log:
            self.receipt.log.append((sender, number))
        if first:
            if self._ages:
                self.receipt.ages.append(now - body["t"])
            self._stage.board.deliver(self._stage.index, now, self._deliveries)


class _Deleter:
    """Delete received messages, in each statement all that arrived during the previous one."""

    def __init__(self, connection: Rows, inbox: str) -> None:
        self._connection = connection
        self._inbox = inbox
        self._taken = 0
        self._more = asyncio.Event()

    def taken(self, last: int) -> None:
        """Note that everything up to this id has been received."""
        self._taken = last
        self._more.set()

    async def run(self) -> None:
        done = 0
        while True:
            await self._more.wait()
            self._more.clear()
            last = self._taken
            await self._connection.execute(_DELETE, (self._inbox, Int8(done), Int8(last)))
            done = last


async def _receive_carried(stage: Stage, *, ages: bool = False) -> None:
    """Read the messages from the notifications that contain them."""
    inbox = _inboxes(stage)[stage.index]
    record = Record(stage, for_all=True, ages=ages)
    async with await _connect(stage) as ears, await _connect(stage) as hands:
        deleter = _Deleter(hands, inbox)

        async def listen() -> None:
            async for notification in ears.notifies():
                number, payload = notification.payload.split(" ", 1)
                record.take(_unpack(binascii.a2b_base64(payload)))
                deleter.taken(int(number))

        await ears.execute(f"LISTEN {inbox}")
        tasks = [asyncio.ensure_future(listen()), asyncio.ensure_future(deleter.run())]
        await report_at_end(stage, record.receipt, tasks)


async def _receive_ranges(stage: Stage, *, for_all: bool) -> None:
    """Read the rows that the notifications name, in order."""
    inbox = _inboxes(stage)[stage.index]
    record = Record(stage, for_all=for_all)
    heard: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
    async with (
        await _connect(stage) as ears,
        await _connect(stage) as eyes,
        await _connect(stage) as hands,
    ):
        deleter = _Deleter(hands, inbox)

        async def listen() -> None:
            async for notification in ears.notifies():
                first, last = map(int, notification.payload.split())
                heard.put_nowait((first, last))

        async def read() -> None:
            while True:
                first, last = await heard.get()
                for _ in range(min(heard.qsize(), _RANGES_AT_MOST - 1)):
                    last = heard.get_nowait()[1]
                found = await eyes.execute(_READ, (inbox, Int8(first), Int8(last)), binary=True)
                for (payload,) in await found.fetchall():
                    record.take(_unpack(payload))
                deleter.taken(last)

        await ears.execute(f"LISTEN {inbox}")
        tasks = [asyncio.ensure_future(work()) for work in (listen, read, deleter.run)]
        await report_at_end(stage, record.receipt, tasks)


async def _receive_jobs(stage: Stage) -> None:
    """Take jobs in competition. The commit waits for the disk, so that jobs stay taken."""
    record = Record(stage, for_all=True, log=True)
    more = asyncio.Event()
    async with await _connect(stage) as ears, await _connect(stage, durable=True) as hands:

        async def listen() -> None:
            async for _ in ears.notifies():
                record.warm()
                more.set()

        async def take() -> None:
            while True:
                await more.wait()
                more.clear()
                while jobs := await (
                    await hands.execute(_TAKE, (_JOBS, _JOBS), binary=True)
                ).fetchall():
                    for _, payload in sorted(jobs):
                        record.take(_unpack(payload))

        await ears.execute(f"LISTEN {_JOBS}")
        await report_at_end(
            stage, record.receipt, [asyncio.ensure_future(work()) for work in (listen, take)]
        )


# ------------------------------------------------------------------ membership


async def _churn(stage: Stage) -> Sent:
    """Join with one statement and leave with another; check the final members."""
    tasks = stage.sizes.tasks
    groups = [f"bench.room.{task}" for task in range(tasks)]
    channels = [f"bare!{task}" for task in range(tasks)]
    async with await _connect(stage) as connection:
        operations = 0
        start = stage.board.start()
        end = start + int(stage.sizes.seconds * 1e9)
        while time.monotonic_ns() < end:
            await connection.execute(_JOIN, (groups, channels))
            await connection.execute(_LEAVE, (groups, channels))
            operations += 2 * tasks
        speed = rate(operations, start, time.monotonic_ns())
        await connection.execute(_JOIN, (groups[::2], channels[::2]))
        found = await connection.execute("SELECT group_name, channel FROM bare_membership")
        members, wanted = (
            set(await found.fetchall()),
            set(zip(groups[::2], channels[::2], strict=True)),
        )
        return Sent(
            figures={"ops/s": speed},
            tally=Tally(lost=len(wanted - members), stray=len(members - wanted)),
        )


receive_carried = partial(_receive_carried, ages=False)
LATENCY = Roles(_send_paced, partial(_receive_carried, ages=True))
THROUGHPUT = Roles(_send_to_channels, partial(_receive_ranges, for_all=False))
SERIAL = Roles(_send_in_a_row, receive_carried)
FAN_OUT = Roles(_send_to_members, partial(_receive_ranges, for_all=True))
WORKERS = Roles(_send_jobs, _receive_jobs)
CHURN = Roles(_churn, None)
