"""Channels' own consumers on the layer, driven by Channels' own test communicators."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from pg_layer import PostgresChannelLayer
from tests.conftest import MakeLayer, Observer
from tests.processes import PATIENCE, Link, Processes, open_layer, until
from tests.project.asgi import application
from tests.project.communicators import HttpCommunicator, WebsocketCommunicator
from tests.project.configured import configured

CHATS = ["async/", "sync/", "declared/"]


@pytest.fixture
async def layer(make_layer: MakeLayer) -> AsyncIterator[PostgresChannelLayer]:
    """What `get_channel_layer` returns."""
    layer = make_layer()
    with configured(layer):
        yield layer


@asynccontextmanager
async def connected(path: str) -> AsyncIterator[WebsocketCommunicator]:
    """A browser's connection to one of the project's consumers, closed in the end."""
    socket = WebsocketCommunicator(application, path)
    assert await socket.connect(timeout=PATIENCE) == (True, None)
    yield socket
    await socket.disconnect(timeout=PATIENCE)


async def heard(socket: WebsocketCommunicator, count: int = 1) -> list[str | bytes]:
    return [await socket.receive_from(timeout=PATIENCE) for _ in range(count)]


def members(observer: Observer) -> int:
    [(count,)] = observer.execute("SELECT count(*) FROM pg_layer_membership").fetchall()
    return int(count)


@pytest.mark.parametrize("path", CHATS)
async def test_chat(layer: PostgresChannelLayer, observer: Observer, path: str) -> None:
    async with connected(path) as alice, connected(path) as bob:
        assert members(observer) == 2
        await alice.send_to("hello")
        assert await heard(alice) == await heard(bob) == ["hello"]
        for n in range(20):
            await bob.send_to(f"message {n}")
        assert await heard(alice, 20) == await heard(bob, 20) == [f"message {n}" for n in range(20)]
    assert members(observer) == 0


@pytest.mark.parametrize("path", CHATS)
async def test_who_disconnects_leaves_the_group(
    layer: PostgresChannelLayer, observer: Observer, path: str
) -> None:
    async with connected(path) as stays:
        async with connected(path) as goes:
            await goes.send_to("hello")
            assert await heard(stays) == await heard(goes) == ["hello"]
        assert members(observer) == 1
        await stays.send_to("anybody there?")
        assert await heard(stays) == ["anybody there?"]
    assert members(observer) == 0


async def test_consumers_of_all_kinds_in_one_group(layer: PostgresChannelLayer) -> None:
    async with (
        connected("async/") as first,
        connected("sync/") as second,
        connected("declared/") as third,
    ):
        sockets = (first, second, third)
        for n, speaker in enumerate(sockets):
            await speaker.send_to(f"message {n}")
            for listener in sockets:
                assert await heard(listener) == [f"message {n}"]


async def test_json_consumers(layer: PostgresChannelLayer, observer: Observer) -> None:
    async with connected("json/") as alice, connected("json/") as bob:
        alices, bobs = [
            (await socket.receive_json_from(timeout=PATIENCE))["channel"] for socket in (alice, bob)
        ]
        assert alices != bobs
        # To one of them by the channel's name, to all by the group's.
        await alice.send_json_to(
            {"say": {"text": "psst", "numbers": [1, 2.5, None, True]}, "to": bobs}
        )
        await alice.send_json_to({"say": "hello"})
        assert await bob.receive_json_from(timeout=PATIENCE) == {
            "said": {"text": "psst", "numbers": [1, 2.5, None, True]}
        }
        for socket in (alice, bob):
            assert await socket.receive_json_from(timeout=PATIENCE) == {"said": "hello"}
    assert members(observer) == 0


async def test_an_http_consumer_speaks_in_the_chat(layer: PostgresChannelLayer) -> None:
    async with connected("async/") as socket:
        request = HttpCommunicator(application, "POST", "/post/", body=b"hello from HTTP")
        response = await request.get_response(timeout=PATIENCE)
        assert (response["status"], response["body"]) == (200, b"said")
        assert await heard(socket) == ["hello from HTTP"]


async def test_many_consumers_need_few_connections(
    make_layer: MakeLayer, observer: Observer
) -> None:
    layer = make_layer()
    with configured(layer):
        sockets = [WebsocketCommunicator(application, CHATS[n % 2]) for n in range(60)]
        assert await asyncio.gather(*(socket.connect(timeout=PATIENCE) for socket in sockets)) == [
            (True, None)
        ] * len(sockets)
        assert members(observer) == len(sockets)
        await asyncio.gather(*(socket.send_to(f"{n}") for n, socket in enumerate(sockets)))
        everything = {f"{n}" for n in range(len(sockets))}
        first = await heard(sockets[0], len(sockets))
        assert set(first) == everything
        for socket in sockets[1:]:
            assert await heard(socket, len(sockets)) == first  # in the same order everywhere
        [(count,)] = observer.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name LIKE 'pg_layer%'"
        ).fetchall()
        assert 1 <= count <= 3
        await asyncio.gather(*(socket.disconnect(timeout=PATIENCE) for socket in sockets))
        assert members(observer) == 0


async def chat_elsewhere(link: Link, /, dsn: str, path: str) -> None:
    """A socket in another process: says what it hears, speaks what it is told to, until it is told None."""
    async with open_layer(dsn) as layer:
        with configured(layer):
            async with connected(path) as socket:
                link.say("connected")

                async def tell() -> None:
                    while True:
                        link.say((await heard(socket))[0])

                telling = asyncio.create_task(tell())
                while (text := await link.hear()) is not None:
                    await socket.send_to(text)
                telling.cancel()
                await asyncio.wait({telling})


@pytest.mark.parametrize("path", ["async/", "sync/"])
async def test_chat_across_two_processes(
    layer: PostgresChannelLayer,
    migrated_dsn: str,
    processes: Processes,
    observer: Observer,
    path: str,
) -> None:
    other = processes.start(chat_elsewhere, migrated_dsn, path)
    assert await other.hear() == "connected"
    async with connected(path) as socket:
        for n in range(5):
            await socket.send_to(f"ping {n}")
            assert await heard(socket) == [await other.hear()] == [f"ping {n}"]
            other.say(f"pong {n}")
            assert await heard(socket) == [await other.hear()] == [f"pong {n}"]
        other.say(None)
        await other.result()
        assert members(observer) == 1
        await socket.send_to("gone?")
        assert await heard(socket) == ["gone?"]
    assert members(observer) == 0


async def test_a_process_that_dies_leaves_the_chat(
    make_layer: MakeLayer, migrated_dsn: str, processes: Processes, observer: Observer
) -> None:
    layer = make_layer(lease=1, heartbeat=0.2, sweep_interval=0.2)
    other = processes.start(die_elsewhere, migrated_dsn)
    assert await other.hear() == "connected"
    with configured(layer):
        async with connected("async/") as socket:
            assert members(observer) == 2
            other.kill()
            await until(lambda: members(observer) == 1)
            await socket.send_to("alone")
            assert await heard(socket) == ["alone"]


async def die_elsewhere(link: Link, /, dsn: str) -> None:
    async with open_layer(dsn, lease=1, heartbeat=0.2) as layer:
        with configured(layer):
            async with connected("async/"):
                link.say("connected")
                await link.hear()


async def test_a_job_for_a_worker(layer: PostgresChannelLayer) -> None:
    """A consumer hands work to a worker, which answers on the consumer's own channel."""

    async def worker() -> dict[str, Any]:
        job = await asyncio.wait_for(layer.receive("thumbnails"), PATIENCE)
        await layer.send(
            job["reply_to"], {"type": "chat.message", "content": f"made {job['number']}"}
        )
        return job

    async with connected("json/") as socket:
        channel = (await socket.receive_json_from(timeout=PATIENCE))["channel"]
        working = asyncio.create_task(worker())
        await layer.send(
            "thumbnails", {"type": "thumbnails.make", "number": 7, "reply_to": channel}
        )
        assert await socket.receive_json_from(timeout=PATIENCE) == {"said": "made 7"}
        await working
