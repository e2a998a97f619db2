"""`pg_layer.testing.InMemoryChannelLayer` beside `PostgresChannelLayer`."""

from __future__ import annotations

import asyncio
import os
import textwrap
import threading
from pathlib import Path
from typing import Any

import pytest

from pg_layer import ChannelFull, LayerUnavailable, PostgresChannelLayer
from pg_layer.testing import InMemoryChannelLayer
from tests.integration.test_testing_support import run_suite
from tests.project.commands import TIMEOUT, django, eventually, manage

SQLITE = {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}
MEMORY = "pg_layer.testing.InMemoryChannelLayer"
POSTGRES = "pg_layer.PostgresChannelLayer"

IMPORTS = """
import asyncio
import unittest
import pytest
from asgiref.sync import async_to_sync
from channels.layers import get_channel_layer
from django.core.exceptions import ImproperlyConfigured, SynchronousOnlyOperation
from django.db import connection, transaction
from pg_layer import ChannelFull, InvalidMessage, LayerUnavailable, MessageTooLarge
from pg_layer.testing import Sent, captured_messages

logs = unittest.TestCase().assertLogs

def say(n):
    return {"type": "say", "n": n}

async def received(channel):
    return await asyncio.wait_for(layer.receive(channel), 30)

async def is_empty(channel):
    await layer.send(channel, say("marker"))
    return await received(channel) == say("marker")

layer = get_channel_layer()
"""


def run_on(backend: str, dsn: str, code: str, **config: Any) -> None:
    """Run code in a process of the test project. It must complain of nothing."""
    settings: dict[str, Any] = {"CHANNEL_LAYERS": {"default": {"BACKEND": backend}}}
    settings["CHANNEL_LAYERS"]["default"]["CONFIG"] = config
    if backend == MEMORY:
        settings["DATABASES"] = {"default": SQLITE}
    prepared = f"{IMPORTS}\n{textwrap.dedent(code)}\nasync_to_sync(layer.close)()\n"
    assert django(dsn, f"{prepared}connection.close()", settings=settings) == ""


both = pytest.mark.parametrize("backend", [MEMORY, POSTGRES])


@both
def test_asynchronous_calls_have_the_same_results(backend: str, migrated_dsn: str) -> None:
    run_on(
        backend,
        migrated_dsn,
        """
        async def main():
            assert list(layer.extensions) == ["groups", "flush"]
            one, two = await layer.new_channel(), await layer.new_channel("mine")
            assert one.startswith("specific.") and two.startswith("mine.")
            await layer.group_add("room", one)
            await layer.group_add("room", two)
            await layer.group_add("room", "jobs")
            assert await layer.group_count("room") == 3
            assert sorted(await layer.group_channels("room")) == sorted(["jobs", one, two])

            await layer.group_send("room", say((1, 2)), exclude=two)
            assert await received(one) == say([1, 2])
            assert await received("jobs") == say([1, 2])
            await layer.group_discard("room", "jobs")

            pairs = [("room", say(2)), ("nobody", say(0)), ("room", say(3))]
            assert await layer.group_send_many(pairs, exclude=one) == [True, True, True]
            assert [await received(two), await received(two)] == [say(2), say(3)]

            assert await layer.send_many([("full", say(n)) for n in range(4)]) == [
                True, True, True, False]
            with pytest.raises(ChannelFull, match="Channel full is full: 3 messages wait."):
                await layer.send("full", say(4))
            assert layer.get_capacity("full") == 3

            await layer.group_add("jobs", "full")
            with logs("pg_layer", "WARNING") as logged:
                assert await layer.group_send_many([("jobs", say(5))]) == [False]
            assert "Channel full is full and misses messages of group jobs." in logged.output[0]

            first, second = {"type": "say", "list": [1]}, await received("full")
            await layer.send(two, first)
            first["list"].append(2)
            assert await received(two) == {"type": "say", "list": [1]}

            await layer.flush()
            assert await layer.group_channels("room") == []
            await layer.send("full", say(6))
            assert await received("full") == say(6)

            await layer.send("brief", say(7), expiry=0.001)
            await asyncio.sleep(0.01)
            await layer.send("brief", say(8))
            assert await received("brief") == say(8)

            await layer.send("kept", say(9))
            await layer.group_add("room", one)
            await layer.group_add("room", "kept")
            waiting = asyncio.create_task(layer.receive(one))
            await asyncio.sleep(0)
            await layer.close()
            with pytest.raises(LayerUnavailable, match="The channel layer was closed"):
                await waiting
            assert await layer.group_channels("room") == ["kept"]
            with pytest.raises(TypeError, match="belongs to another process"):
                await layer.receive(one)
            assert await received("kept") == say(9)
            assert (await layer.health())["problems"] == []
            stats = layer.stats()
            assert stats["sent"] >= 6
            assert stats["group_sent"] >= 3
            assert stats["refused_full"] == 2
            await layer.close()

        asyncio.run(main())
        """,
        channel_capacity={"full": 3},
    )


@both
def test_invalid_arguments_raise_the_same_errors(backend: str, migrated_dsn: str) -> None:
    run_on(
        backend,
        migrated_dsn,
        """
        def refuses(error, part, call, *arguments, **options):
            with pytest.raises(error, match=part):
                call(*arguments, **options)

        for calls in (layer.sync, layer):
            def do(name, calls=calls):
                call = getattr(calls, name)
                return call if calls is layer.sync else async_to_sync(call)

            refuses(TypeError, "Channel name must be", do("send"), "a b", say(1))
            refuses(TypeError, "Group name must be", do("group_send"), "a b", say(1))
            refuses(TypeError, "Group name must be", do("group_count"), "a b")
            refuses(InvalidMessage, "set", do("send"), "a", {"type": {1}})
            refuses(InvalidMessage, "Item 1", do("send_many"), [("a", say(1)), ("a", {1: 2})])
            refuses(MessageTooLarge, "2009 bytes long", do("group_send"), "a", {"text": "x" * 2000})
            refuses(ValueError, "expiry must be", do("send"), "a", say(1), expiry=-1)
            refuses(TypeError, "Channel name", do("group_send"), "a", say(1), exclude="a b")
        refuses(TypeError, "prefix", async_to_sync(layer.new_channel), "x" * 61)
        refuses(ImproperlyConfigured, "there is no alias 'nowhere'",
            layer.sync.send, "a", say(1), using="nowhere")
        refuses(ImproperlyConfigured, "unknown option", type(layer), capacities=1)

        async def main():
            with pytest.raises(SynchronousOnlyOperation, match="await layer.group_send"):
                layer.sync.send("a", say(1))

        asyncio.run(main())
        """,
        max_message_size=1000,
    )


@both
def test_sync_in_a_transaction_sends_after_the_commit(backend: str, migrated_dsn: str) -> None:
    run_on(
        backend,
        migrated_dsn,
        """
        channel = async_to_sync(layer.new_channel)()
        with transaction.atomic():
            layer.sync.group_add("room", channel)
            assert layer.sync.group_channels("room") == [channel]
            assert async_to_sync(layer.group_count)("room") == 0
        with pytest.raises(LookupError), transaction.atomic():
            layer.sync.group_discard("room", channel)
            assert layer.sync.group_count("room") == 0
            layer.sync.send(channel, say(0))
            raise LookupError
        assert layer.sync.group_count("room") == 1
        with transaction.atomic():
            layer.sync.group_send("room", say(1))
            with pytest.raises(LookupError), transaction.atomic():
                layer.sync.send(channel, say(0))
                raise LookupError
            layer.sync.group_send("room", say(0), exclude=channel)
            layer.sync.send_many([(channel, say(2))])
            assert layer.sync.send_many([("full", say(n)) for n in range(2)]) == [True, True]
            assert layer.sync.send_many([("full", say(2)), ("full", say(3))]) == [True, False]
            with pytest.raises(ChannelFull):
                layer.sync.send("full", say(4))
        layer.sync.send(channel, say(3))

        async def main():
            assert [await received(channel) for _ in range(3)] == [say(1), say(2), say(3)]
            assert [await received("full") for _ in range(3)] == [say(0), say(1), say(2)]
            assert await is_empty(channel)

        async_to_sync(main)()
        """,
        channel_capacity={"full": 3},
    )


@both
def test_captured_messages_are_the_same(backend: str, migrated_dsn: str) -> None:
    run_on(
        backend,
        migrated_dsn,
        """
        with transaction.atomic():
            layer.sync.send("jobs", say(0))
            with captured_messages(groups=["room"], channels=["jobs"]) as sent:
                layer.sync.group_send("room", say(1), exclude="jobs")
                with pytest.raises(LookupError), transaction.atomic():
                    layer.sync.send("jobs", say(0))
                    raise LookupError
                async_to_sync(layer.send)("jobs", say(2))
                with captured_messages(channels=["jobs"]) as inner:
                    layer.sync.send_many([("jobs", say(3)), ("others", say(0))])
                async_to_sync(layer.group_send)("room", say(4))
                assert sent == []
            assert inner == [Sent(say(3), channel="jobs")]
            assert sent == [
                Sent(say(1), group="room", exclude="jobs"),
                Sent(say(2), channel="jobs"),
                Sent(say(3), channel="jobs"),
                Sent(say(4), group="room"),
            ]
        with captured_messages(groups=["room"], channels=["jobs"]) as sent:
            async_to_sync(layer.group_add)("room", "jobs")
            with transaction.atomic():
                layer.sync.group_send("room", say(5))
        assert sent == [Sent(say(5), group="room"), Sent(say(5), channel="jobs")]
        """,
        symmetric_encryption_keys=["secret"],
    )


@both
def test_captured_messages_are_those_of_an_overridden_deserialize(
    backend: str, migrated_dsn: str
) -> None:
    run_on(
        backend,
        migrated_dsn,
        """
        from channels.layers import channel_layers

        class Own(type(layer)):
            def deserialize(self, payload):
                return super().deserialize(payload) | {"is_own": True}

        layer = Own()
        channel_layers.set("default", layer)
        layer.sync.group_add("room", "jobs")
        with captured_messages(groups=["room"], channels=["jobs"]) as sent:
            layer.sync.send("jobs", say(1))
            layer.sync.group_send("room", say(2))
        assert sent == [
            Sent(say(1) | {"is_own": True}, channel="jobs"),
            Sent(say(2) | {"is_own": True}, group="room"),
            Sent(say(2) | {"is_own": True}, channel="jobs"),
        ]
        """,
    )


@pytest.mark.parametrize("runner", ["django", "pytest"])
def test_suite_on_sqlite_runs_without_set_up(
    tmp_path: Path, migrated_dsn: str, runner: str
) -> None:
    settings = {
        "DATABASES": {"default": SQLITE},
        "CHANNEL_LAYERS": {"default": {"BACKEND": MEMORY}},
    }
    output = run_suite(
        runner,
        tmp_path,
        migrated_dsn,
        """
        class FirstTests(TestCase):
            def setUp(self):
                self.addCleanup(reset_layers)

            def test_1_transaction_does_not_commit(self):
                with captured_messages(groups=["room"]) as sent:
                    get_channel_layer().sync.group_send("room", say(1))
                assert sent == [Sent(say(1), group="room")]

            def test_2_callbacks_are_executed(self):
                layer = get_channel_layer()
                with captured_messages(channels=["jobs"]) as sent:
                    with self.captureOnCommitCallbacks(execute=True):
                        layer.sync.send("jobs", say(2))
                assert sent == [Sent(say(2), channel="jobs")]
                assert async_to_sync(layer.receive)("jobs") == say(2)

            def test_3_leaves_messages(self):
                async_to_sync(get_channel_layer().send)("jobs", say(3))

            def test_4_finds_none(self):
                assert get_channel_layer().stats()["queued_messages"] == 0
        """,
        settings,
    )
    assert output.endswith("status 0"), output
    assert "arning" not in output, output


def test_runserver_on_sqlite_finds_no_problems(migrated_dsn: str) -> None:
    settings = {
        "DATABASES": {"default": SQLITE},
        "CHANNEL_LAYERS": {"default": {"BACKEND": MEMORY}},
    }
    checked = manage(migrated_dsn, "check", settings=settings)
    assert (checked.returncode, "no issues" in checked.stdout) == (0, True), checked.stderr


@pytest.mark.parametrize("debug", [True, False])
def test_check_without_postgresql_is_a_warning_in_debug_mode(
    migrated_dsn: str, debug: bool
) -> None:
    settings = {"DATABASES": {"default": SQLITE}, "DEBUG": debug}
    checked = manage(migrated_dsn, "check", settings=settings)
    assert checked.returncode == (0 if debug else 1)
    id = "W010" if debug else "E002"
    assert f"(pg_layer.{id}) CONFIG['using'] must be an alias of a PostgreSQL" in checked.stderr
    assert ("'pg_layer.testing.InMemoryChannelLayer'" in checked.stderr) == debug


def test_commands_for_a_layer_in_memory_say_that_it_has_no_database(migrated_dsn: str) -> None:
    settings = {"CHANNEL_LAYERS": {"default": {"BACKEND": MEMORY}}}
    for command in ("pg_layer_status", "pg_layer_sweep"):
        result = manage(migrated_dsn, command, settings=settings)
        assert result.returncode == 1
        assert "'default' is not a pg_layer.PostgresChannelLayer" in result.stderr


# ---------------------------------------------------------------------- threads and processes


async def test_receiver_is_woken_by_a_sender_on_another_loop() -> None:
    layer = InMemoryChannelLayer(using="unused")
    channel = await layer.new_channel()
    receiving = asyncio.create_task(layer.receive(channel))
    await asyncio.sleep(0)
    await asyncio.to_thread(asyncio.run, layer.send(channel, {"type": "say"}))
    assert await asyncio.wait_for(receiving, TIMEOUT) == {"type": "say"}


async def test_cancelled_receive_takes_no_message() -> None:
    layer = InMemoryChannelLayer()
    channel = await layer.new_channel()
    receiving = asyncio.create_task(layer.receive(channel))
    await asyncio.sleep(0)
    await layer.send(channel, {"type": "say"})
    receiving.cancel()
    await asyncio.wait({receiving})
    assert await asyncio.wait_for(layer.receive(channel), TIMEOUT) == {"type": "say"}


async def test_each_job_is_received_once_by_competing_threads() -> None:
    layer = InMemoryChannelLayer(capacity=1000)
    results: list[int] = []

    async def work() -> None:
        while (message := await layer.receive("jobs"))["n"] >= 0:
            results.append(message["n"])

    threads = [threading.Thread(target=asyncio.run, args=(work(),)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for n in range(300):
        await layer.send("jobs", {"type": "say", "n": n})
    for _ in threads:
        await layer.send("jobs", {"type": "say", "n": -1})
    for thread in threads:
        await asyncio.to_thread(thread.join, TIMEOUT)
    assert sorted(results) == list(range(300))


async def test_slow_member_misses_messages_and_others_do_not() -> None:
    layer = InMemoryChannelLayer(capacity=3)
    slow, quick = await layer.new_channel(), await layer.new_channel()
    for channel in (slow, quick):
        await layer.group_add("room", channel)
    for n in range(5):
        await layer.group_send("room", {"type": "say", "n": n})
        assert (await layer.receive(quick))["n"] == n
    assert [(await layer.receive(slow))["n"] for _ in range(3)] == [0, 1, 2]
    assert layer.stats()["dropped_full"] == 2


def test_membership_ends_after_group_expiry() -> None:
    layer = InMemoryChannelLayer(group_expiry=0.01)
    asyncio.run(layer.group_add("room", "jobs"))
    eventually(lambda: asyncio.run(layer.group_channels("room")) == [], "membership")


async def test_groups_without_members_are_forgotten() -> None:
    layer = InMemoryChannelLayer(group_expiry=0.01)
    for n in range(10):
        await layer.group_add(f"left-{n}", "jobs")
        await layer.group_discard(f"left-{n}", "jobs")
        await layer.group_add(f"ended-{n}", await layer.new_channel())
    for n in range(10):
        await layer.group_add(f"expired-{n}", "jobs")
    await layer.close()
    assert set(layer._memory._groups) == {f"expired-{n}" for n in range(10)}
    while layer._memory._groups:
        for n in range(10):
            await layer.group_send(f"expired-{n}", {"type": "say"})


def test_child_after_fork_begins_empty() -> None:
    layer = InMemoryChannelLayer()
    channel = asyncio.run(layer.new_channel())
    asyncio.run(layer.send("jobs", {"type": "say"}))
    with layer._memory._lock:  # another thread may hold it
        child = os.fork()
        if not child:
            is_new = layer._memory._lock.acquire(blocking=False)
            is_empty = not layer.stats()["queued_messages"]
            os._exit(0 if is_new and is_empty and not layer._loops.client.owns(channel) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert asyncio.run(layer.receive("jobs")) == {"type": "say"}


def test_unused_channels_are_forgotten() -> None:
    layer = InMemoryChannelLayer(heartbeat=0.001, expiry=0.001)
    for _ in range(10):
        asyncio.run(layer.send(asyncio.run(layer.new_channel()), {"type": "say"}))

    def are_forgotten() -> bool:
        asyncio.run(layer.send("jobs", {"type": "say"}))
        return layer.stats()["channels"] == 1

    eventually(are_forgotten, "unused channels")


async def test_full_channel_and_closed_layer_have_the_errors_of_the_package() -> None:
    layer = InMemoryChannelLayer(capacity=1)
    assert isinstance(layer, PostgresChannelLayer)
    await layer.send("jobs", {"type": "say"})
    with pytest.raises(ChannelFull):
        await layer.send("jobs", {"type": "say"})
    channel = await layer.new_channel()
    receiving = asyncio.create_task(layer.receive(channel))
    await asyncio.sleep(0)
    await layer.close()
    with pytest.raises(LayerUnavailable):
        await receiving
