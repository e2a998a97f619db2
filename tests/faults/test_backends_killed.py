"""Backends that are killed under traffic; and the traffic, which other tests of faults send as well."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import msgpack  # type: ignore[import-untyped]
import psycopg
import pytest
from psycopg.conninfo import make_conninfo

from pg_layer import LayerUnavailable, PostgresChannelLayer
from tests.conftest import Observer
from tests.logs import event_of
from tests.processes import PATIENCE, Link, Process, Processes, listen, open_layer, until

Recovery = Callable[[str], AbstractContextManager[None]]

KILLING = 30.0  # seconds
KILLING_EVERY = (0.02, 0.3)

# No lease runs out, nothing is full, and nothing expires: what does not arrive was lost.
TRAFFIC: dict[str, object] = {"capacity": 1_000_000, "expiry": 3600}

PAUSE = 0.008  # seconds at most between two messages of a stream
SIZES = (10, 10, 10, 10, 6000)  # the last fits in no NOTIFY

RETURNED, UNKNOWN, REFUSED = "returned", "unknown", "refused"


# ---------------------------------------------------------------------- in the processes


class Logged(NamedTuple):
    """A log record."""

    logger: str
    level: int
    event: str | None
    text: str
    has_traceback: bool


class Says(logging.Handler):
    """Tells the test each warning."""

    def __init__(self, link: Link) -> None:
        super().__init__(logging.WARNING)
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        has_traceback = bool(record.exc_info) or "Traceback" in record.getMessage()
        text = self.format(record) if has_traceback else record.getMessage()
        self._link.say(
            ("log", Logged(record.name, record.levelno, event_of(record), text, has_traceback))
        )


@contextlib.contextmanager
def telling(link: Link) -> Iterator[None]:
    """The test is told what is logged."""
    handler = Says(link)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


async def serve(link: Link, /, dsn: str, **options: object) -> None:
    """Read a channel, a member of "room" and "jobs", and tell of all that comes."""
    with telling(link):
        async with open_layer(dsn, **options) as layer:
            own, member = await layer.new_channel(), await layer.new_channel()
            await layer.group_add("room", member)
            await listen(layer)

            async def consume(channel: str) -> None:
                while True:
                    message = await layer.receive(channel)
                    link.say(("got", message["stream"], message["number"], message["at"]))

            consumers = [asyncio.create_task(consume(channel)) for channel in (own, member, "jobs")]
            obeying = asyncio.create_task(obey(link, layer))
            link.say(("channel", own))
            done, _ = await asyncio.wait({obeying, *consumers}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # receive() never raises, or this process fails
            for consumer in consumers:
                consumer.cancel()
    link.say(("end", None))


async def obey(link: Link, layer: PostgresChannelLayer) -> None:
    """Do what the test says, until it says "end"."""
    while (what := await hear(link.hear)) != "end":
        if what == "health":
            link.say(("health", await layer.health()))


async def hear(hear: Callable[[], Awaitable[Any]]) -> Any:
    """What the other end says next, however long that takes."""
    while True:
        with contextlib.suppress(asyncio.TimeoutError):
            return await hear()


class Sent(NamedTuple):
    """What became of a message, and when its send ended, by the clock that all processes share."""

    outcome: str
    at: float


async def send(link: Link, /, name: str, dsn: str, channels: list[str], **options: object) -> None:
    """Send numbers to each channel, "room" and "jobs" until told to stop; tell what became of each."""
    sent: dict[str, list[Sent]] = {}

    async def fill(
        stream: str, call: Callable[[dict[str, Any]], Coroutine[Any, Any, None]]
    ) -> None:
        log = sent[stream] = []
        while not stopping.done():
            message = {
                "stream": stream,
                "number": len(log),
                "at": time.monotonic(),
                "blob": bytes(random.choice(SIZES)),
            }
            outcome = RETURNED
            try:
                await asyncio.wait_for(
                    call(message), PATIENCE
                )  # or this process fails: a send never hangs
            except LayerUnavailable as error:
                outcome = UNKNOWN if "unknown" in str(error) else REFUSED
                link.say(("failed", stream, outcome))
            log.append(Sent(outcome, time.monotonic()))
            await asyncio.sleep(random.random() * PAUSE)

    with telling(link):
        async with open_layer(dsn, **options) as layer:

            async def to(channel: str, message: dict[str, Any]) -> None:
                await layer.send(channel, message)

            async def to_room(message: dict[str, Any]) -> None:
                await layer.group_send("room", message)

            stopping = asyncio.create_task(hear(link.hear))
            await asyncio.gather(
                *(
                    fill(f"{name}:own-{index}", partial(to, channel))
                    for index, channel in enumerate(channels)
                ),
                fill(f"{name}:room", to_room),
                fill(f"{name}:jobs", lambda message: to("jobs", message)),
            )
    link.say(("end", sent))


# ---------------------------------------------------------------------- in the test


class Party:
    """A process of the traffic, and what it has told."""

    def __init__(self, process: Process[None]) -> None:
        self.process = process
        self.channel = ""
        self.got: dict[str, list[int]] = {}
        self.latest: dict[str, float] = {}  # when the newest message of each stream was sent
        self.failed: Counter[str] = Counter()
        self.logged: list[Logged] = []
        self.health: list[dict[str, Any]] = []
        self.sent: dict[str, list[Sent]] = {}
        self.task = asyncio.create_task(self._hear())

    async def _hear(self) -> None:
        while True:
            what, *rest = await hear(self.process.hear)
            if what == "got":
                stream, number, at = rest
                self.got.setdefault(stream, []).append(number)
                self.latest[stream] = max(at, self.latest.get(stream, 0.0))
            elif what == "failed":
                self.failed[rest[0]] += 1
            elif what == "log":
                self.logged.append(rest[0])
            elif what == "health":
                self.health.append(rest[0])
            elif what == "channel":
                self.channel = rest[0]
            else:
                self.sent = rest[0]
                await self.process.result()
                return

    def warnings(self) -> list[Logged]:
        """Return what the layer has logged."""
        return [entry for entry in self.logged if entry.logger == "pg_layer"]


class Traffic:
    """Senders that write to receivers until it is ended; then says what was lost, doubled or out of order."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn  # past whatever is broken
        self._processes = Processes()
        self.receivers: list[Party] = []
        self.senders: list[Party] = []

    async def serve(self, dsn: str, **options: object) -> Party:
        """Start a receiver; its options are those of CONFIG."""
        party = Party(self._processes.start(serve, dsn, **{**TRAFFIC, **options}))
        self.receivers.append(party)
        await self.until(lambda: party.channel)
        return party

    def send(self, dsn: str, **options: object) -> Party:
        """Start a sender to all receivers there are."""
        channels = [receiver.channel for receiver in self.receivers]
        name = f"sender-{len(self.senders)}"
        party = Party(self._processes.start(send, name, dsn, channels, **{**TRAFFIC, **options}))
        self.senders.append(party)
        return party

    def _check(self) -> None:
        for party in (*self.receivers, *self.senders):
            if party.task.done():
                party.task.result()

    async def until(self, check: Callable[[], object]) -> None:
        """Look until ``check`` says so, or a process fails."""

        def look() -> bool:
            self._check()
            return bool(check())

        await until(look)

    async def flows(self) -> None:
        """Returns when on each way something has arrived that was sent after this was called."""
        since = time.monotonic()

        def all_flow() -> bool:
            for name in (f"sender-{n}" for n in range(len(self.senders))):
                for index, receiver in enumerate(self.receivers):
                    for stream in (f"{name}:own-{index}", f"{name}:room"):
                        if receiver.latest.get(stream, 0.0) < since:
                            return False
                if max(r.latest.get(f"{name}:jobs", 0.0) for r in self.receivers) < since:
                    return False
            return True

        await self.until(all_flow)

    async def end(
        self,
        may_be_lost: Callable[[Sent], bool] = lambda sent: False,
        sent_here: dict[str, list[Sent]] | None = None,
    ) -> list[str]:
        """Stop, wait for what must arrive, and return what is wrong, in words. Empty: nothing is.

        ``sent_here``: what the test sent itself.
        """
        for sender in self.senders:
            sender.process.say("stop")
        for sender in self.senders:
            await sender.task
        outcomes = dict(sent_here or {})
        for sender in self.senders:
            outcomes |= sender.sent
        wanted = {
            stream: {
                n for n, one in enumerate(log) if one.outcome == RETURNED and not may_be_lost(one)
            }
            for stream, log in outcomes.items()
        }
        ways = [way for stream in outcomes for way in self._ways(stream)]
        with contextlib.suppress(TimeoutError):
            await self.until(
                lambda: all(wanted[stream] <= _got(stream, who) for stream, who in ways)
            )
        # What has gone from the table cannot arrive once more.
        faults = []
        with psycopg.connect(self._dsn, autocommit=True) as observer:
            try:
                await self.until(lambda: not _rows(observer))
            except TimeoutError:
                faults.append(f"{_rows(observer)} rows stay in the table")
        for receiver in self.receivers:
            receiver.process.say("end")
        for receiver in self.receivers:
            await receiver.task
        for stream, receivers in ways:
            faults += _judge(stream, receivers, outcomes[stream], wanted[stream])
        for party in (*self.receivers, *self.senders):
            faults += [
                f"logged: {e}" for e in party.logged if e.has_traceback or e.level >= logging.ERROR
            ]
        return faults

    def _ways(self, stream: str) -> list[tuple[str, list[Party]]]:
        """A stream, and those who share its messages; of a group each gets all."""
        _, _, target = stream.partition(":")
        if target == "jobs":
            return [(stream, self.receivers)]
        if target == "room":
            return [(stream, [receiver]) for receiver in self.receivers]
        return [(stream, [self.receivers[int(target.removeprefix("own-"))]])]

    def close(self) -> None:
        for party in (*self.receivers, *self.senders):
            party.task.cancel()
        self._processes.close()


def _got(stream: str, receivers: list[Party]) -> set[int]:
    return {number for receiver in receivers for number in receiver.got.get(stream, ())}


def _judge(stream: str, receivers: list[Party], log: list[Sent], wanted: set[int]) -> list[str]:
    got = [number for receiver in receivers for number in receiver.got.get(stream, ())]
    faults = {
        "lost": sorted(wanted - set(got)),
        "doubled": sorted(number for number, count in Counter(got).items() if count > 1),
        "arrived though refused": [number for number in got if log[number].outcome == REFUSED],
    }
    if len(receivers) == 1:
        # One whose outcome is unknown may have been on its way for long.
        in_order = [number for number in got if log[number].outcome == RETURNED]
        faults["out of order"] = [b for a, b in pairwise(in_order) if b < a]
    return [
        f"{stream}: {what} of {len(log)}: {numbers}" for what, numbers in faults.items() if numbers
    ]


def _rows(observer: psycopg.Connection[Any]) -> int:
    """How many rows there are, but for group messages, which stay until they expire."""
    row = observer.execute(
        "SELECT count(*) FROM pg_layer_message WHERE position('!@' IN address) = 0"
    ).fetchone()
    assert row is not None
    return int(row[0])


@contextlib.asynccontextmanager
async def begin(
    dsn: str, *, receivers: int = 2, senders: int = 1, **options: object
) -> AsyncIterator[Traffic]:
    """Traffic that flows. Application names tell whose backend is whose: pool, listener, sender."""
    traffic = Traffic(dsn)
    try:
        for _ in range(receivers):
            await traffic.serve(
                make_conninfo(dsn, application_name="pool"),
                listen_dsn=make_conninfo(dsn, application_name="listener"),
                **options,
            )
        for _ in range(senders):
            traffic.send(make_conninfo(dsn, application_name="sender"), **options)
        await traffic.flows()
        yield traffic
    finally:
        traffic.close()


def backends(observer: Observer, *names: str) -> set[int]:
    rows = observer.execute(
        "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND application_name = ANY (%s)",
        [list(names)],
    ).fetchall()
    return {pid for (pid,) in rows}


def kill(observer: Observer, *names: str) -> set[int]:
    """Terminate the backends of these application names; returns which."""
    pids = backends(observer, *names)
    observer.execute("SELECT pg_terminate_backend(pid) FROM unnest(%s::int[]) AS pid", [list(pids)])
    return pids


# ---------------------------------------------------------------------- tests


async def test_a_listener_that_is_killed_listens_again_and_missed_nothing(
    migrated_dsn: str, observer: Observer, recovery: Recovery
) -> None:
    async with begin(migrated_dsn) as traffic:
        for _ in range(3):
            killed = kill(observer, "listener")
            assert len(killed) == 2
            with recovery("listener's backend killed (promise: 1 s)"):
                await traffic.flows()
            assert not killed & backends(observer, "listener")
        assert await traffic.end() == []
        assert not sum((sender.failed for sender in traffic.senders), Counter())


@pytest.mark.parametrize("name", ["pool", "sender"])
async def test_backends_that_write_are_killed(
    migrated_dsn: str, observer: Observer, name: str
) -> None:
    async with begin(migrated_dsn) as traffic:
        for _ in range(10):
            await traffic.until(lambda: kill(observer, name))
            await traffic.flows()
        assert await traffic.end() == []


async def test_backends_killed_again_and_again(
    migrated_dsn: str, observer: Observer, recovery: Recovery
) -> None:
    async with begin(migrated_dsn, senders=2) as traffic:
        killed = 0
        deadline = time.monotonic() + KILLING
        while time.monotonic() < deadline:
            killed += len(kill(observer, "listener", "pool", "sender"))
            await asyncio.sleep(random.uniform(*KILLING_EVERY))
        with recovery("all backends killed again and again"):
            await traffic.flows()
        assert await traffic.end() == []
        assert killed > 50


async def test_backends_killed_in_the_middle_of_a_burst(
    migrated_dsn: str, observer: Observer
) -> None:
    """What is sent at once goes in batches, and all of a batch have the same end."""
    sent: dict[str, list[Sent]] = {"here:own-0": [], "here:own-1": []}

    async def one(stream: str, channel: str, number: int) -> Sent:
        outcome = RETURNED
        try:
            await layer.send(channel, {"stream": stream, "number": number, "at": time.monotonic()})
        except LayerUnavailable as error:
            outcome = UNKNOWN if "unknown" in str(error) else REFUSED
        return Sent(outcome, time.monotonic())

    async with (
        begin(migrated_dsn, senders=0) as traffic,
        open_layer(make_conninfo(migrated_dsn, application_name="sender"), **TRAFFIC) as layer,
    ):
        for burst in range(20):
            sending = {
                stream: [
                    asyncio.create_task(one(stream, receiver.channel, number))
                    for number in range(200 * burst, 200 * (burst + 1))
                ]
                for stream, receiver in zip(sent, traffic.receivers, strict=True)
            }
            await asyncio.sleep(random.random() * 0.02)
            kill(observer, "sender", "pool")
            for stream, tasks in sending.items():
                sent[stream] += await asyncio.gather(*tasks)
        assert await traffic.end(sent_here=sent) == []


async def test_jobs_found_at_the_own_address_after_a_loss_come_before_those_in_the_channel(
    migrated_dsn: str, observer: Observer
) -> None:
    """As after a claim whose answer was lost: they are the oldest, and no notification tells of them."""
    listen_dsn = make_conninfo(migrated_dsn, application_name="listener")
    payloads = [msgpack.packb({"number": number}) for number in range(2)]
    for _ in range(5):
        async with open_layer(migrated_dsn, listen_dsn=listen_dsn) as layer:
            await listen(layer)
            own = await layer.new_channel()
            jobs = [asyncio.create_task(layer.receive("jobs")) for _ in payloads]
            await asyncio.wait(jobs, timeout=0.2)  # they are not told of what comes now
            observer.execute(
                "INSERT INTO pg_layer_message (address, xid, boot, channel, payload, expires_at)"
                " SELECT pg_layer_address('asgi', j.channel), pg_current_xact_id(), b.boot, 'jobs',"
                " j.payload, 'infinity'"
                " FROM pg_layer_boot AS b,"
                " unnest(%s::text[], %s::bytea[]) WITH ORDINALITY AS j (channel, payload, number)"
                " ORDER BY j.number",
                [[own, "jobs"], payloads],
            )
            assert kill(observer, "listener")
            assert await asyncio.gather(*jobs) == [{"number": 0}, {"number": 1}]
