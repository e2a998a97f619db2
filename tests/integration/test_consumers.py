"""Channels' own consumers on the layer, driven by Channels' own test communicators."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pg_layer import PostgresChannelLayer
from tests.conftest import MakeLayer, Observer
from tests.processes import TIMEOUT, Link, Processes, open_layer, until
from tests.project.asgi import application
from tests.project.communicators import HttpCommunicator, WebsocketCommunicator
from tests.project.configured import configured

CHATS = ["async/", "sync/", "declared/"]


@pytest.fixture
async def layer(make_layer: MakeLayer) -> AsyncIterator[PostgresChannelLayer]:
    """Yield the layer that ``get_channel_layer()`` returns during the test."""
    layer = make_layer()
    with configured(layer):
        yield layer


@asynccontextmanager
async def connected(path: str) -> AsyncIterator[WebsocketCommunicator]:
    """Connect a browser to a consumer of the test project. Disconnect at the end."""
    socket = WebsocketCommunicator(application, path)
    assert await socket.connect(timeout=TIMEOUT) == (True, None)
    yield socket
    await socket.disconnect(timeout=TIMEOUT)


async def receive_texts(socket: WebsocketCommunicator, count: int = 1) -> list[str | bytes]:
    """Receive ``count`` texts from the consumer."""
    return [await socket.receive_from(timeout=TIMEOUT) for _ in range(count)]


def count_members(observer: Observer) -> int:
    """Count the memberships of all groups in the table."""
    [(count,)] = observer.execute("SELECT count(*) FROM pg_layer_membership").fetchall()
    return int(count)


@pytest.mark.parametrize("path", CHATS)
async def test_chat_consumers_receive_each_others_messages_in_order(
    layer: PostgresChannelLayer, observer: Observer, path: str
) -> None:
    async with connected(path) as alice, connected(path) as bob:
        assert count_members(observer) == 2
        await alice.send_to("hello")
        assert await receive_texts(alice) == await receive_texts(bob) == ["hello"]
        for n in range(20):
            await bob.send_to(f"message {n}")
        assert (
            await receive_texts(alice, 20)
            == await receive_texts(bob, 20)
            == [f"message {n}" for n in range(20)]
        )
    assert count_members(observer) == 0


@pytest.mark.parametrize("path", CHATS)
async def test_consumer_disconnecting_leaves_its_group(
    layer: PostgresChannelLayer, observer: Observer, path: str
) -> None:
    async with connected(path) as stays:
        async with connected(path) as goes:
            await goes.send_to("hello")
            assert await receive_texts(stays) == await receive_texts(goes) == ["hello"]
        assert count_members(observer) == 1
        await stays.send_to("anybody there?")
        assert await receive_texts(stays) == ["anybody there?"]
    assert count_members(observer) == 0


async def test_consumers_of_all_kinds_in_one_group_receive_every_message(
    layer: PostgresChannelLayer,
) -> None:
    async with (
        connected("async/") as first,
        connected("sync/") as second,
        connected("declared/") as third,
    ):
        sockets = (first, second, third)
        for n, speaker in enumerate(sockets):
            await speaker.send_to(f"message {n}")
            for listener in sockets:
                assert await receive_texts(listener) == [f"message {n}"]


async def test_json_consumers_receive_direct_and_group_messages(
    layer: PostgresChannelLayer, observer: Observer
) -> None:
    async with connected("json/") as alice, connected("json/") as bob:
        alices, bobs = [
            (await socket.receive_json_from(timeout=TIMEOUT))["channel"] for socket in (alice, bob)
        ]
        assert alices != bobs
        # The name of a channel addresses one consumer, the name of a group addresses all.
        await alice.send_json_to(
            {"say": {"text": "psst", "numbers": [1, 2.5, None, True]}, "to": bobs}
        )
        await alice.send_json_to({"say": "hello"})
        assert await bob.receive_json_from(timeout=TIMEOUT) == {
            "said": {"text": "psst", "numbers": [1, 2.5, None, True]}
        }
        for socket in (alice, bob):
            assert await socket.receive_json_from(timeout=TIMEOUT) == {"said": "hello"}
    assert count_members(observer) == 0


async def test_http_consumer_sends_to_the_group(layer: PostgresChannelLayer) -> None:
    async with connected("async/") as socket:
        request = HttpCommunicator(application, "POST", "/post/", body=b"hello from HTTP")
        response = await request.get_response(timeout=TIMEOUT)
        assert (response["status"], response["body"]) == (200, b"said")
        assert await receive_texts(socket) == ["hello from HTTP"]


async def test_sixty_consumers_share_at_most_three_connections(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer()
    with configured(layer):
        sockets = [WebsocketCommunicator(application, CHATS[n % 2]) for n in range(60)]
        assert await asyncio.gather(*(socket.connect(timeout=TIMEOUT) for socket in sockets)) == [
            (True, None)
        ] * len(sockets)
        assert count_members(observer) == len(sockets)
        await asyncio.gather(*(socket.send_to(f"{n}") for n, socket in enumerate(sockets)))
        everything = {f"{n}" for n in range(len(sockets))}
        first = await receive_texts(sockets[0], len(sockets))
        assert set(first) == everything
        for socket in sockets[1:]:
            assert (
                await receive_texts(socket, len(sockets)) == first
            )  # in the same order everywhere
        [(count,)] = observer.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name LIKE 'pg_layer%'"
        ).fetchall()
        assert 1 <= count <= 3
        await asyncio.gather(*(socket.disconnect(timeout=TIMEOUT) for socket in sockets))
        assert count_members(observer) == 0


async def chat_in_other_process(link: Link, /, dsn: str, path: str) -> None:
    """Connect a socket in another process.

    Report each text that arrives. Send each text that the test sends, until it sends None.
    """
    async with open_layer(dsn) as layer:
        with configured(layer):
            async with connected(path) as socket:
                link.say("connected")

                async def report() -> None:
                    while True:
                        link.say((await receive_texts(socket))[0])

                reporting = asyncio.create_task(report())
                while (text := await link.hear()) is not None:
                    await socket.send_to(text)
                reporting.cancel()
                await asyncio.wait({reporting})


@pytest.mark.parametrize("path", ["async/", "sync/"])
async def test_chat_consumers_in_two_processes_receive_each_others_messages(
    layer: PostgresChannelLayer,
    migrated_dsn: str,
    processes: Processes,
    observer: Observer,
    path: str,
) -> None:
    other = processes.start(chat_in_other_process, migrated_dsn, path)
    assert await other.hear() == "connected"
    async with connected(path) as socket:
        for n in range(5):
            await socket.send_to(f"ping {n}")
            assert await receive_texts(socket) == [await other.hear()] == [f"ping {n}"]
            other.say(f"pong {n}")
            assert await receive_texts(socket) == [await other.hear()] == [f"pong {n}"]
        other.say(None)
        await other.result()
        assert count_members(observer) == 1
        await socket.send_to("gone?")
        assert await receive_texts(socket) == ["gone?"]
    assert count_members(observer) == 0


async def test_consumers_of_a_killed_process_leave_the_group_after_its_lease(
    make_layer: MakeLayer, migrated_dsn: str, processes: Processes, observer: Observer
) -> None:
    layer = make_layer(lease=1, heartbeat=0.2, sweep_interval=0.2)
    other = processes.start(hold_socket_open, migrated_dsn)
    assert await other.hear() == "connected"
    with configured(layer):
        async with connected("async/") as socket:
            assert count_members(observer) == 2
            other.kill()
            await until(lambda: count_members(observer) == 1)
            await socket.send_to("alone")
            assert await receive_texts(socket) == ["alone"]


async def hold_socket_open(link: Link, /, dsn: str) -> None:
    """Keep a socket in the group until the process is killed. Runs in a process."""
    async with open_layer(dsn, lease=1, heartbeat=0.2) as layer:
        with configured(layer):
            async with connected("async/"):
                link.say("connected")
                await link.hear()


async def test_worker_replies_to_the_channel_of_a_consumer(layer: PostgresChannelLayer) -> None:
    """A consumer sends a job. The worker replies on the consumer's own channel."""

    async def worker() -> dict[str, Any]:
        job = await asyncio.wait_for(layer.receive("thumbnails"), TIMEOUT)
        await layer.send(
            job["reply_to"], {"type": "chat.message", "content": f"made {job['number']}"}
        )
        return job

    async with connected("json/") as socket:
        channel = (await socket.receive_json_from(timeout=TIMEOUT))["channel"]
        working = asyncio.create_task(worker())
        await layer.send(
            "thumbnails", {"type": "thumbnails.make", "number": 7, "reply_to": channel}
        )
        assert await socket.receive_json_from(timeout=TIMEOUT) == {"said": "made 7"}
        await working
