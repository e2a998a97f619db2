"""Traffic between processes, and a report of messages that are lost, doubled or out of order.

The tests of faults start it, break something, and check that the report is empty.
"""

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

import psycopg
from psycopg.conninfo import make_conninfo

from pg_layer import LayerUnavailable, PostgresChannelLayer
from pg_layer._state import log_events
from tests.logs import event_of
from tests.processes import TIMEOUT, Link, Process, Processes, listen, open_layer, until

Recovery = Callable[[str], AbstractContextManager[None]]


# No lease is over, no channel is full, no message expires: what does not arrive was lost.
TRAFFIC: dict[str, object] = {"capacity": 1_000_000, "expiry": 3600}

PAUSE = 0.008  # seconds at most between two messages of a stream
SIZES = (10, 10, 10, 10, 6000)  # bytes; the last is too large for a notification


RETURNED, UNKNOWN, REFUSED = "returned", "unknown", "refused"


# ---------------------------------------------------------------------- in the processes


class Logged(NamedTuple):
    """A log record of a process."""

    logger: str
    level: int
    event: str | None
    text: str
    has_traceback: bool


class WarningForwarder(logging.Handler):
    """A handler that sends each warning to the test."""

    def __init__(self, link: Link) -> None:
        super().__init__(logging.WARNING)
        self._link = link

    def emit(self, record: logging.LogRecord) -> None:
        has_traceback = bool(record.exc_info) or "Traceback" in record.getMessage()
        text = self.format(record) if has_traceback else record.getMessage()
        logged = Logged(record.name, record.levelno, event_of(record), text, has_traceback)
        self._link.say(("log", logged))


@contextlib.contextmanager
def forwarding_warnings(link: Link) -> Iterator[None]:
    """Forward all warnings to the test while the block runs."""
    handler = WarningForwarder(link)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)


async def serve(link: Link, /, dsn: str, **options: object) -> None:
    """Receive on a channel, a member of "room" and "jobs", in a process. Report each message."""
    with forwarding_warnings(link):
        async with open_layer(dsn, **options) as layer:
            own, member = await layer.new_channel(), await layer.new_channel()
            await layer.group_add("room", member)
            await listen(layer)

            async def consume(channel: str) -> None:
                while True:
                    message = await layer.receive(channel)
                    link.say(("got", message["stream"], message["number"], message["at"]))

            consumers = [asyncio.create_task(consume(channel)) for channel in (own, member, "jobs")]
            obeying = asyncio.create_task(answer_requests(link, layer))
            link.say(("channel", own))
            done, _ = await asyncio.wait({obeying, *consumers}, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # receive() never raises. If it does, this process fails.
            for consumer in consumers:
                consumer.cancel()
    link.say(("end", None))


async def answer_requests(link: Link, layer: PostgresChannelLayer) -> None:
    """Report ``health()`` whenever the test asks for it, until the test says "end"."""
    while (kind := await hear_without_timeout(link.hear)) != "end":
        if kind == "health":
            link.say(("health", await layer.health()))


async def hear_without_timeout(hear: Callable[[], Awaitable[Any]]) -> Any:
    """Return the next object from the other end, without a time limit."""
    while True:
        with contextlib.suppress(asyncio.TimeoutError):
            return await hear()


class Sent(NamedTuple):
    """The outcome of a send, and when it ended, by the monotonic clock that all processes share."""

    outcome: str
    at: float


async def send(link: Link, /, name: str, dsn: str, channels: list[str], **options: object) -> None:
    """Send numbers to each channel, to "room" and to "jobs", until the test requests the end.

    Runs in a process. Report the outcome of each send.
    """
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
                # A send never hangs. If one does, this process fails.
                await asyncio.wait_for(call(message), TIMEOUT)
            except LayerUnavailable as error:
                outcome = UNKNOWN if "unknown" in str(error) else REFUSED
                link.say(("failed", stream, outcome))
            log.append(Sent(outcome, time.monotonic()))
            await asyncio.sleep(random.random() * PAUSE)

    with forwarding_warnings(link):
        async with open_layer(dsn, **options) as layer:

            async def send_to(channel: str, message: dict[str, Any]) -> None:
                await layer.send(channel, message)

            async def send_to_room(message: dict[str, Any]) -> None:
                await layer.group_send("room", message)

            stopping = asyncio.create_task(hear_without_timeout(link.hear))
            await asyncio.gather(
                *(
                    fill(f"{name}:own-{index}", partial(send_to, channel))
                    for index, channel in enumerate(channels)
                ),
                fill(f"{name}:room", send_to_room),
                fill(f"{name}:jobs", lambda message: send_to("jobs", message)),
            )
    link.say(("end", sent))


# ---------------------------------------------------------------------- in the test


class TrafficProcess:
    """A process of the traffic, and everything that it has reported."""

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
            kind, *rest = await hear_without_timeout(self.process.hear)
            if kind == "got":
                stream, number, at = rest
                self.got.setdefault(stream, []).append(number)
                self.latest[stream] = max(at, self.latest.get(stream, 0.0))
            elif kind == "failed":
                self.failed[rest[0]] += 1
            elif kind == "log":
                self.logged.append(rest[0])
            elif kind == "health":
                self.health.append(rest[0])
            elif kind == "channel":
                self.channel = rest[0]
            else:
                self.sent = rest[0]
                await self.process.result()
                return

    def warnings(self) -> list[Logged]:
        """Return the warnings that the layer in the process has logged."""
        return [entry for entry in self.logged if entry.logger.startswith("pg_layer")]


class Traffic:
    """Senders that send to receivers until ``end()``, which reports what went wrong."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn  # a direct connection, which the test does not break
        self._processes = Processes()
        self.receivers: list[TrafficProcess] = []
        self.senders: list[TrafficProcess] = []

    async def serve(self, dsn: str, **options: object) -> TrafficProcess:
        """Start a receiver. Its options are options of CONFIG."""
        process = TrafficProcess(self._processes.start(serve, dsn, **{**TRAFFIC, **options}))
        self.receivers.append(process)
        await self.until(lambda: process.channel)
        return process

    def send(self, dsn: str, **options: object) -> TrafficProcess:
        """Start a sender to all receivers that have been started."""
        channels = [receiver.channel for receiver in self.receivers]
        name = f"sender-{len(self.senders)}"
        process = TrafficProcess(
            self._processes.start(send, name, dsn, channels, **{**TRAFFIC, **options})
        )
        self.senders.append(process)
        return process

    def _check(self) -> None:
        for process in (*self.receivers, *self.senders):
            if process.task.done():
                process.task.result()

    async def until(self, check: Callable[[], object]) -> None:
        """Return when ``check`` returns true. Raise if a process has failed."""

        def look() -> bool:
            self._check()
            return bool(check())

        await until(look)

    async def arrives_again(self) -> None:
        """Return when something that was sent after this call has arrived in each stream."""
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
        """Stop, and return a description of each problem. An empty list: there is none.

        Wait for all messages that must arrive: their send returned, and ``may_be_lost`` is false.
        ``sent_here``: the outcomes of sends by the test itself.
        """
        for sender in self.senders:
            sender.process.say("stop")
        for sender in self.senders:
            await sender.task
        outcomes = dict(sent_here or {})
        for sender in self.senders:
            outcomes |= sender.sent
        expected = {
            stream: {
                n for n, one in enumerate(log) if one.outcome == RETURNED and not may_be_lost(one)
            }
            for stream, log in outcomes.items()
        }
        streams = [
            stream_and_receivers
            for stream in outcomes
            for stream_and_receivers in self._ways(stream)
        ]
        with contextlib.suppress(TimeoutError):
            await self.until(
                lambda: all(
                    expected[stream] <= _received_numbers(stream, receivers)
                    for stream, receivers in streams
                )
            )
        # A message whose row is deleted cannot arrive again.
        problems = []
        with psycopg.connect(self._dsn, autocommit=True) as observer:
            try:
                await self.until(lambda: not _rows_left(observer))
            except TimeoutError:
                problems.append(f"{_rows_left(observer)} rows stay in the table")
        for receiver in self.receivers:
            receiver.process.say("end")
        for receiver in self.receivers:
            await receiver.task
        for stream, receivers in streams:
            problems += _problems_of(stream, receivers, outcomes[stream], expected[stream])
        for process in (*self.receivers, *self.senders):
            problems += [
                f"logged: {e}"
                for e in process.logged
                if e.has_traceback or e.level >= logging.ERROR
            ]
        return problems

    def _ways(self, stream: str) -> list[tuple[str, list[TrafficProcess]]]:
        """Return the stream with the receivers that share its messages.

        Each receiver of a group message is listed alone, because it gets all messages of the group.
        """
        _, _, target = stream.partition(":")
        if target == "jobs":
            return [(stream, self.receivers)]
        if target == "room":
            return [(stream, [receiver]) for receiver in self.receivers]
        return [(stream, [self.receivers[int(target.removeprefix("own-"))]])]

    def close(self) -> None:
        for process in (*self.receivers, *self.senders):
            process.task.cancel()
        self._processes.close()


def _received_numbers(stream: str, receivers: list[TrafficProcess]) -> set[int]:
    return {number for receiver in receivers for number in receiver.got.get(stream, ())}


def _problems_of(
    stream: str, receivers: list[TrafficProcess], log: list[Sent], expected: set[int]
) -> list[str]:
    got = [number for receiver in receivers for number in receiver.got.get(stream, ())]
    problems = {
        "lost": sorted(expected - set(got)),
        "doubled": sorted(number for number, count in Counter(got).items() if count > 1),
        "arrived though refused": [number for number in got if log[number].outcome == REFUSED],
    }
    if len(receivers) == 1:
        # A message of unknown outcome may have been in flight for a long time.
        in_order = [number for number in got if log[number].outcome == RETURNED]
        problems["out of order"] = [b for a, b in pairwise(in_order) if b < a]
    return [
        f"{stream}: {kind} of {len(log)}: {numbers}"
        for kind, numbers in problems.items()
        if numbers
    ]


def _rows_left(observer: psycopg.Connection[Any]) -> int:
    """Count the rows in the table, without group messages, which stay until they expire."""
    row = observer.execute(
        "SELECT count(*) FROM pg_layer_message WHERE position('!@' IN address) = 0"
    ).fetchone()
    assert row is not None
    return int(row[0])


@contextlib.asynccontextmanager
async def begin(
    dsn: str, *, receivers: int = 2, senders: int = 1, **options: object
) -> AsyncIterator[Traffic]:
    """Run traffic, and yield when messages arrive.

    The application names distinguish the backends of pools, listeners and senders.
    """
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
        await traffic.arrives_again()
        yield traffic
    finally:
        traffic.close()


async def all_listen_again(traffic: Traffic) -> None:
    """Return when all receivers have logged the end of the outage.

    Messages may arrive earlier, because the pool reconnects before the listener.
    """
    await traffic.until(
        lambda: all(
            log_events.DATABASE_BACK in [entry.event for entry in receiver.warnings()]
            for receiver in traffic.receivers
        )
    )


def assert_outage_logged_once(traffic: Traffic) -> None:
    """Assert that each process logged the outage's beginning and end once, and no retry."""
    for process in (*traffic.receivers, *traffic.senders):
        warnings = process.warnings()
        events = [entry.event for entry in warnings]
        beginnings = [at for at, event in enumerate(events) if event == log_events.DATABASE_LOST]
        ends = [at for at, event in enumerate(events) if event == log_events.DATABASE_BACK]
        assert len(beginnings) == len(ends), warnings
        # A sender that was only slowed down may log nothing.
        assert len(ends) == 1 or (process in traffic.senders and not ends), warnings
        assert beginnings <= ends, warnings
        assert len(set(warnings)) == len(warnings), warnings
