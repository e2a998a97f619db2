"""The path from notifications to the announcement queue: hear, read and catch up.

Bound to the owner loop. This module does the I/O. `pg_layer._state.cursor` decides what is
new, and `pg_layer._state.announcement_queue` in which order it is dispatched.
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
from pg_layer._db.fence import raise_fence
from pg_layer._db.pool import Connections
from pg_layer._db.queries import receive as queries
from pg_layer._db.session import Session
from pg_layer._groups.writer import MembershipWriter
from pg_layer._messages.addresses import channel_address, group_address, notification_channel
from pg_layer._messages.announcements import Jobs, Messages, Ping, parse
from pg_layer._messages.rows import KeyAt, Row
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
READ_SPANS = 64  # in a statement
RETRY = 0.5  # seconds
PING_TIMEOUT = 3.0  # seconds
CATCH_UP_ROWS = 20_000  # in the announcement queue; beyond them a catch-up waits for dispatch


class Receiver:
    """The receiving side of a client.

    Messages arrive in three ways: announcements (`hear`), rows that an announcement names
    (`_read`), and catch-ups (`_catch_up`). A catch-up reads all new rows at the client's addresses
    in one snapshot. All of them put rows into the announcement queue, and the queue asks the cursor
    for each row. So the ways may overlap. A statement may be repeated after a lost answer, and a
    catch-up may begin at any time, as often as rows may have been missed. Rows that arrive twice
    are not new the second time (see `Cursor`).

    No statement removes a message before `receive()` has taken it. A claim of `JobReaders` moves
    rows, and its answer may be lost. Then `raise_fence` makes the server refuse the claim from then
    on, and a catch-up reads the rows that it has moved.

    ``listener``: None if the tables are polled.
    ``on_caught_up``: called after each catch-up with the number of messages that it has read.
    """

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
        self._ping_count = 0
        self._connection_is_lost = asyncio.Event()  # the present connection of the listener
        self._is_reading = False
        self._is_catching_up = False
        self._is_catch_up_due = False
        self._may_forget_memberships = False  # `S` has moved since the last time
        self._catch_up_may_resume = asyncio.Event()  # after a pause for dispatch
        # Not set while a catch-up is due or about to append rows. A `join` waits, because the
        # catch-up may bring rows that were sent before those that the `join` reads.
        self._joins_may_read = asyncio.Event()
        # The snapshot of a catch-up that waits for dispatch. A `join` that removes it makes the
        # catch-up begin again.
        self._paused_catch_up: Moment | None = None
        self._channels_of_jobs: dict[str, str] = {}  # NOTIFY channel -> normal channel
        self._expected: Counter[str] = Counter()  # see `expecting`
        self._joining: str | None = None  # the group whose first member is being added
        self.deletions = Deletions(client, connections, spawn)
        self.dispatcher = Dispatcher(client, self, writer, spawn)
        self.jobs = JobReaders(client, connections, self, spawn)
        client.announcements.restart()

    def start(self) -> None:
        """Begin with the state that the last owner loop has left."""
        self.dispatcher.start()
        # The last owner loop may not have seen the answer of a claim. Those jobs precede the jobs
        # that are claimed now: claims wait for the catch-up.
        self._is_catch_up_due = True
        self.jobs.start()
        self._read_soon()
        self.dispatch_soon()

    # ------------------------------------------------------------------ hearing

    async def listen_to_all(self) -> None:
        """Listen to all addresses of the client. A catch-up must follow."""
        self._connection_is_lost = asyncio.Event()
        self._client.announcements.mark_incomplete()
        self._delay_joins()
        prefix = self._client.config.prefix
        while True:
            wanted = {self._own_channel, *self._expected, *self._channels_of_jobs}
            wanted.update(
                notification_channel(group_address(prefix, group))
                for group in self._client.memberships.groups
            )
            if not await self.listen(wanted):  # returns at once if nothing was added
                return
            if all(map(self._is_listening_to, wanted)):
                return

    def _is_listening_to(self, channel: str) -> bool:
        return self._listener is not None and self._listener.is_listening_to(channel)

    async def listen(self, channels: Iterable[str]) -> bool:
        """Listen to NOTIFY channels. Return False if there is no connection."""
        return self._listener is not None and await self._listener.listen(list(channels))

    @contextmanager
    def expecting(self, channels: Iterable[str]) -> Iterator[None]:
        """Make a new connection also listen to these channels, until the block ends.

        A statement is in flight that makes the client a member of their groups.
        """
        channels = list(channels)
        self._expected.update(channels)
        try:
            yield
        finally:
            self._expected.subtract(channels)
            self._expected = +self._expected

    async def listen_to_jobs(self, channel: str) -> bool:
        """Listen for jobs of a normal channel. Return False if there is no connection."""
        name = notification_channel(channel_address(self._client.config.prefix, channel))
        self._channels_of_jobs[name] = channel
        return await self.listen((name,))

    async def unlisten_to_jobs(self, channel: str) -> None:
        """Stop listening for jobs of a normal channel."""
        name = notification_channel(channel_address(self._client.config.prefix, channel))
        self._channels_of_jobs.pop(name, None)
        if self._listener is not None:
            await self._listener.unlisten((name,))

    def hear(self, channel: str, payload: str) -> None:
        """Handle a notification."""
        assert self._client.is_owned_here()
        self.heard_at = self._loop.time()
        client = self._client
        try:
            announcement = parse(payload, client.config.prefix, client.address)
        except ValueError:
            client.log_foreign_notification(channel)
            return
        if isinstance(announcement, Ping):
            self._hear_ping(announcement)
        elif isinstance(announcement, Jobs):
            name = self._channels_of_jobs.get(channel)
            if name is not None:
                self.jobs.announced(name, announcement.first)
        else:
            if isinstance(announcement, Messages):
                client.counters.add("inline_messages", len(announcement.rows))
            client.announcements.hear(announcement)
            self.dispatch()
            self._read_soon()

    async def ping(self, send: Callable[[str], Coroutine[Any, Any, None]], timeout: float) -> bool:
        """Send a ping, and return whether it was heard within ``timeout`` seconds.

        ``send``: a coroutine function that notifies the own channel with the given token.
        """
        self._ping_count += 1
        token = f"{self._client.id[:4]}{id(self):x}.{self._ping_count}"
        heard = self._pings[token] = self._loop.create_future()
        deadline = self._loop.time() + timeout
        try:
            await send(token)
            await asyncio.wait((heard,), timeout=max(deadline - self._loop.time(), 0.0))
            return heard.done()
        finally:
            del self._pings[token]

    def _hear_ping(self, ping: Ping) -> None:
        if self._client.cursor.confirm(ping.token):
            self._cursor_advanced()
        heard = self._pings.get(ping.name)
        if heard is not None and not heard.done():
            heard.set_result(None)

    def _cursor_advanced(self) -> None:
        """Note that ``S`` has moved: memberships may forget moments that it has passed."""
        self._may_forget_memberships = True
        self._forget_past_memberships()

    def _forget_past_memberships(self) -> None:
        # Rows that `S` sees may still be in the queue, and dispatch compares them with the moments.
        if self._may_forget_memberships and not len(self._client.announcements):
            self._may_forget_memberships = False
            self._client.memberships.forget_past(self._client.cursor.is_past)

    def connection_lost(self) -> None:
        """Note that the connection is lost, with all notifications that it did not deliver."""
        self._client.announcements.mark_incomplete()
        self._delay_joins()
        self._connection_is_lost.set()

    def append_claimed(self, rows: Sequence[Row]) -> None:
        """Append claimed jobs behind the earlier announcements, and dispatch.

        A catch-up may have read the rows before: then they are not new here.
        """
        self._client.announcements.append(rows)
        self.dispatch()

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
                    statement_timeout=self._client.config.send_timeout,
                    is_idempotent=True,
                )
            except PgLayerError as error:
                self._outage.begin(error)
                await asyncio.sleep(RETRY)
                continue
            self._client.counters.add("reads")
            for entry, result in zip(entries, results, strict=False):
                announcements.fill(entry, result.rows, is_all=result.is_all)
            self.dispatch()
        self._is_reading = False

    # ------------------------------------------------------------------ catching up

    @property
    def is_catch_up_pending(self) -> bool:
        """Whether a catch-up is due or running: rows may be missing until it has ended."""
        return self._is_catching_up or self._is_catch_up_due

    @property
    def _needs_catch_up(self) -> bool:
        """Whether a catch-up must bring missed rows, marked rows as well."""
        return self.is_catch_up_pending or self._client.announcements.is_incomplete

    def catch_up_soon(self) -> None:
        """Request a catch-up of all new rows at the own addresses, even if one is running."""
        self._is_catch_up_due = True
        if not self._is_catching_up:
            self._is_catching_up = True
            self._spawn("Catching up", self._catch_up)

    async def _catch_up(self) -> None:
        announcements = self._client.announcements
        while self._is_catch_up_due:
            self._is_catch_up_due = False
            announcements.begin_catch_up()
            self._joins_may_read.clear()
            counted: list[int] = []
            try:
                is_done = await self._connections.run(
                    partial(self._read_new, counted=counted),
                    timeout=READ_TIMEOUT,
                    statement_timeout=self._client.config.send_timeout,
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
                self._joins_may_read.set()
            self.dispatch()
            self._read_soon()
            self._on_caught_up(sum(counted))
        self._is_catching_up = False
        self._spawn("Dispatch", self._resume)

    async def _resume(self) -> None:
        # `dispatch` requests a catch-up if announcements were left out because there were too many.
        self.dispatch()
        self.jobs.claim_from_all()

    async def _read_new(self, session: Session, counted: list[int]) -> bool:
        """Append all rows that are new at the own addresses, in the order of ids.

        Return False if the catch-up must begin again: the addresses have changed while it
        waited for dispatch. ``counted``: gets the number of messages of each part.
        """
        client, cursor = self._client, self._client.cursor
        assert client.is_owned_here()
        await raise_fence(session, client)
        boot, position = await queries.position(session, cursor.known_boot)
        moment = await queries.begin_snapshot(session, boot)
        # Collect the addresses after the snapshot was taken. The client listens already. So a
        # message that is sent after a group_add has returned is heard, if it is not visible in
        # the snapshot; otherwise it is at one of these addresses.
        cursor.note_position(moment, position)
        low_id = min(cursor.low_id(), cursor.marked_low_id())
        own_low_id = min(low_id, self.jobs.low_id - 1)
        prefix = client.config.prefix
        groups = self._groups()
        addresses = [client.address, *(group_address(prefix, group) for group in groups)]
        low_ids = [own_low_id, *(max(low_id, self._low_id_of_group(group)) for group in groups)]
        keys = await queries.new_keys(session, addresses, low_ids, cursor.moment)
        for part in queries.parts(client.announcements.keys_to_read(keys)):
            # If the pool has one connection, waiting here would keep other rows from being read.
            is_full = client.announcements.rows > CATCH_UP_ROWS and client.config.pool_max_size > 1
            if is_full and not await self._wait_for_dispatch(moment):
                await queries.commit(session)
                return False
            rows = await queries.read_keys(session, part)
            client.announcements.append(rows, self._joining, client.memberships.newly_joined)
            counted.append(sum(row.kind == "message" for row in rows))
            self.dispatch()
        await queries.commit(session)
        before = cursor.moment
        cursor.advance_to(moment)
        if not self._is_catch_up_due:  # otherwise the answer of a claim was lost meanwhile
            self.jobs.caught_up()
        self._cursor_advanced()
        if before is not None and before.boot != moment.boot:
            # A crash may have undone deletions. Senders would count those rows until they expire.
            self._spawn(
                "The deletion of received messages after a restart",
                partial(self._delete_received, moment),
            )
        return True

    async def _wait_for_dispatch(self, moment: Moment) -> bool:
        """Pause a catch-up until dispatch has caught up.

        Return False if a `join` requires that the catch-up begins again.
        """
        self._paused_catch_up = moment
        self._catch_up_may_resume.clear()
        self._joins_may_read.set()  # dispatch may wait for a `join`: avoid a deadlock
        try:
            await self._catch_up_may_resume.wait()
            return self._paused_catch_up is not None
        finally:
            self._paused_catch_up = None
            self._joins_may_read.clear()

    def _delay_joins(self) -> None:
        """Make each `join` wait until the next catch-up has ended.

        Not while a catch-up is paused: dispatch may wait for the `join`, and the catch-up for
        dispatch.
        """
        if self._paused_catch_up is None:
            self._joins_may_read.clear()

    def _low_id_of_group(self, group: str) -> int:
        """Return an id: every message that a member may receive has a larger one."""
        cursor = self._client.cursor
        members = self._client.memberships.members(group)
        return min((cursor.low_id_of(member.since) for member in members), default=0)

    def _groups(self) -> set[str]:
        """Return the groups whose messages this client receives."""
        groups = set(self._client.memberships.groups)
        if self._joining is not None:
            groups.add(self._joining)
        return groups

    async def _delete_received(self, moment: Moment) -> None:
        client = self._client
        # Rows that must still be read are not among `unreceived_keys`.
        while client.announcements.has_unread(moment):  # noqa: ASYNC110  # rarely, after a crash
            await asyncio.sleep(RETRY)
        try:
            await self._connections.run(
                lambda session: queries.delete_received(
                    session, client.address, moment, client.unreceived_keys()
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

    async def search_marked(self) -> None:
        """Append marked rows whose announcement should have arrived by now.

        A process that ended between the commit and the announcement never sends it.
        """
        client, cursor = self._client, self._client.cursor
        assert client.is_owned_here()
        overdue = cursor.overdue
        if overdue is None or self._needs_catch_up:
            return
        prefix = client.config.prefix

        async def find(session: Session) -> list[KeyAt]:
            addresses = [
                client.address,
                *(group_address(prefix, group) for group in self._groups()),
            ]
            return await queries.marked_keys(session, addresses, cursor.marked_low_id(), overdue)

        async def read(session: Session) -> bool:
            for part in queries.parts(client.announcements.keys_to_read(keys)):
                rows = await queries.read_keys(session, part)
                if self._needs_catch_up:
                    return False
                client.announcements.append_unannounced(
                    rows, self._joining, client.memberships.newly_joined
                )
                self.dispatch()
            return not self._needs_catch_up

        timeout = client.config.heartbeat
        keys = await self._connections.run(find, timeout=timeout, is_idempotent=True)
        # The announcements may be on their way: a process that was stopped has not heard them yet.
        # Without the ping it would receive the rows in another order than others.
        may_be_heard = self._listener is not None and client.announcements.keys_to_read(keys)
        if may_be_heard and not await self._hear_earlier_announcements():
            return
        if await self._connections.run(read, timeout=timeout, is_idempotent=True):
            cursor.marked_searched(overdue)

    # ------------------------------------------------------------------ dispatching

    def dispatch(self) -> None:
        """Dispatch ready entries, then continue catch-ups and memberships that waited for it."""
        assert self._client.is_owned_here()
        announcements = self._client.announcements
        self.dispatcher.dispatch()
        self._forget_past_memberships()
        if announcements.rows <= CATCH_UP_ROWS:
            self._catch_up_may_resume.set()
        if announcements.is_over_limit and not announcements.rows and not self._is_catching_up:
            self.catch_up_soon()

    def dispatch_soon(self) -> None:
        """Call `dispatch` in a task of its own.

        If it raises, the task is repeated, and not the work that led to it.
        """

        async def run() -> None:
            self.dispatch()

        self._spawn("Dispatch", run)

    # ------------------------------------------------------------------ the first member of a group

    async def join(
        self, row: Row, group: str, channel: str, expires_at: float, since: Moment, request: int
    ) -> None:
        """Apply a control message that adds the first member of a group in this process.

        ``row``: the control message, at the head of the queue. ``since``: where the
        membership begins. ``request``: the id of the membership request in the table.

        The caller of ``group_add`` may have got its answer long ago, and this process does
        not listen to the group yet. So listen first, then read the group's rows that are not
        visible in ``since``, and insert them in their places. Dispatch waits until that is
        done. An own change may have added the first member before, or may do so meanwhile.
        """
        client = self._client
        address = group_address(client.config.prefix, group)
        bucket = notification_channel(address)
        low_id = client.cursor.low_id_of(since)
        self._joining = group
        with self.expecting((bucket,)):
            # A catch-up that has begun may not have collected this group.
            await self._joins_may_read.wait()
            missed = await self._read_missed(address, bucket, low_id, since)
            # Earlier messages of the writers of these rows may not have been heard yet.
            is_paused = self._paused_catch_up is not None
            if missed and not is_paused and not await self._hear_earlier_announcements():
                self._delay_joins()
                self.catch_up_soon()
                await self._joins_may_read.wait()
            await self.dispatcher.wait_for_own_change((group, channel))
        # From here on without await: the state must not change until the rows are inserted.
        rows = client.announcements.head()
        if rows is None or rows[0] is not row:
            self._joining = None
            return  # another owner loop has applied it
        rows.popleft()
        client.announcements.dispatched((row,))
        self._joining = None
        missed = self._leave_to_catch_up(missed)
        boot = client.cursor.boot_of(row)
        joined = client.memberships.joined_after(group, boot, row.xid)
        client.memberships.forget_join(group)
        if group in client.memberships.groups:
            missed = self._sent_before(missed, joined)
        if not client.memberships.resolve_against_own_change(group, channel, boot, row.xid, since):
            # Get the queue now: an idle one may have been dropped during the awaits.
            client.memberships.add(group, client.queue(channel), expires_at, since)
        self._writer.write_soon(group, channel, request)
        client.announcements.insert_missed(address, missed)

    def _leave_to_catch_up(self, missed: list[Row]) -> list[Row]:
        """Return the rows that a paused catch-up cannot bring in their places.

        If it can bring others, it begins again, with the new group among its addresses.
        """
        moment = self._paused_catch_up
        if moment is None:
            return missed
        due = self._client.announcements.due_before_catch_up(missed, moment)
        if len(due) < len(missed):
            self._paused_catch_up, self._is_catch_up_due = None, True
            self._catch_up_may_resume.set()
        return due

    def _sent_before(self, missed: list[Row], joined: Moment | None) -> list[Row]:
        """Return the rows that were sent before an own change joined the group.

        This process has heard the later ones, and may have dispatched them.
        """
        boot_of = self._client.cursor.boot_of
        return [row for row in missed if joined is not None and joined.sees(boot_of(row), row.xid)]

    async def _hear_earlier_announcements(self) -> bool:
        """Wait until all announcements sent until now are in the queue.

        Return False if that failed: then a catch-up must bring their rows. It is the second
        choice, because it puts marked rows before their announcement. Processes that have
        missed nothing receive these rows at the announcement.
        """
        if self._listener is None or not self._listener.is_connected:
            return False

        async def send(token: str) -> None:
            await self._connections.run(
                lambda session: queries.notify(session, self._own_channel, f"P {token}"),
                timeout=PING_TIMEOUT,
            )

        # Dispatch waits meanwhile. Do not wait for a ping that is lost with its connection.
        lost = asyncio.ensure_future(self._connection_is_lost.wait())
        ping = asyncio.ensure_future(self.ping(send, PING_TIMEOUT))
        try:
            await asyncio.wait((lost, ping), return_when=asyncio.FIRST_COMPLETED)
            is_heard = ping.done() and ping.exception() is None and ping.result()
            return is_heard and not self._needs_catch_up
        finally:
            lost.cancel()
            ping.cancel()

    async def _read_missed(
        self, address: str, bucket: str, low_id: int, since: Moment
    ) -> list[Row]:
        """Listen to a group, and return its rows that a moment does not see.

        At most about ``MAX_ROWS`` are returned, in the order of ids.
        """
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
