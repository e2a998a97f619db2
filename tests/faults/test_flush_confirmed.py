"""A flush returns when every live process has applied it, and names those that do not answer."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pg_layer import OutcomeUnknown, PostgresChannelLayer
from pg_layer._state import log_events
from tests.conftest import MakeLayer, Observer
from tests.faults.proxy import Proxy
from tests.logs import event_of
from tests.processes import (
    TIMEOUT,
    Link,
    Process,
    Processes,
    listen,
    new_layer,
    open_layer,
    receive,
    terminate_backends,
    until,
)

LONG = 3600.0  # seconds: the send_timeout of a flush that must not end by itself
FLUSHES = "SELECT count(*) FROM pg_layer_message WHERE kind = 'flush'"


async def hold(link: Link, dsn: str, options: dict[str, object]) -> None:
    """Have a member and a message that nobody receives. Answer with what is left, until None."""
    async with open_layer(dsn, **options) as layer:
        channel = await layer.new_channel()
        await layer.group_add("room", channel)
        await listen(layer)
        link.say((layer._loops.client.address, channel))
        while await link.hear() is not None:
            stats = layer.stats()
            link.say((stats["memberships"], stats["queued_messages"]))


class Holder:
    """A process that has a membership and a message in memory."""

    def __init__(self, process: Process[None], address: str, channel: str) -> None:
        self.process = process
        self.address = address
        self.channel = channel

    async def left(self) -> tuple[int, int]:
        """Return the numbers of memberships and of queued messages, at once."""
        self.process.say("look")
        memberships, messages = await self.process.hear()
        return memberships, messages

    @contextmanager
    def stopped(self) -> Iterator[None]:
        os.kill(self.process.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.process.pid, signal.SIGCONT)


async def start_holder(
    processes: Processes, dsn: str, sender: PostgresChannelLayer, **options: object
) -> Holder:
    process = processes.start(hold, dsn, options)
    holder = Holder(process, *await process.hear())
    await sender.group_send("room", {"type": "test"})
    while await holder.left() != (1, 1):
        pass  # each answer is a round trip to the process
    return holder


async def until_only(observer: Observer, *addresses: str) -> None:
    """Wait until only these clients have not confirmed a flush."""
    query = "SELECT address FROM pg_layer_message WHERE kind = 'flush' ORDER BY address"
    await until(lambda: [address for (address,) in observer.execute(query)] == sorted(addresses))


def pass_time(observer: Observer, holder: Holder) -> None:
    """Make the control message of a process two hours older."""
    updated = observer.execute(
        "UPDATE pg_layer_message SET sent_at = sent_at - interval '2 hours'"
        " WHERE kind = 'flush' AND address = %s",
        (holder.address,),
    )
    assert updated.rowcount == 1


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if event_of(record) == log_events.FLUSH_UNCONFIRMED
    ]


async def test_flush_waits_for_a_process_that_has_not_applied_it(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, observer: Observer
) -> None:
    layer = make_layer(send_timeout=LONG)
    await listen(layer)
    holder = await start_holder(processes, migrated_dsn, layer)
    with holder.stopped():
        flushing = asyncio.create_task(layer.flush())
        await until_only(observer, holder.address)
        assert not flushing.done()
    await asyncio.wait_for(flushing, TIMEOUT)
    assert await holder.left() == (0, 0)
    assert observer.execute(FLUSHES).fetchone() == (0,)


@pytest.mark.parametrize("options", [{}, {"poll_interval": 0.1}], ids=["listening", "polling"])
async def test_flush_by_a_sender_empties_other_processes(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, object],
) -> None:
    """The process that flushes does not listen itself."""
    sender = make_layer(send_timeout=LONG)
    holder = await start_holder(processes, migrated_dsn, sender, **options)
    for _ in range(5):
        await asyncio.wait_for(sender.flush(), TIMEOUT)
        assert await holder.left() == (0, 0)
    assert warnings_of(caplog) == []


async def test_flush_without_an_answer_returns_and_names_the_process(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    layer = make_layer(send_timeout=0.5)
    holder = await start_holder(processes, migrated_dsn, layer)
    with holder.stopped():
        await asyncio.wait_for(layer.flush(), TIMEOUT)
        [text] = warnings_of(caplog)
    assert f"confirmed within 0.5 s by 1 clients: process {holder.process.pid} on" in text
    while await holder.left() != (0, 0):
        pass


async def test_later_flushes_do_not_wait_for_a_silent_process(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    observer: Observer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its control message keeps the time since which it has not answered, until it has."""
    layer = make_layer(send_timeout=LONG)
    await listen(layer)
    holder = await start_holder(processes, migrated_dsn, layer)
    with holder.stopped():
        flushing = asyncio.create_task(layer.flush())
        await until_only(observer, holder.address)
        pass_time(observer, holder)
        await asyncio.wait_for(flushing, TIMEOUT)
        for number in range(2, 5):
            await asyncio.wait_for(layer.flush(), TIMEOUT)
            assert len(warnings_of(caplog)) == number
        assert observer.execute(FLUSHES).fetchone() == (1,)
    await until_only(observer)
    assert await holder.left() == (0, 0)
    with holder.stopped():
        flushing = asyncio.create_task(layer.flush())
        await until_only(observer, holder.address)
        assert not flushing.done()
    await asyncio.wait_for(flushing, TIMEOUT)
    assert len(warnings_of(caplog)) == 4


async def test_flush_does_not_wait_for_a_process_whose_lease_has_expired(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    observer: Observer,
    caplog: pytest.LogCaptureFixture,
) -> None:
    layer = make_layer(send_timeout=LONG)
    holder = await start_holder(processes, migrated_dsn, layer)
    holder.process.kill()
    flushing = asyncio.create_task(layer.flush())
    await until_only(observer, holder.address)
    observer.execute(
        "UPDATE pg_layer_client SET expires_at = clock_timestamp() WHERE address = %s",
        (holder.address,),
    )
    await asyncio.wait_for(flushing, TIMEOUT)
    assert warnings_of(caplog) == []


async def test_flushes_at_once_return_and_all_processes_are_empty(
    migrated_dsn: str,
    make_layer: MakeLayer,
    processes: Processes,
    caplog: pytest.LogCaptureFixture,
) -> None:
    layers = [make_layer(send_timeout=LONG) for _ in range(3)]
    await listen(layers[0])
    await listen(layers[1])
    holder = await start_holder(processes, migrated_dsn, layers[0])
    for _ in range(10):
        flushes = [layer.flush() for layer in layers for _ in range(2)]
        await asyncio.wait_for(asyncio.gather(*flushes), TIMEOUT)
        assert await holder.left() == (0, 0)
    assert warnings_of(caplog) == []


async def test_flush_beside_sends_removes_a_beginning_of_them(make_layer: MakeLayer) -> None:
    """All messages that were sent before it are gone, and none that was sent after it."""
    layer, sender, other = (make_layer(capacity=10**6) for _ in range(3))
    channel = await layer.new_channel()
    await listen(layer)
    sent = 0

    async def keep_sending() -> None:
        nonlocal sent
        while True:
            await sender.send(channel, {"number": sent + 1, "blob": bytes(5000 * (sent % 2))})
            sent += 1

    sending = asyncio.create_task(keep_sending())
    for flushing in (other, layer) * 5:
        goal = sent + 20
        await until(lambda goal=goal: sent >= goal)  # type: ignore[misc]
        before = sent
        await flushing.flush()
        after = sent
        await until(lambda after=after: sent >= after + 20)  # type: ignore[misc]
        last = sent
        numbers = [(await receive(layer, channel))["number"]]
        while numbers[-1] < last:
            numbers.append((await receive(layer, channel))["number"])
        assert before < numbers[0] <= after + 1
        assert numbers == list(range(numbers[0], last + 1))
    sending.cancel()
    await asyncio.wait({sending})


async def test_part_of_another_flush_does_not_confirm_a_flush(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, observer: Observer
) -> None:
    layer = make_layer(send_timeout=LONG)
    holder = await start_holder(processes, migrated_dsn, layer)
    with holder.stopped():
        flushing = asyncio.create_task(layer.flush())
        await until_only(observer, holder.address)
        for _ in range(2):
            await layer.send(holder.channel, {"type": "test"})
        for is_done in (False, False, True):
            part = "SELECT is_done FROM pg_layer_flush('asgi', NULL, 1)"
            assert observer.execute(part).fetchone() == (is_done,)
            assert observer.execute(FLUSHES).fetchone() == (1,)
        assert not flushing.done()
    await asyncio.wait_for(flushing, TIMEOUT)
    assert await holder.left() == (0, 0)


async def test_flush_that_is_cancelled_is_applied(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, observer: Observer
) -> None:
    layer = make_layer(send_timeout=LONG)
    holder = await start_holder(processes, migrated_dsn, layer)
    with holder.stopped():
        flushing = asyncio.create_task(layer.flush())
        await until_only(observer, holder.address)
        flushing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await flushing
    await until_only(observer)
    assert await holder.left() == (0, 0)


async def test_flush_whose_connection_is_lost_while_it_waits_goes_on(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, observer: Observer
) -> None:
    layer = make_layer(send_timeout=LONG)
    await listen(layer)
    holder = await start_holder(processes, migrated_dsn, layer)
    own = f"application_name = 'pg_layer {layer._loops.client.id}'"
    with holder.stopped():
        flushing = asyncio.create_task(layer.flush())
        await until_only(observer, holder.address)
        for _ in range(3):
            terminate_backends(observer, own)
        assert not flushing.done()
    await asyncio.wait_for(flushing, TIMEOUT)
    assert await holder.left() == (0, 0)


async def test_flush_without_a_database_while_it_waits_raises_outcome_unknown(
    migrated_dsn: str, make_layer: MakeLayer, processes: Processes, observer: Observer
) -> None:
    with Proxy(migrated_dsn) as proxy:
        layer = make_layer(dsn=proxy.dsn(connect_timeout=2), send_timeout=3)
        holder = await start_holder(processes, migrated_dsn, layer)
        with holder.stopped():
            flushing = asyncio.create_task(layer.flush())
            await until_only(observer, holder.address)
            proxy.swallow()
            with pytest.raises(OutcomeUnknown, match="unknown whether all processes have"):
                await asyncio.wait_for(flushing, TIMEOUT)
            proxy.let_go()


async def test_flush_without_a_row_of_the_own_client_empties_the_process(
    make_layer: MakeLayer, observer: Observer
) -> None:
    """A test suite has emptied the tables, and the next heartbeat has not come yet."""
    layer = make_layer(send_timeout=LONG)
    channel = await layer.new_channel()
    await layer.group_add("room", channel)
    observer.execute("TRUNCATE pg_layer_client, pg_layer_membership, pg_layer_message")
    assert layer.stats()["memberships"] == 1
    await asyncio.wait_for(layer.flush(), TIMEOUT)
    assert layer.stats()["memberships"] == 0


def test_flush_on_a_new_loop_empties_what_an_earlier_loop_received(migrated_dsn: str) -> None:
    layer = new_layer(migrated_dsn, send_timeout=LONG)
    channels: list[str] = []

    async def begin() -> None:
        channel = await layer.new_channel()
        channels.append(channel)
        await layer.group_add("room", channel)
        await listen(layer)
        await layer.group_send("room", {"number": 1})
        await until(lambda: layer.stats()["queued_messages"] == 1)

    async def go_on() -> None:
        await layer.send(channels[0], {"number": 2})
        assert (await receive(layer, channels[0]))["number"] == 2
        await layer.close()

    asyncio.run(begin())
    asyncio.run(asyncio.wait_for(layer.flush(), TIMEOUT))
    asyncio.run(go_on())


@pytest.mark.parametrize("is_kept", [True, False], ids=["kept", "dropped"])
def test_flush_does_not_wait_for_a_layer_of_the_process_without_a_running_loop(
    migrated_dsn: str, is_kept: bool
) -> None:
    layers = [new_layer(migrated_dsn, send_timeout=LONG)]

    async def use(layer: PostgresChannelLayer) -> None:
        await layer.group_add("room", await layer.new_channel())
        await listen(layer)

    async def flush() -> None:
        other = new_layer(migrated_dsn, send_timeout=LONG)
        await asyncio.wait_for(other.flush(), TIMEOUT)
        await other.close()

    asyncio.run(use(layers[0]))
    if not is_kept:
        layers.clear()
    asyncio.run(flush())
    for layer in layers:
        asyncio.run(layer.close())


@pytest.fixture(autouse=True)
def log_warnings(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "pg_layer")
