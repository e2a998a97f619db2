"""LISTEN shortly after UNLISTEN, or cancelled: the process hears what follows."""

from __future__ import annotations

import asyncio

import pytest

from pg_layer import PostgresChannelLayer
from pg_layer._receive.jobs import JobReaders
from pg_layer._receive.receiver import Receiver
from tests.conftest import MakeLayer, Observer
from tests.processes import listen, receive, until

STEPS = 100  # of the loop, within which a LISTEN begins


def receiver_of(layer: PostgresChannelLayer) -> Receiver:
    """Return the receiver of a layer that receives in this loop."""
    engine = layer._loops.main_engine
    assert engine is not None
    assert engine.owner is not None
    return engine.owner.receiver


def has_idle_reader(jobs: JobReaders) -> bool:
    """Return whether a reader of "jobs" waits for a notification, and does not claim by itself."""
    reader = jobs._readers.get("jobs")
    return reader is not None and not reader.is_claiming and not reader.may_have_more


@pytest.mark.parametrize("steps", range(6))
async def test_receive_during_the_unlisten_of_its_channel_hears_jobs(
    make_layer: MakeLayer, observer: Observer, steps: int
) -> None:
    """A reader returns ``steps`` steps of the loop after the UNLISTEN was requested.

    No heartbeat follows, so a reader that does not hear would not receive the job.
    """
    layer, sender = make_layer(), make_layer()
    await listen(layer)
    jobs = receiver_of(layer).jobs
    for number in range(3):
        await sender.send("jobs", {"number": number})
        assert (await receive(layer, "jobs"))["number"] == number
        await until(
            lambda: observer.execute("SELECT count(*) FROM pg_layer_message").fetchone() == (0,)
        )
        jobs.forget_idle()
        jobs.forget_idle()
        assert not jobs.addresses()
        for _ in range(steps):
            await asyncio.sleep(0)
        receiving = asyncio.create_task(receive(layer, "jobs"))
        # From here on, only a notification can bring a job.
        await until(lambda: has_idle_reader(jobs))
        assert await layer.health()
        await sender.send("jobs", {"number": -1})
        assert (await receiving)["number"] == -1


async def test_reader_with_a_release_ahead_is_not_forgotten(make_layer: MakeLayer) -> None:
    """Otherwise its timer and a new reader would release and claim side by side, out of order."""
    layer, sender = make_layer(), make_layer()
    await listen(layer)
    jobs = receiver_of(layer).jobs
    for number in range(STEPS):
        await sender.send("jobs", {"number": number})
        assert (await receive(layer, "jobs"))["number"] == number
        reader = jobs._readers["jobs"]
        if reader.release is not None:  # unless the timer has fired already
            break
    assert reader.release is not None
    jobs.forget_idle()
    jobs.forget_idle()
    assert jobs._readers["jobs"] is reader
    await until(lambda: reader.release is None and not reader.is_releasing)
    jobs.forget_idle()
    jobs.forget_idle()
    assert not jobs.addresses()


async def test_group_add_after_the_last_group_discard_hears_messages(
    make_layer: MakeLayer, observer: Observer
) -> None:
    """The same holds if the connection is lost between the two calls.

    The next connection listens to the groups that have members then.
    """
    layer, sender = make_layer(), make_layer()
    channel = await layer.new_channel()
    await listen(layer)
    for number in range(20):
        await layer.group_add("room", channel)
        if number % 2:
            observer.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name LIKE 'pg_layer %'"
            )
        await layer.group_discard("room", channel)
        await layer.group_add("room", channel)
        await sender.group_send("room", {"number": number})
        assert (await receive(layer, channel))["number"] == number
        await layer.group_discard("room", channel)


async def test_group_add_cancelled_during_its_listen_keeps_other_groups_hearing(
    make_layer: MakeLayer,
) -> None:
    """No caller fetches the answer to the LISTEN. No heartbeat and no further LISTEN follows."""
    layer, sender = make_layer(), make_layer()
    channel = await layer.new_channel()
    await listen(layer)
    await layer.group_add("room", channel)
    listener = receiver_of(layer)._listener
    assert listener is not None
    for number in range(20):
        session = listener._session
        assert session is not None
        adding = asyncio.create_task(layer.group_add(f"other-{number}", channel))
        for _ in range(STEPS):
            await asyncio.sleep(0)
            if not session.is_reusable:
                break
        else:
            pytest.fail("The LISTEN did not begin.")
        adding.cancel()
        await asyncio.wait([adding])
        await sender.group_send("room", {"number": number})
        assert (await receive(layer, channel))["number"] == number
