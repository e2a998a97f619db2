"""A world in which several clients, writers and transactions run step by step in one thread.

The clients are the layer's own: `Owner` with all its parts. Three things around it are
replaced, so that the test chooses each step, and the same steps have the same effects:

- The event loop has a clock of its own.
- A statement is executed on a real connection when the test requests it. Its answer arrives when
  the test requests it, or never.
- Notifications are those of PostgreSQL. The test sets how many are heard.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter, defaultdict, deque
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import psycopg
from psycopg import errors, pq

from pg_layer._config.options import Config
from pg_layer._db.availability import Outage
from pg_layer._db.errors import Attempts
from pg_layer._db.pool import Connections
from pg_layer._db.queries import groups as group_queries
from pg_layer._db.queries import maintenance
from pg_layer._db.queries import send as send_queries
from pg_layer._db.queries.send import Unannounced
from pg_layer._db.session import Session
from pg_layer._db.statement import Statement
from pg_layer._messages.addresses import channel_address, group_address
from pg_layer._messages.codec import Codec
from pg_layer._messages.rows import Key, Row
from pg_layer._process.tasks import Tasks
from pg_layer._receive.listener import Listener
from pg_layer._runtime.owner import Owner
from pg_layer._send.operations import Change, GroupSend
from pg_layer._state.announcement_queue import AnnouncementQueue, Entry
from pg_layer._state.capacity import LowIds
from pg_layer._state.client import Client
from pg_layer._state.memberships import Memberships, Pair

T = TypeVar("T")

HEARTBEAT = 20.0
EXPIRY = 600.0
CAPACITY = 10_000
JOBS = "jobs"  # a normal channel
GROUPS = ("a", "b", "c")
RETRY = 0.5
MOST_STEPS = 5_000
_TABLES = ("pg_layer_message", "pg_layer_membership", "pg_layer_client", "pg_layer_lease_clock")


class Lost(psycopg.OperationalError):
    """A connection was lost. ``is_late``: no time is left for another attempt."""

    is_late = False


def run_now(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never waits."""
    try:
        work.send(None)
    except StopIteration as end:
        return cast(T, end.value)
    raise AssertionError("It has waited.")


class Immediate:
    """An executor that runs statements at once, on one connection."""

    def __init__(self, wire: Session) -> None:
        self._wire = wire

    async def execute(self, statement: Statement, *values: object) -> list[tuple[Any, ...]]:
        """Return the rows of the statement."""
        return self._wire.execute_now(statement, *values, timeout=10.0)


class Database:
    """Connections that all examples share."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._idle: list[Session] = []
        self._all: list[Session] = []

    def take(self) -> Session:
        """Return a session in autocommit mode that the caller alone uses."""
        if self._idle:
            return self._idle.pop()
        # No statement may wait for a lock: the only thread could not end the other transaction.
        conn = psycopg.connect(self._dsn, autocommit=True, options="-c lock_timeout=100ms")
        wire = Session(conn, can_prepare=True)
        self._all.append(wire)
        return wire

    def give_back(self, wire: Session) -> None:
        """Take a session back. End its transaction, and listen to nothing on it."""
        end_transaction(wire)
        command(wire, "UNLISTEN *")
        list(wire.notifies())
        self._idle.append(wire)

    def close(self) -> None:
        """Close all connections."""
        for wire in self._all:
            wire.close()


def command(wire: Session, sql: str) -> list[tuple[Any, ...]]:
    """Execute SQL without parameters."""
    return wire.execute_now(Statement(sql), timeout=10.0)


def end_transaction(wire: Session) -> None:
    """Roll back the open transaction, if there is one."""
    if wire.conn.pgconn.transaction_status != pq.TransactionStatus.IDLE:
        wire.conn.pgconn.exec_(b"ROLLBACK")


class Loop(asyncio.SelectorEventLoop):
    """An event loop whose time passes when the test requests it."""

    def __init__(self) -> None:
        self.seconds = 0.0
        super().__init__()

    def time(self) -> float:
        return self.seconds

    def settle(self) -> None:
        """Run until all tasks wait for an answer, a notification or time."""
        while True:
            self.call_soon(self.stop)
            self.run_forever()
            if not self._ready:  # type: ignore[attr-defined]
                return


class Call:
    """A statement that was sent."""

    def __init__(
        self, world: World, wire: Session, statement: Statement, values: tuple[object, ...]
    ) -> None:
        self.wire = wire
        self.statement = statement
        self.values = values
        self.answer: asyncio.Future[list[tuple[Any, ...]]] = world.loop.create_future()
        self.is_executed = False
        self._rows: list[tuple[Any, ...]] = []
        self._error: psycopg.Error | None = None

    def execute(self) -> None:
        """Make the server execute the statement. The answer does not arrive yet."""
        if self.is_executed:
            return
        self.is_executed = True
        try:
            self._rows = self.wire.execute_now(self.statement, *self.values, timeout=10.0)
        except psycopg.Error as error:
            if error.sqlstate is None:
                raise
            self._error = error

    def finish(self) -> None:
        """Let the answer arrive."""
        self.execute()
        if self.answer.done():
            return
        if self._error is not None:
            self.answer.set_exception(self._error)
        else:
            self.answer.set_result(self._rows)

    def fail(self, *, is_late: bool = False) -> None:
        """Lose the connection: no answer arrives."""
        if not self.answer.done():
            error = Lost("The connection was lost.")
            error.is_late = is_late
            self.answer.set_exception(error)

    @property
    def is_single(self) -> bool:
        """Whether the statement is alone in its transaction."""
        return self.wire.conn.pgconn.transaction_status == pq.TransactionStatus.IDLE


class Waiting:
    """A session whose statements wait for the test."""

    def __init__(self, process: Process) -> None:
        self._process = process
        self.wire = process.world.database.take()
        self.conn = self.wire.conn
        self.is_closed = False
        self.is_reusable = True

    async def execute(self, statement: Statement, *values: object) -> list[tuple[Any, ...]]:
        """Return the rows of the statement when the test lets the answer arrive."""
        if self.is_closed:
            raise Lost("The connection was lost.")
        call = Call(self._process.world, self.wire, statement, values)
        self._process.calls.append(call)
        try:
            return await call.answer
        finally:
            if call in self._process.calls:
                self._process.calls.remove(call)

    def close(self) -> None:
        """Drop the connection."""
        if self.is_closed:
            return
        self.is_closed = True
        for call in list(self._process.calls):
            if call.wire is self.wire:
                call.fail()
        self._process.world.database.give_back(self.wire)


class ListeningSession(Waiting):
    """The session of a listener: it hears the notifications that the test delivers."""

    def __init__(self, process: Process) -> None:
        super().__init__(process)
        self.pending: deque[tuple[str, str]] = deque()
        self.allowed = 0

    def fetch(self) -> int:
        """Fetch notifications that have arrived. Return how many were not heard yet."""
        if not self.is_closed:
            self.conn.pgconn.exec_(b"SELECT")  # the server sends notifications before this answer
            self.pending.extend(self.wire.notifies())
        return len(self.pending)

    def notifies(self) -> Iterator[tuple[str, str]]:
        """Yield the notifications that the listener may hear now."""
        self.fetch()
        for _ in range(min(self.allowed, len(self.pending))):
            yield self.pending.popleft()

    async def settle(self) -> None:
        """Do nothing: there is never an answer left."""

    def fileno(self) -> int:
        """Return no file descriptor: no socket is watched."""
        return -1


class ManualConnection:
    """A replacement of psycopg's connection in the module of the listener."""

    @staticmethod
    async def connect(**kwargs: object) -> object:
        """Return the name of the connection, which ends with the id of the client."""
        return kwargs["application_name"]


def listening_session(name: str) -> ListeningSession:
    """Return a replacement of `Session` in the module of the listener."""
    return ListeningSession(_processes[name.split()[-1]])


_processes: dict[str, Process] = {}  # by the ids of their clients


class Errors(logging.Handler):
    """The errors that the layer has logged: its tasks continue after unexpected ones."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(logging.Formatter().format(record))


class ManualListener(Listener):
    """The layer's listener without its socket."""

    process: Process

    def _watch(self, session: Session) -> None:
        self._readable()

    def _unwatch(self) -> None:
        pass

    @property
    def session(self) -> ListeningSession | None:
        """The present session."""
        return cast("ListeningSession | None", self._session)

    def hear(self, count: int) -> None:
        """Hear the next ``count`` notifications."""
        session = self.session
        if session is None or not self.is_connected:
            return
        session.allowed = count
        self._readable()
        session.allowed = self.process.heard_at_once


class ManualConnections:
    """A replacement of the layer's pool: it repeats a statement if it may, and raises otherwise."""

    gives_up = False  # the process does not stop

    def __init__(self, process: Process) -> None:
        self._process = process

    async def run(
        self,
        work: Callable[[Session], Awaitable[T]],
        *,
        timeout: float,
        quietly: Callable[[Session], Awaitable[T]] | None = None,
        statement_timeout: float | None = None,
        is_idempotent: bool = False,
    ) -> T:
        """See `Connections.run`."""
        attempts = Attempts(self._process.config, is_idempotent=is_idempotent)
        while True:
            session = Waiting(self._process)
            try:
                return await work(cast(Session, session))
            except psycopg.Error as error:
                attempts.check_retry(error, is_late=getattr(error, "is_late", False))
            finally:
                session.close()
            await asyncio.sleep(RETRY)


class RecordingQueue(AnnouncementQueue):
    """A queue that records the rows that leave it, and how each was appended."""

    def __init__(self, process: Process) -> None:
        super().__init__(process.client.cursor)
        self._process = process
        self._is_hearing = False
        self.catch_ups = 0
        self.dispatched_rows: list[Row] = []
        self.times: Counter[Key] = Counter()
        self.dispatched_at: dict[Key, int] = {}
        self.caught_up: dict[Key, int] = {}  # -> the number of the catch-up
        self.merged: set[Key] = set()

    def hear(self, announcement: Any) -> None:
        was_hearing, self._is_hearing = self._is_hearing, True
        super().hear(announcement)
        self._is_hearing = was_hearing

    def _push(self, entry: Entry) -> None:
        if not self._is_hearing:
            self.caught_up.update((row.key, self.catch_ups) for row in entry.rows)
        super()._push(entry)

    def merge(self, rows: Sequence[Row], *, behind_head: bool = False) -> None:
        self.merged.update(row.key for row in rows)
        super().merge(rows, behind_head=behind_head)

    def begin_catch_up(self) -> None:
        self.catch_ups += 1
        super().begin_catch_up()

    def dispatched(self, rows: Sequence[Row]) -> None:
        super().dispatched(rows)
        self.dispatched_rows.extend(rows)
        self.times.update(row.key for row in rows)
        self.dispatched_at.update((row.key, self._process.world.moment()) for row in rows)


class RecordingMemberships(Memberships):
    """Memberships that record when they end."""

    def __init__(self, process: Process) -> None:
        super().__init__()
        self._process = process
        self.removed_at: dict[Pair, int] = {}

    def discard(self, group: str, channel: str) -> bool:
        is_removed = super().discard(group, channel)
        if is_removed:
            self.removed_at[group, channel] = self._process.world.moment()
        return is_removed


@dataclass(eq=False)
class Message:
    """A row as the test tracks it. Moments number the events of the world."""

    serial: int  # 0 for a control message
    writer: int
    address: str
    channel: str | None
    key: Key
    is_own: bool  # its statement is alone in its transaction, and announces it
    rank: int = 0  # order of the announcements; 0: not announced
    committed: int = 0
    is_excused: bool = False  # expired, undone or swept


@dataclass(eq=False)
class Membership:
    """A membership that was requested."""

    began: int
    returned: int = 0  # messages sent later must arrive; 0: the call did not return
    ended: int = 0  # when an own discard returned


@dataclass(eq=False)
class Discard:
    """A discard that was requested by a control message, or made by the owner."""

    key: Key | None = None
    effective_at: int = 0  # the moment; 0: unknown


@dataclass(eq=False)
class Writer:
    """A sender, with or without a transaction."""

    number: int
    unannounced: list[tuple[Unannounced, Message]] = field(default_factory=list)


@dataclass(eq=False)
class Transaction:
    """An application's transaction."""

    writer: Writer
    wire: Session
    is_quiet: bool
    messages: list[Message] = field(default_factory=list)
    rows: list[Unannounced] = field(default_factory=list)
    requests: list[Request] = field(default_factory=list)
    prepared: str | None = None


@dataclass(eq=False)
class Request:
    """A membership request of another process."""

    process: Process
    pair: Pair
    membership: Membership | None  # None: a discard
    message: Message


class Process:
    """A process that receives."""

    def __init__(self, world: World, number: int, heard_at_once: int) -> None:
        self.world = world
        self.number = number
        self.heard_at_once = heard_at_once  # when the listener reads its socket
        self.config = Config(
            dsn="host=nowhere",
            prefix=world.prefix,
            capacity=CAPACITY,
            expiry=EXPIRY,
            heartbeat=HEARTBEAT,
            lease=3600,
            group_expiry=None,
            serializer_format="json",
        )
        self.client = client = Client(self.config, Codec("json", self.config.max_message_size))
        client.announcements = self.queue = RecordingQueue(self)
        client.memberships = self.memberships = RecordingMemberships(self)
        self.calls: list[Call] = []
        self.channels = [client.new_channel("specific") for _ in range(2)]
        self.received: dict[str, list[int]] = defaultdict(list)
        self.waiters: list[asyncio.Future[None]] = []
        self.change: asyncio.Task[Any] | None = None
        _processes[client.id] = self
        world.loop.run_until_complete(self._begin())

    async def _begin(self) -> None:
        connections = cast(Connections, ManualConnections(self))

        async def no_predecessor() -> None:
            pass

        self.work = Tasks(self.client.failures)
        self.owner = owner = Owner(
            self.client, connections, Outage(self.client), self.work, no_predecessor
        )
        # The listener that the owner has made, as an instance of the class without a socket.
        self.listener = listener = ManualListener.__new__(ManualListener)
        vars(listener).update(vars(owner._listener))
        listener.process = self
        owner._listener = listener

    # ------------------------------------------------------------------ its connections

    def answer(self, count: int) -> None:
        """Execute the next statements, and let their answers arrive."""
        for _ in range(count):
            if not self.calls:
                return
            self.calls[0].finish()
            self.world.settle()

    def answer_only(self, text: str) -> None:
        """Answer the first statement with this text in its SQL."""
        call = next(call for call in self.calls if text in call.statement.sql.decode())
        call.finish()
        self.world.settle()

    def lose_listener(self) -> None:
        """Lose the listening connection, and the notifications that were not heard yet."""
        session = self.listener.session
        if session is not None:
            session.close()
            self.listener.reconnect()

    def lose_call(self, index: int, *, is_executed: bool, is_late: bool, comes_later: bool) -> None:
        """Lose the connection of a statement, before or after the server has executed it."""
        call = self.calls[index % len(self.calls)]
        session = self.listener.session
        if session is not None and call.wire is session.wire:
            if is_executed:
                call.execute()
            self.lose_listener()
            return
        if is_executed:
            call.execute()
        elif comes_later and call.is_single and not call.is_executed:
            self.world.late.append((call.statement, call.values))
        call.is_executed = True
        call.fail(is_late=is_late)

    # ------------------------------------------------------------------ receiving

    def receive(self) -> None:
        """Receive all messages in the channel queues."""
        for channel in self.channels:
            self._pop(channel, None)
        self.take_jobs()

    def _pop(self, channel: str, waiter: asyncio.Future[None] | None) -> bool:
        queue = self.client.queue(channel)
        found = False
        while (message := queue.pop(self.client.pending_deletes, waiter)) is not None:
            found = True
            self.received[channel].append(self.client.codec.decode(message.payload)["n"])
            if message.key is not None:
                self.world.loop.call_soon(self.owner.schedule_deletion, queue)
            if channel == JOBS:
                break
            waiter = None
        return found

    def want_job(self) -> None:
        """Wait for a job."""
        waiter = self.client.queue(JOBS).add_waiter(self.world.loop)
        if waiter is None:
            self._pop(JOBS, None)
        else:
            self.waiters.append(waiter)
            self.world.loop.call_soon(self.owner.want, JOBS)

    def take_jobs(self) -> None:
        """Receive the jobs for which waiting readers were woken."""
        for waiter in [waiter for waiter in self.waiters if waiter.done()]:
            self.waiters.remove(waiter)
            if not self._pop(JOBS, waiter):
                self.want_job()

    def stop_waiting(self) -> None:
        """Cancel all readers that wait for jobs."""
        for waiter in self.waiters:
            self.client.queue(JOBS).remove_waiter(waiter)
        self.waiters.clear()

    def close(self) -> None:
        """End without closing the client."""
        for task in self.work.running:
            task.cancel()
        if self.change is not None:
            self.change.cancel()


class World:
    """The database, the processes, the writers, and the test's record of messages."""

    def __init__(self, database: Database, number: int) -> None:
        self.database = database
        self.prefix = f"m{number}"
        self.loop = Loop()
        self.admin = database.take()
        self.writer_wire = database.take()
        self.processes: list[Process] = []
        self.writers = [Writer(number) for number in range(3)]
        self.transactions: list[Transaction] = []
        self.late: list[tuple[Statement, tuple[object, ...]]] = []
        self.messages: list[Message] = []
        self.by_key: dict[Key, Message] = {}
        self.wanted: dict[tuple[int, Pair], list[Membership]] = defaultdict(list)
        self.discards: dict[tuple[int, Pair], list[Discard]] = defaultdict(list)
        self.requests: list[Request] = []
        # Processes whose lease was ended, and that have not renewed it since.
        self.swept: set[int] = set()
        self.checkpoint: dict[str, list[str]] | None = None
        self.has_lost_rows = False
        self.errors = Errors()
        logging.getLogger("pg_layer").addHandler(self.errors)
        self._moment = 0
        self._rank = 0
        self._serial = 0
        self._prepared = 0

    def moment(self) -> int:
        """Count an event, and return its number."""
        self._moment += 1
        return self._moment

    def sql(self, text: str) -> list[tuple[Any, ...]]:
        """Execute SQL that is no step of the protocols."""
        return command(self.admin, text)

    def settle(self) -> None:
        """Let all processes run until they wait."""
        self.loop.settle()
        for process in self.processes:
            process.take_jobs()
            assert not process.client.failures.problems()
        self.loop.settle()
        assert not self.errors.texts, self.errors.texts

    def start(self, heard_at_once: Iterable[bool]) -> None:
        """Start the processes, and run them until nothing is pending."""
        for number, at_once in enumerate(heard_at_once):
            self.processes.append(Process(self, number, 10**6 if at_once else 0))
        self.rest()
        assert all(process.listener.is_connected for process in self.processes)

    def rest(self) -> None:
        """Let all answers and notifications arrive."""
        for _ in range(MOST_STEPS):
            self.settle()
            if calls := [process for process in self.processes if process.calls]:
                for process in calls:
                    process.answer(1)
                continue
            is_quiet = True
            for process in self.processes:
                session = process.listener.session
                if session is not None and process.listener.is_connected and session.fetch():
                    process.listener.hear(10**6)
                    is_quiet = False
            if is_quiet:
                return
        raise AssertionError("The processes do not come to rest.")

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.loop.seconds += seconds
        for process in self.processes:
            # The lease uses the machine's clock, which does not follow the loop's.
            process.owner.lease._heartbeat_at -= seconds
        self.settle()

    # ------------------------------------------------------------------ sending

    def _payload(self, size: int) -> tuple[int, bytes]:
        self._serial += 1
        return self._serial, json.dumps({"n": self._serial, "x": "x" * size}).encode()

    def _note(
        self, writer: Writer, rows: Iterable[tuple[int, str, str | None, Key]], is_own: bool
    ) -> list[Message]:
        messages = [
            Message(serial, writer.number, address, channel, key, is_own)
            for serial, address, channel, key in rows
        ]
        self.messages.extend(messages)
        self.by_key.update((message.key, message) for message in messages)
        return messages

    def _announced(self, messages: Iterable[Message]) -> None:
        for message in messages:
            self._rank += 1
            message.rank = self._rank

    def write(
        self,
        writer: Writer,
        targets: Sequence[tuple[str | None, str | None]],
        sizes: Sequence[int],
        transaction: Transaction | None,
        *,
        is_refused: bool = False,
    ) -> None:
        """Send a message to each (group, channel): to groups, if there is one, or to channels.

        ``is_refused``: the server takes no NOTIFY.
        """
        if transaction is None and not is_refused:
            self.announce(writer)
        own = transaction is None
        quiet = is_refused if transaction is None else transaction.is_quiet
        session = Immediate(self.writer_wire if transaction is None else transaction.wire)
        operations = [self._payload(size) for size in sizes]
        began = self.moment()
        rows: list[tuple[int, str, str | None, Key]] = []
        if targets[0][0] is not None:
            groups = [group for group, _ in targets if group is not None]
            sends = [
                GroupSend(group, payload, EXPIRY, None)
                for group, (_, payload) in zip(groups, operations, strict=False)
            ]
            sent = run_now(
                send_queries.group_send_batch(
                    session,
                    self.prefix,
                    [send.group for send in sends],
                    [send.payload for send in sends],
                    [send.expiry for send in sends],
                    [None] * len(sends),
                    own=own,
                    quiet=quiet,
                )
            )
            rows = [
                (operations[index][0], address, None, Key(sent.boot or 0, sent.xid or 0, id))
                for id, address, index in zip(sent.ids, sent.addresses, sent.indexes, strict=True)
            ]
            for index in set(range(len(sends))) - set(sent.indexes):
                self._check_skipped(sends[index].group, began)
            unannounced = [
                Unannounced(
                    sent.boot or 0,
                    sent.xid or 0,
                    id,
                    address,
                    None,
                    "message",
                    None,
                    sends[index].payload,
                )
                for id, address, index in zip(sent.ids, sent.addresses, sent.indexes, strict=True)
            ]
        else:
            channels = [channel for _, channel in targets if channel is not None]
            payloads = [payload for _, payload in operations][: len(channels)]
            accepted = run_now(
                send_queries.send_batch(
                    session,
                    self.prefix,
                    channels,
                    payloads,
                    [EXPIRY] * len(channels),
                    [CAPACITY] * len(channels),
                    LowIds((), ()),
                    own=own,
                    quiet=quiet,
                )
            )
            assert not accepted.full
            boot, xid = accepted.boot or 0, accepted.xid or 0
            addresses = [channel_address(self.prefix, channel) for channel in channels]
            rows = [
                (draft[0], address, channel, Key(boot, xid, id))
                for draft, address, channel, id in zip(
                    operations, addresses, channels, accepted.ids, strict=False
                )
            ]
            unannounced = [
                Unannounced(boot, xid, id, address, channel, "message", None, payload)
                for id, address, channel, payload in zip(
                    accepted.ids, addresses, channels, payloads, strict=True
                )
            ]
        messages = self._note(writer, rows, own and not quiet)
        self._written(writer, messages, unannounced, transaction, quiet)

    def _written(
        self,
        writer: Writer,
        messages: list[Message],
        unannounced: list[Unannounced],
        transaction: Transaction | None,
        quiet: bool,
    ) -> None:
        if transaction is not None:
            transaction.messages.extend(messages)
            if quiet:
                transaction.rows.extend(unannounced)
            return
        now = self.moment()
        for message in messages:
            message.committed = now
        if quiet:
            writer.unannounced.extend(zip(unannounced, messages, strict=True))
        else:
            self._announced(messages)

    def _check_skipped(self, group: str, began: int) -> None:
        """Check that no message is skipped for a group that has a member."""
        for (number, pair), wanted in self.wanted.items():
            if (
                pair[0] == group
                and number not in self.swept
                and (number, pair) not in self.discards
            ):
                assert not any(0 < each.returned < began for each in wanted), (
                    f"A message to group {group} was not written, although {pair[1]} is a member."
                )

    def announce(self, writer: Writer) -> None:
        """Announce marked rows."""
        if not writer.unannounced:
            return
        rows = [row for row, _ in writer.unannounced]
        messages = [message for _, message in writer.unannounced]
        writer.unannounced = []
        run_now(send_queries.announce(Immediate(self.writer_wire), rows))
        self._announced(sorted(messages, key=lambda message: message.key.id))

    # ------------------------------------------------------------------ transactions

    def begin(self, writer: Writer, *, is_quiet: bool) -> None:
        """Begin an application's transaction."""
        wire = self.database.take()
        command(wire, "BEGIN")
        self.transactions.append(Transaction(writer, wire, is_quiet))

    def commit(self, transaction: Transaction, *, is_announced: bool) -> None:
        """Commit a transaction, and announce the rows that it did not announce."""
        self.transactions.remove(transaction)
        if transaction.prepared is not None:
            self.sql(f"COMMIT PREPARED '{transaction.prepared}'")
        else:
            command(transaction.wire, "COMMIT")
            self.database.give_back(transaction.wire)
        now = self.moment()
        for message in transaction.messages:
            message.committed = now
        writer = transaction.writer
        if not transaction.is_quiet:
            self._announced(transaction.messages)
            self._requests_returned(transaction.requests)
        elif is_announced:
            writer.unannounced.extend(zip(transaction.rows, transaction.messages, strict=True))
            self.announce(writer)
            self._requests_returned(transaction.requests)

    def _requests_returned(self, requests: Iterable[Request]) -> None:
        now = self.moment()
        for change in requests:
            if change.membership is not None:
                change.membership.returned = now

    def roll_back(self, transaction: Transaction) -> None:
        """Roll a transaction back."""
        self.transactions.remove(transaction)
        if transaction.prepared is not None:
            self.sql(f"ROLLBACK PREPARED '{transaction.prepared}'")
        else:
            command(transaction.wire, "ROLLBACK")
            self.database.give_back(transaction.wire)

    def prepare(self, transaction: Transaction) -> None:
        """Prepare a transaction: another connection commits it."""
        self._prepared += 1
        transaction.prepared = f"{self.prefix}_{self._prepared}"
        command(transaction.wire, f"PREPARE TRANSACTION '{transaction.prepared}'")
        self.database.give_back(transaction.wire)

    # ------------------------------------------------------------------ memberships

    def change(self, process: Process, changes: Sequence[tuple[str, int, bool]]) -> None:
        """Make a process change memberships of its own channels."""
        began = self.moment()
        asked: list[tuple[Pair, Membership | None]] = []
        discarded: list[Discard] = []
        for group, index, added in changes:
            pair = (group, process.channels[index])
            if added:
                membership = Membership(began)
                self.wanted[process.number, pair].append(membership)
                asked.append((pair, membership))
            else:
                discard = Discard()
                self.discards[process.number, pair].append(discard)
                discarded.append(discard)
                asked.append((pair, None))
        last = dict(asked)

        async def work() -> None:
            await process.owner._change(
                [
                    Change(group, process.channels[index], added, CAPACITY)
                    for group, index, added in changes
                ],
                60.0,
            )
            now = self.moment()
            for discard in discarded:
                discard.effective_at = now
            for pair, membership in asked:
                if last[pair] is not membership:
                    continue
                if membership is not None:
                    membership.returned = now
                    continue
                for before in self.wanted[process.number, pair]:
                    before.ended = before.ended or now

        process.change = self.loop.create_task(work())
        self.settle()

    def request(
        self,
        writer: Writer,
        process: Process,
        group: str,
        index: int,
        added: bool,
        transaction: Transaction | None,
    ) -> None:
        """Change a membership of another process."""
        if transaction is None:
            self.announce(writer)
        began = self.moment()
        pair = (group, process.channels[index])
        quiet = transaction is not None and transaction.is_quiet
        session = Immediate(self.writer_wire if transaction is None else transaction.wire)
        # Always quiet, so that the statement returns the row; announced below as the layer would.
        rows = run_now(
            group_queries.request(
                session,
                self.prefix,
                [(*pair, added, CAPACITY)],
                None,
                own=transaction is None,
                quiet=quiet,
            )
        )
        if not rows:
            # Find the row among those that its transaction sees.
            ((id, xid, boot, payload),) = command(
                self.writer_wire if transaction is None else transaction.wire,
                "SELECT id, xid::text::bigint, boot, payload FROM pg_layer_message"
                f" WHERE address = '{process.client.address}' AND kind IN ('add', 'discard')"
                " ORDER BY id DESC LIMIT 1",
            )
            rows = [
                Unannounced(
                    boot, xid, id, process.client.address, pair[1], "add", None, bytes(payload)
                )
            ]
        (row,) = rows
        messages = self._note(
            writer, [(0, row.address, row.channel, Key(row.boot, row.xid, row.id))], False
        )
        membership = None
        if added:
            membership = Membership(began)
            self.wanted[process.number, pair].append(membership)
        else:
            self.discards[process.number, pair].append(Discard(messages[0].key))
        change = Request(process, pair, membership, messages[0])
        self.requests.append(change)
        if transaction is not None:
            transaction.requests.append(change)
        self._written(writer, messages, rows, transaction, quiet)
        if transaction is None:
            self._requests_returned([change])

    # ------------------------------------------------------------------ faults

    def expire(self, message: Message) -> None:
        """Let a row expire now."""
        self.sql(
            "UPDATE pg_layer_message SET expires_at = clock_timestamp() - interval '1 hour'"
            f" WHERE address LIKE '{self.prefix}!%' AND id = {message.key.id} AND kind = 'message'"
        )
        message.is_excused = True

    def make_steady(self) -> None:
        """Set the lease clock to renewals without a gap for a day."""
        self.sql(
            "UPDATE pg_layer_lease_clock SET steady_since = clock_timestamp() - interval '1 day',"
            " renewed_at = clock_timestamp(),"
            " boot = coalesce((SELECT b.boot FROM pg_layer_boot AS b), boot)"
            f" WHERE prefix = '{self.prefix}'"
        )

    def end_lease(self, process: Process) -> None:
        """End the lease of a stopped process, and sweep its memberships."""
        self.make_steady()
        address = process.client.address
        self.sql(
            "UPDATE pg_layer_client SET expires_at = clock_timestamp() - interval '1 day'"
            f" WHERE address = '{address}'"
        )
        self.sweep()

    def sweep(self) -> None:
        """Sweep, also memberships of a process whose lease could not be over before."""
        run_now(maintenance.sweep(Immediate(self.admin), self.prefix, 1000, 0.0))
        swept = {
            address
            for (address,) in self.sql(
                "SELECT address FROM pg_layer_client"
                f" WHERE address LIKE '{self.prefix}!%' AND swept_at IS NOT NULL"
            )
        }
        for process in self.processes:
            if process.client.address in swept:
                self.swept.add(process.number)
                self.has_lost_rows = True
        if swept:
            self._excuse(lambda message: message.address in swept or message.channel == JOBS)

    def _excuse(self, condition: Callable[[Message], bool]) -> None:
        for message in self.messages:
            if message.committed and condition(message):
                message.is_excused = True
        for change in self.requests:
            is_applied = change.process.queue.times[change.message.key]
            if change.membership is not None and change.message.is_excused and not is_applied:
                change.membership.returned = 0

    def set_checkpoint(self) -> None:
        """Record what is committed now: it has reached the disk, and the standby."""
        self.checkpoint = {
            table: [
                text
                for (text,) in self.sql(
                    f"SELECT row_to_json(t)::text FROM {table} AS t WHERE {self._of_prefix(table)}"
                )
            ]
            for table in _TABLES
        }

    def _of_prefix(self, table: str) -> str:
        if table == "pg_layer_lease_clock":
            return f"prefix = '{self.prefix}'"
        return f"address LIKE '{self.prefix}!%'"

    def crash(self, *, is_undone: bool) -> None:
        """Crash the server: undo the commits that were not on the disk, and begin another boot.

        ``is_undone``: it returns to the checkpoint, like a lagging standby that is promoted.
        """
        for transaction in list(self.transactions):
            if transaction.prepared is None or is_undone:
                self.roll_back(transaction)
        self.late.clear()
        for process in self.processes:
            process.lose_listener()
            for call in list(process.calls):
                call.is_executed = True
                call.fail()
        self.settle()
        if is_undone and self.checkpoint is not None:
            self._restore(self.checkpoint)
        self.sql("DELETE FROM pg_layer_boot")
        # Boots are numbered in milliseconds.
        now = time.time_ns() // 1_000_000
        while time.time_ns() // 1_000_000 <= now:
            pass

    def _restore(self, checkpoint: dict[str, list[str]]) -> None:
        self.has_lost_rows = True
        for table, rows in checkpoint.items():
            self.sql(f"DELETE FROM {table} WHERE {self._of_prefix(table)}")
            for text in rows:
                literal = text.replace("'", "''")
                self.sql(
                    f"INSERT INTO {table} OVERRIDING SYSTEM VALUE"
                    f" SELECT (json_populate_record(NULL::{table}, '{literal}')).*"
                )
        left = {
            Key(boot, xid, id)
            for boot, xid, id in self.sql(
                "SELECT boot, xid::text::bigint, id FROM pg_layer_message"
                f" WHERE address LIKE '{self.prefix}!%'"
            )
        }
        self._excuse(lambda message: message.key not in left or message.channel == JOBS)
        for (number, pair), wanted in self.wanted.items():
            process = self.processes[number]
            for membership in wanted:
                # The owner has the membership in memory, and writes it again.
                if process.memberships.get(*pair) is None:
                    membership.returned = 0

    def execute_late(self, index: int) -> None:
        """Execute a statement that its sender has given up."""
        statement, values = self.late.pop(index % len(self.late))
        try:
            run_now(Immediate(self.admin).execute(statement, *values))
        except errors.ObjectNotInPrerequisiteState:
            pass  # its fence is too small
        except psycopg.Error:
            end_transaction(self.admin)
            raise

    # ------------------------------------------------------------------ invariants

    def check_rows(self) -> None:
        """Check that a client dispatches each row at most once, in the order of announcements."""
        for process in self.processes:
            queue = process.queue
            doubled = [key for key, times in queue.times.items() if times > 1]
            assert not doubled, f"Process {process.number} dispatched {doubled} twice."
            last = None
            last_ids: dict[int, int] = {}
            last_own: dict[int, int] = {}
            for row in queue.dispatched_rows:
                message = self.by_key.get(row.key)
                if message is None or row.key in queue.merged:
                    continue
                if message.is_own:
                    assert message.serial > last_own.get(message.writer, 0), (
                        f"Process {process.number}: the messages of one writer are out of order."
                    )
                    last_own[message.writer] = message.serial
                number = queue.caught_up.get(row.key)
                if number is not None:
                    # Searches also find marked rows, and claims bring jobs.
                    if not row.marked and not row.is_job:
                        assert row.id > last_ids.get(number, 0), (
                            "A catch-up is not in the order of ids."
                        )
                        last_ids[number] = row.id
                    continue
                assert message.rank, f"{row.key} was heard and not announced."
                assert last is None or message.rank > last, (
                    f"Process {process.number}: {row.key} is out of order."
                )
                last = message.rank

    def check_received(self) -> None:
        """Check that no message is received twice, or was sent before the membership began."""
        times: Counter[tuple[str, int]] = Counter()
        jobs: Counter[int] = Counter()
        for process in self.processes:
            for channel, serials in process.received.items():
                (
                    jobs.update(serials)
                    if channel == JOBS
                    else times.update((channel, s) for s in serials)
                )
        doubled = [each for each, count in times.items() if count > 1]
        assert not doubled, f"Received twice: {doubled}"
        excused = {message.serial for message in self.messages if message.is_excused}
        assert not [n for n, count in jobs.items() if count > 1 and n not in excused], (
            "A job was done twice."
        )

    def finish(self) -> None:
        """End open transactions, and let all messages arrive."""
        for transaction in list(self.transactions):
            if transaction.prepared is not None:
                self.commit(transaction, is_announced=False)
            else:
                self.roll_back(transaction)
        while self.late:
            self.execute_late(0)
        for process in self.processes:
            process.stop_waiting()
            process.heard_at_once = 10**6
        self.rest()
        for _ in range(5):
            for seconds in (RETRY, HEARTBEAT / 2, HEARTBEAT / 2):
                self.advance(seconds)
                self.rest()
                for process in self.processes:
                    process.receive()
        for _ in self.messages:
            waiting = [process for process in self.processes if not process.waiters]
            for process in waiting:
                process.want_job()
            self.rest()
            if not any(not process.waiters for process in self.processes):
                break
        for process in self.processes:
            process.receive()
        self.rest()

    def check_end(self) -> None:
        """Check that all messages have arrived, and that table and owners agree."""
        self.check_rows()
        self.check_received()
        received_jobs = {n for process in self.processes for n in process.received[JOBS]}
        for message in self.messages:
            if not message.committed or message.is_excused or not message.serial:
                continue
            if message.channel == JOBS:
                assert message.serial in received_jobs, f"Job {message.serial} was lost."
            elif message.channel is not None:
                process = next(p for p in self.processes if message.channel in p.channels)
                assert message.serial in process.received[message.channel], (
                    f"Message {message.serial} to {message.channel} was lost."
                )
        self._check_members()
        self._check_tables()

    def _check_members(self) -> None:
        of_group: dict[str, list[Message]] = defaultdict(list)
        for message in self.messages:
            if message.committed and message.channel is None:
                of_group[message.address].append(message)
        for process in self.processes:
            for group in GROUPS:
                for channel in process.channels:
                    wanted = self.wanted.get((process.number, (group, channel)), [])
                    removed = process.memberships.removed_at.get((group, channel), 0)
                    assert not removed or (process.number, (group, channel)) in self.discards
                    received = set(process.received[channel])
                    for message in of_group[group_address(self.prefix, group)]:
                        at = message.committed
                        is_due = any(
                            removed < each.returned < at
                            and self._is_last(process, (group, channel), each)
                            for each in wanted
                        )
                        is_possible = any(
                            each.began < at and (not each.ended or at < each.ended)
                            for each in wanted
                        )
                        if message.serial in received:
                            assert is_possible, (
                                f"{channel} received {message.serial} of group {group}, "
                                "and was no member."
                            )
                        elif not message.is_excused:
                            assert not is_due, (
                                f"{channel} missed message {message.serial} of group {group}."
                            )

    def _is_last(self, process: Process, pair: Pair, membership: Membership) -> bool:
        """Return whether all discards took effect before a membership was requested.

        The owner decides the order of those that were in flight at the same time.
        """
        moments = [
            discard.effective_at
            if discard.key is None
            else process.queue.dispatched_at.get(discard.key, 0)
            for discard in self.discards.get((process.number, pair), ())
        ]
        return all(0 < moment < membership.began for moment in moments)

    def _check_tables(self) -> None:
        if self.has_lost_rows:
            # Let membership requests expire that were applied and then undone by a crash.
            self.sql(
                "UPDATE pg_layer_membership SET expires_at = clock_timestamp() WHERE id <> 0"
                f" AND address LIKE '{self.prefix}!%'"
            )
        for group in GROUPS:
            in_memory = {
                member.channel
                for process in self.processes
                for member in process.memberships.members(group)
            }
            in_table = {
                channel
                for (channel,) in self.sql(
                    f"SELECT pg_layer_group_channels('{self.prefix}', '{group}')"
                )
            }
            assert in_table == in_memory, f"Group {group}: {in_table ^ in_memory} differ."

    def close(self) -> None:
        """Close the processes, and empty the tables."""
        for transaction in list(self.transactions):
            self.roll_back(transaction)
        for process in self.processes:
            process.close()
        self.loop.settle()
        for process in self.processes:
            process.listener.abandon()
            process.owner.changes.close()
        self.loop.settle()
        self.loop.close()
        _processes.clear()
        logging.getLogger("pg_layer").removeHandler(self.errors)
        self.sql(
            "TRUNCATE pg_layer_message, pg_layer_membership, pg_layer_client, pg_layer_lease_clock"
        )
        self.database.give_back(self.admin)
        self.database.give_back(self.writer_wire)
