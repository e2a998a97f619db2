"""From notifications to the announcement queue: hears, reads and catches up, in one order.

Bound to the owner loop. What is new is decided by `pg_layer._state.cursor`, the order by
`pg_layer._state.announcement_queue`; this is the I/O around them.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from pg_layer._db.availability import Outage
from pg_layer._db.pool import Connections
from pg_layer._db.queries import receive as queries
from pg_layer._db.session import Session
from pg_layer._groups.writer import MembershipWriter
from pg_layer._messages.addresses import channel_address, group_address, notification_channel
from pg_layer._messages.announcements import Jobs, Messages, Ping, parse
from pg_layer._messages.rows import LAST_ID, Row
from pg_layer._process.tasks import Spawn
from pg_layer._receive.deletions import Deletions
from pg_layer._receive.dispatcher import Dispatcher
from pg_layer._receive.jobs import JobReaders
from pg_layer._receive.listener import Listener
from pg_layer._state import log_events
from pg_layer._state.announcement_queue import MAX_ROWS
from pg_layer._state.client import Client
from pg_layer._state.snapshot import Moment
from pg_layer.exceptions import PgLayerError

logger = logging.getLogger("pg_layer")

READ_TIMEOUT = 60.0  # seconds; a catch-up may be long
READ_SPANS = 64  # at once
RETRY = 0.5  # seconds
PING_TIMEOUT = 3.0  # seconds
CATCH_UP_ROWS = 20_000  # in the announcement queue, beyond which a catch-up waits for dispatch


class Receiver:
    """The receiving side of a client."""

    def __init__(
        self,
        client: Client,
        connections: Connections,
        listener: Listener | None,
        writer: MembershipWriter,
        outage: Outage,
        spawn: Spawn,
        on_caught_up: Callable[[int], None],
    ) -> None:
        # listener: None where the tables are polled. on_caught_up: called with the number of messages.
        self._client = client
        self._connections = connections
        self._listener = listener
        self._writer = writer
        self._outage = outage
        self._spawn = spawn
        self._on_caught_up = on_caught_up
        self._loop = asyncio.get_running_loop()
        self.heard_at: float | None = None  # the last notification, by the loop's time
        self._own_channel = notification_channel(client.address)
        self._pings: dict[str, asyncio.Future[None]] = {}
        self._pinged = 0
        self._lost = asyncio.Event()  # the present connection
        self._is_reading = False
        self._is_catching_up = False
        self._is_catch_up_due = False
        self._is_passed = False  # memberships may have something to forget
        self._drained = asyncio.Event()
        # Not set while a catch-up is about to append rows that were sent before some that a read brings.
        self._appended = asyncio.Event()
        # The snapshot of a catch-up that waits for dispatch. A `join` that removes it has it begin again.
        self._waiting: Moment | None = None
        self._channels_of_jobs: dict[str, str] = {}  # NOTIFY channel -> normal channel
        self._expected: Counter[str] = Counter()  # buckets of groups that are being joined
        self._joining: str | None = None  # the group whose first member is being added
        self.deletions = Deletions(client, connections, spawn)
        self.dispatcher = Dispatcher(client, self, writer, spawn)
        self.jobs = JobReaders(client, connections, self, spawn)
        client.announcements.restart()

    def start(self) -> None:
        """Go on with what the last owner loop has left."""
        self.dispatcher.start()
        # Jobs that the last owner loop claimed without an answer come before those that are claimed now.
        self._is_catch_up_due = True
        self.jobs.start()
        self._read_soon()
        self.pump_soon()

    # ------------------------------------------------------------------ hearing

    async def listen_to_all(self) -> None:
        """Have a new connection listen to all that is of interest here. A catch-up must follow."""
        self._lost = asyncio.Event()
        self._client.announcements.lose()
        self._expect_catch_up()
        prefix = self._client.config.prefix
        while True:
            wanted = {self._own_channel, *self._expected, *self._channels_of_jobs}
            wanted.update(
                notification_channel(group_address(prefix, group))
                for group in self._client.memberships.groups
            )
            if not await self.listen(wanted):  # True at once if nothing was added meanwhile
                return
            if all(map(self._is_listening_to, wanted)):
                return

    def _is_listening_to(self, channel: str) -> bool:
        return self._listener is not None and self._listener.is_listening_to(channel)

    async def listen(self, channels: Iterable[str]) -> bool:
        """LISTEN to NOTIFY channels, if there is a connection. Return whether there is one."""
        return self._listener is not None and await self._listener.listen(list(channels))

    @contextmanager
    def expecting(self, channels: Iterable[str]) -> Iterator[None]:
        """A new connection listens to these channels, too."""
        channels = list(channels)
        self._expected.update(channels)
        try:
            yield
        finally:
            self._expected.subtract(channels)
            self._expected = +self._expected

    async def listen_to_jobs(self, channel: str) -> bool:
        """Listen for jobs of a normal channel. Return whether there is a connection."""
        name = notification_channel(channel_address(self._client.config.prefix, channel))
        self._channels_of_jobs[name] = channel
        return await self.listen((name,))

    async def unlisten_to_jobs(self, channel: str) -> None:
        """Undo `listen_to_jobs`."""
        name = notification_channel(channel_address(self._client.config.prefix, channel))
        self._channels_of_jobs.pop(name, None)
        if self._listener is not None:
            await self._listener.unlisten((name,))

    def hear(self, channel: str, payload: str) -> None:
        """A notification came."""
        assert self._client.is_owned_here()
        self.heard_at = self._loop.time()
        client = self._client
        try:
            announcement = parse(payload, client.config.prefix, client.address)
        except ValueError:
            client.foreign(channel)
            return
        if isinstance(announcement, Ping):
            self._hear_ping(announcement)
        elif isinstance(announcement, Jobs):
            name = self._channels_of_jobs.get(channel)
            if name is not None:
                self.jobs.heard(name, announcement.first)
        else:
            if isinstance(announcement, Messages):
                client.counters.add("inline_messages", len(announcement.rows))
            client.announcements.hear(announcement)
            self.pump()
            self._read_soon()

    async def ping(self, send: Callable[[str], Coroutine[Any, Any, None]], timeout: float) -> bool:
        """Ring the own NOTIFY channel. Return whether it was heard within ``timeout`` seconds."""
        self._pinged += 1
        token = f"{self._client.id[:4]}{id(self):x}.{self._pinged}"
        heard = self._pings[token] = self._loop.create_future()
        deadline = self._loop.time() + timeout
        try:
            await send(token)
            await asyncio.wait((heard,), timeout=max(deadline - self._loop.time(), 0.0))
            return heard.done()
        finally:
            del self._pings[token]

    def _hear_ping(self, ping: Ping) -> None:
        if self._client.cursor.heard(ping.token):
            self._passed()
        heard = self._pings.get(ping.name)
        if heard is not None and not heard.done():
            heard.set_result(None)

    def _passed(self) -> None:
        """``S`` has moved. Memberships forget nothing while what it sees may still be in the queue."""
        self._is_passed = True
        self._forget_passed()

    def _forget_passed(self) -> None:
        if self._is_passed and not len(self._client.announcements):
            self._is_passed = False
            self._client.memberships.grow_old(self._client.cursor.is_past)

    def connection_lost(self) -> None:
        """No notification of the old connection will be heard any more."""
        self._client.announcements.lose()
        self._expect_catch_up()
        self._lost.set()

    def append_claimed(self, rows: Sequence[Row]) -> None:
        """Dispatch jobs that were claimed, behind what was announced before.

        A catch-up may have met them first: each claim gives a row another key.
        """
        self._client.announcements.append(rows)
        self.pump()

    # ------------------------------------------------------------------ reading what was announced

    def _read_soon(self) -> None:
        if not self._is_reading and self._client.announcements.to_read(1):
            self._is_reading = True
            self._spawn("Reading messages", self._read)

    async def _read(self) -> None:
        announcements = self._client.announcements
        while entries := announcements.to_read(READ_SPANS):
            spans = [entry.span for entry in entries if entry.span is not None]
            try:
                results = await self._connections.run(
                    partial(queries.read, spans=spans),
                    timeout=READ_TIMEOUT,
                    patience=self._client.config.send_timeout,
                    is_idempotent=True,
                )
            except PgLayerError as error:
                self._outage.begin(error)
                await asyncio.sleep(RETRY)
                continue
            self._client.counters.add("reads")
            for entry, result in zip(entries, results, strict=False):
                announcements.read(entry, result.rows, is_all=result.is_all)
            self.pump()
        self._is_reading = False

    # ------------------------------------------------------------------ catching up

    @property
    def is_in_doubt(self) -> bool:
        """Whether rows may be missing until a catch-up has ended."""
        return self._is_catching_up or self._is_catch_up_due

    @property
    def _is_behind(self) -> bool:
        """Whether a catch-up brings what was missed, marked rows as well, in the order of ids."""
        return self.is_in_doubt or self._client.announcements.is_incomplete

    def catch_up_soon(self) -> None:
        """Read all that is new at the own addresses, once more if that is under way."""
        self._is_catch_up_due = True
        if not self._is_catching_up:
            self._is_catching_up = True
            self._spawn("Catching up", self._catch_up)

    async def _catch_up(self) -> None:
        announcements = self._client.announcements
        while self._is_catch_up_due:
            self._is_catch_up_due = False
            announcements.begin_catch_up()
            self._appended.clear()
            counted: list[int] = []
            try:
                is_done = await self._connections.run(
                    partial(self._read_new, counted=counted),
                    timeout=READ_TIMEOUT,
                    patience=self._client.config.send_timeout,
                    is_idempotent=True,
                )
            except Exception as error:
                announcements.fail_catch_up()
                self._is_catch_up_due = True
                if not isinstance(error, PgLayerError):
                    raise
                self._outage.begin(error)
                await asyncio.sleep(RETRY)
                continue
            if not is_done:
                announcements.fail_catch_up()
                continue
            announcements.end_catch_up()
            if announcements.is_over_limit and (
                self.dispatcher.is_blocked or not announcements.rows
            ):
                self._is_catch_up_due = True
            if not (announcements.is_incomplete or self._is_catch_up_due):
                self._appended.set()
            self.pump()
            self._read_soon()
            self._on_caught_up(sum(counted))
        self._is_catching_up = False
        self._spawn("Dispatch", self._go_on)

    async def _go_on(self) -> None:
        self.pump()  # what was left out because too much was heard
        self.jobs.look_again()

    async def _read_new(self, session: Session, counted: list[int]) -> bool:
        """Append what is new. False: the addresses have changed while dispatch was waited for."""
        client, cursor = self._client, self._client.cursor
        assert client.is_owned_here()
        await self.raise_fence(session)
        boot, position = await queries.position(session, cursor.known_boot)
        moment = await queries.begin_snapshot(session, boot)
        # The addresses are collected when the snapshot has been taken: a message that is sent after a
        # group_add has returned is either not visible in it, or at one of these addresses.
        cursor.position(moment, position)
        low_id = min(cursor.low_id(), cursor.marked_low_id())
        own_low_id = min(low_id, self.jobs.low_id - 1)
        prefix = client.config.prefix
        groups = self._groups()
        addresses = [client.address, *(group_address(prefix, group) for group in groups)]
        low_ids = [own_low_id, *(max(low_id, self._low_id_of_group(group)) for group in groups)]
        keys = await queries.new_keys(session, addresses, low_ids, cursor.moment)
        for part in queries.parts(client.announcements.missing(keys)):
            # With a single connection nothing else could be read meanwhile.
            is_full = client.announcements.rows > CATCH_UP_ROWS and client.config.pool_max_size > 1
            if is_full and not await self._wait_for_dispatch(moment):
                await queries.commit(session)
                return False
            rows = await queries.read_keys(session, part)
            client.announcements.append(rows, self._joining, client.memberships.opened_groups)
            counted.append(sum(row.kind == "message" for row in rows))
            self.pump()
        await queries.commit(session)
        before = cursor.moment
        cursor.adopt(moment)
        if not self._is_catch_up_due:  # else a claim's answer was lost meanwhile
            self.jobs.unknown_low_id = LAST_ID
        self._passed()
        if before is not None and before.boot != moment.boot:
            # A crash may have undone deletions: senders would count those rows until they expire.
            self._spawn(
                "The deletion of received messages after a restart",
                partial(self._delete_received, moment),
            )
        return True

    async def _wait_for_dispatch(self, moment: Moment) -> bool:
        """Return whether the catch-up may go on. False: a `join` has it begin again."""
        self._waiting = moment
        self._drained.clear()
        self._appended.set()  # dispatch may wait for a `join`, and that must not wait for this
        try:
            await self._drained.wait()
            return self._waiting is not None
        finally:
            self._waiting = None
            self._appended.clear()

    def _expect_catch_up(self) -> None:
        if self._waiting is None:
            self._appended.clear()

    def _low_id_of_group(self, group: str) -> int:
        """No message of a group that its members may receive has this id or a smaller one."""
        cursor = self._client.cursor
        members = self._client.memberships.members(group)
        return min((cursor.low_id_of(member.since) for member in members), default=0)

    def _groups(self) -> set[str]:
        """The groups that this client is interested in."""
        groups = set(self._client.memberships.groups)
        if self._joining is not None:
            groups.add(self._joining)
        return groups

    async def raise_fence(self, session: Session) -> None:
        """Have the server refuse what was given up, before anything else is concluded."""
        client = self._client
        if client.raised_fence < (fence := client.fence):
            await queries.raise_fence(session, client.address, fence)
            client.raised_fence = fence

    async def _delete_received(self, moment: Moment) -> None:
        client = self._client
        # Rows that were announced before, and are not read yet, are not among those that are held.
        while client.announcements.awaits(moment):  # noqa: ASYNC110  # rarely, after a crash
            await asyncio.sleep(RETRY)
        try:
            await self._connections.run(
                lambda session: queries.delete_received(
                    session, client.address, moment, client.held_keys()
                ),
                timeout=client.config.send_timeout,
                is_idempotent=True,
            )
        except PgLayerError as error:
            logger.info(
                "Could not delete received messages after a restart: %s",
                error,
                extra={"event": log_events.RECEIVED_DELETE_FAILED},
            )

    async def look_for_marked(self) -> None:
        """Append marked rows whose announcement should have come by now."""
        client, cursor = self._client, self._client.cursor
        assert client.is_owned_here()
        look = cursor.look
        if look is None or self._is_behind:
            return
        prefix = client.config.prefix

        async def work(session: Session) -> bool:
            addresses = [
                client.address,
                *(group_address(prefix, group) for group in self._groups()),
            ]
            keys = await queries.marked_keys(session, addresses, cursor.marked_low_id(), look)
            for part in queries.parts(client.announcements.missing(keys)):
                rows = await queries.read_keys(session, part)
                if self._is_behind:
                    return False
                client.announcements.append_late(
                    rows, self._joining, client.memberships.opened_groups
                )
                self.pump()
            return not self._is_behind

        if await self._connections.run(work, timeout=client.config.heartbeat, is_idempotent=True):
            cursor.looked(look)

    # ------------------------------------------------------------------ dispatching

    def pump(self) -> None:
        """Dispatch what is ready, and do what waits for that."""
        assert self._client.is_owned_here()
        announcements = self._client.announcements
        self.dispatcher.dispatch()
        self._forget_passed()
        if announcements.rows <= CATCH_UP_ROWS:
            self._drained.set()
        if announcements.is_over_limit and not announcements.rows and not self._is_catching_up:
            self.catch_up_soon()

    def pump_soon(self) -> None:
        """`pump` in a task of its own: if it raises, it is repeated, and not the work that led to it."""

        async def pump() -> None:
            self.pump()

        self._spawn("Dispatch", pump)

    # ------------------------------------------------------------------ the first member of a group

    async def join(
        self, row: Row, group: str, channel: str, expires_at: float, since: Moment, claim: int
    ) -> None:
        """Add the first member of a group for another process: it may have missed messages already.

        The owner itself may have added it first, or do so meanwhile.
        """
        client = self._client
        address = group_address(client.config.prefix, group)
        bucket = notification_channel(address)
        low_id = client.cursor.low_id_of(since)
        self._joining = group
        with self.expecting((bucket,)):
            # A catch-up that has begun may not have collected this group.
            await self._appended.wait()
            missed = await self._read_missed(address, bucket, low_id, since)
            # What their writers sent before them may not have been heard yet.
            if missed and self._waiting is None and not await self._hear_what_was_sent():
                self._expect_catch_up()
                self.catch_up_soon()
                await self._appended.wait()
            await self.dispatcher.until_changed((group, channel))
        rows = client.announcements.head()
        if rows is None or rows[0] is not row:
            self._joining = None
            return  # another owner loop has applied it
        rows.popleft()
        client.announcements.dispatched((row,))
        self._joining = None
        cursor = client.cursor
        here = (
            missed if self._waiting is None else client.announcements.between(missed, self._waiting)
        )
        if len(here) < len(missed):
            missed, self._waiting, self._is_catch_up_due = here, None, True
            self._drained.set()  # it begins again with this group, and brings in order what comes behind
        boot = cursor.boot_of(row)
        opened = client.memberships.opened_after(group, boot, row.xid)
        client.memberships.forget_opened(group)
        if group in client.memberships.groups:
            # What came after that was heard, and may have been dispatched.
            missed = [
                each
                for each in missed
                if opened is not None and opened.sees(cursor.boot_of(each), each.xid)
            ]
        if not client.memberships.overrule(group, channel, boot, row.xid, since):
            # Now, and not before what was awaited: an idle queue may have been dropped meanwhile.
            client.memberships.add(group, client.queue(channel), expires_at, since)
        self._writer.write_soon(group, channel, claim)
        client.announcements.bring(address, missed)

    async def _hear_what_was_sent(self) -> bool:
        """Wait until all that was sent before is in the queue. False: a catch-up must bring it.

        A catch-up while nothing was lost would put marked rows before their announcement, unlike elsewhere.
        """
        if self._listener is None or not self._listener.is_connected:
            return False

        async def ring(token: str) -> None:
            await self._connections.run(
                lambda session: queries.notify(session, self._own_channel, f"P {token}"),
                timeout=PING_TIMEOUT,
            )

        # Dispatch waits meanwhile: not for a ping that is lost with its connection.
        lost = asyncio.ensure_future(self._lost.wait())
        ping = asyncio.ensure_future(self.ping(ring, PING_TIMEOUT))
        try:
            await asyncio.wait((lost, ping), return_when=asyncio.FIRST_COMPLETED)
            is_heard = ping.done() and ping.exception() is None and ping.result()
            return is_heard and not self._is_behind
        finally:
            lost.cancel()
            ping.cancel()

    async def _read_missed(
        self, address: str, bucket: str, low_id: int, since: Moment
    ) -> list[Row]:
        """Read a group's rows that were not visible at a moment, from the first on."""
        rows: list[Row] = []

        async def read(session: Session) -> list[Row]:
            last_id = rows[-1].id if rows else low_id
            boot = self._client.cursor.latest_boot
            return await queries.new_in_group(
                session, address, last_id, since, boot, queries.READ_ROWS
            )

        while True:
            try:
                await self.listen((bucket,))
                part = await self._connections.run(
                    read, timeout=self._client.config.send_timeout, is_idempotent=True
                )
            except PgLayerError as error:
                self._outage.begin(error)
                await asyncio.sleep(RETRY)
                continue
            rows += part
            if len(part) < queries.READ_ROWS or len(rows) >= MAX_ROWS:
                return rows
