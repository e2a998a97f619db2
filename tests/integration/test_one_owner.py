"""A loop takes over receiving from another thread: all messages arrive, in order."""

from __future__ import annotations

import asyncio
import itertools
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest
from asgiref.sync import async_to_sync
from django.apps import apps
from django.db import connections

from pg_layer import PostgresChannelLayer
from pg_layer._groups.changes import OwnChanges
from pg_layer._send.operations import Change
from tests.integration.test_django import postgres
from tests.processes import TIMEOUT, UNHURRIED, Message, open_layer, receive
from tests.project.configured import configured

LAYERS = {0: 12, 100: 12, 1500: 4}  # layers, by the number of messages that wait at first
ROUNDS = 2
PAUSES = [0.003 * step for step in range(12)]  # seconds
LIVE = 200  # messages that are sent while a loop receives
CAPACITY = 10_000
THREADS = 4
NO_SESSION: Any = None
LARGE = bytes(9000)  # does not fit into a notification


@pytest.fixture
def django_dsn(migrated_dsn: str) -> Iterator[str]:
    """The test's database, which is also Django's default."""
    settings = {"DATABASES": {"default": postgres(migrated_dsn)}, "SECRET_KEY": "x"}
    with configured(PostgresChannelLayer(), **settings):
        apps.populate([])
        yield migrated_dsn


@pytest.fixture(autouse=True)
def switching() -> Iterator[None]:
    """Switch threads often, so that each may be interrupted anywhere."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(0.0001)
    yield
    sys.setswitchinterval(before)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2 + THREADS) as pool:
        yield pool


def group_add(layer: PostgresChannelLayer, group: str, channel: str) -> None:
    """Call `layer.sync.group_add`, and close the thread's connection to the database."""
    try:
        layer.sync.group_add(group, channel)
    finally:
        connections.close_all()


class Writer:
    """A thread that sends numbers in order: in batches, alone, and in large messages.

    It sends them to the channel; after `join`, alternately to the group.
    """

    def __init__(self, dsn: str, group: str, channel: str, numbers: range, before: int) -> None:
        self._dsn = dsn
        self._group = group
        self._channel = channel
        self._numbers = numbers
        self._before = before
        self._has_sent_before = threading.Event()
        self._has_joined = threading.Event()

    def run(self) -> None:
        asyncio.run(self._write())

    def wait(self) -> None:
        """Wait until all messages are sent that wait in the channel before it joins."""
        assert self._has_sent_before.wait(TIMEOUT)

    def join(self) -> None:
        """Note that the channel is a member now."""
        self._has_joined.set()

    async def _write(self) -> None:
        async with open_layer(self._dsn, capacity=CAPACITY) as layer:
            first = self._numbers[: self._before]
            await layer.send_many((self._channel, message(number)) for number in first)
            self._has_sent_before.set()
            for start in range(self._before, len(self._numbers), 10):
                *together, one, other = map(message, self._numbers[start : start + 10])
                if self._has_joined.is_set() and start % 20:
                    await layer.group_send_many((self._group, each) for each in together)
                    await layer.group_send(self._group, one)
                else:
                    await layer.send_many((self._channel, each) for each in together)
                    await layer.send(self._channel, one)
                await layer.send(self._channel, other)


def message(number: int) -> Message:
    return {"number": number, "blob": LARGE if number % 2 else b""}


async def received(
    layer: PostgresChannelLayer, channel: str, count: int, others: Sequence[Future[None]]
) -> list[int]:
    """Return the numbers of the next messages, after the calls of other threads have ended."""
    numbers: list[int] = []
    with suppress(asyncio.TimeoutError):  # the numbers show which messages are missing
        while len(numbers) < count:
            numbers.append((await receive(layer, channel))["number"])
    await asyncio.gather(*map(asyncio.wrap_future, others))
    return numbers


def send_elsewhere(layer: PostgresChannelLayer, number: int) -> None:
    """Send a few messages that are not received, one after the other. Called in a thread."""
    for _ in range(20):
        async_to_sync(layer.send)(f"jobs-{number}", {"type": "job", "blob": LARGE})


def disorder(numbers: list[int]) -> list[tuple[int, int]]:
    """Return some adjacent numbers that are out of order, or between which numbers are missing."""
    pairs = itertools.pairwise(numbers)
    return [(one, other) for one, other in pairs if other != one + 1][:5]


@pytest.mark.slow
@pytest.mark.parametrize("before", [0, 100, 1500])
def test_receive_after_a_takeover_from_a_thread_gets_all_messages_in_order(
    django_dsn: str, pool: ThreadPoolExecutor, before: int
) -> None:
    """``layer.sync.group_add`` in a thread begins to receive, on the background loop.

    Messages wait in the channel then, and another layer sends more. An event loop receives at
    once, and later another one. Each time all messages arrive once and in order, and none
    arrives again.
    """
    count = before + LIVE
    for turn in range(LAYERS[before]):
        layer = PostgresChannelLayer(capacity=CAPACITY, **UNHURRIED)
        try:
            channel = asyncio.run(layer.new_channel())
            for round_ in range(ROUNDS):
                group = f"room-{round_}"
                numbers = range(round_ * count, (round_ + 1) * count)
                writer = Writer(django_dsn, group, channel, numbers, before)
                writing = pool.submit(writer.run)
                writer.wait()
                pool.submit(group_add, layer, group, channel).result()
                writer.join()
                others = [pool.submit(send_elsewhere, layer, other) for other in range(THREADS)]
                time.sleep(PAUSES[turn % len(PAUSES)])  # the thread is then at any step
                found = asyncio.run(received(layer, channel, count, [writing, *others]))
                assert found == list(numbers), f"layer {turn}, {round_}: {disorder(found)}"
        finally:
            asyncio.run(layer.close())


async def test_state_of_receiving_touched_on_a_foreign_loop_fails_an_assertion(
    migrated_dsn: str,
) -> None:
    """Each method by which a call enters that state asserts the thread."""
    async with open_layer(migrated_dsn, **UNHURRIED) as layer:
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        main = layer._loops.main_engine
        assert main is not None
        owner = main.owner
        assert owner is not None
        receiver = owner.receiver
        changes = OwnChanges(
            layer._loops.client, owner._writer, receiver, owner.lease.wait, lambda: False
        )
        entries = [
            receiver.search_marked(),
            owner.lease.renew_on(NO_SESSION, None),
            changes.write([Change("room", channel, False, CAPACITY)], TIMEOUT),
        ]
        for entry in entries:
            with pytest.raises(AssertionError):
                await asyncio.to_thread(asyncio.run, entry)
        for enter in (receiver.dispatch, lambda: receiver.hear("x", "P x")):
            with pytest.raises(AssertionError):
                await asyncio.to_thread(enter)
