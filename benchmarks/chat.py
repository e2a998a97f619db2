"""The chat server of the WebSocket scenario, with a consumer as in the Channels tutorial."""

from __future__ import annotations

import asyncio
import os
import socket
from typing import Any, NamedTuple, cast

import uvicorn
from channels import DEFAULT_CHANNEL_LAYER
from channels.generic.websocket import AsyncWebsocketConsumer
from channels.layers import BaseChannelLayer, channel_layers
from channels.routing import ProtocolTypeRouter, URLRouter
from django.urls import path

from benchmarks.resources import raise_file_limit
from benchmarks.scenarios.base import Receipt, Stage, cancel, until_stopped

_BACKLOG = 1024
#: Seconds that consumers may take to leave their rooms at the end.
_LEAVE_LIMIT = 5


class ServedAt(NamedTuple):
    """What a server announces."""

    port: int
    pid: int


class RoomConsumer(AsyncWebsocketConsumer):
    """A client in a room. Every client of the room, itself included, receives its messages."""

    group: str

    async def connect(self) -> None:
        self.group = f"bench.room.{self.scope['url_route']['kwargs']['room']}"
        await self.channel_layer.group_add(self.group, self.channel_name)
        await self.accept()

    async def disconnect(self, code: int) -> None:
        await self.channel_layer.group_discard(self.group, self.channel_name)

    async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
        await self.channel_layer.group_send(self.group, {"type": "room.said", "text": text_data})

    async def room_said(self, event: dict[str, Any]) -> None:
        await self.send(text_data=event["text"])


async def serve(stage: Stage) -> None:
    """A receiving role: uvicorn on a free loopback port until the measurement is over."""
    raise_file_limit()
    channel_layers.set(
        DEFAULT_CHANNEL_LAYER, cast(BaseChannelLayer, stage.layer)
    )  # get_channel_layer() returns this one
    room = path(
        "<int:room>", cast(Any, RoomConsumer.as_asgi())
    )  # Django's types do not know ASGI applications
    rooms = URLRouter([cast(Any, room)])
    config = uvicorn.Config(
        ProtocolTypeRouter({"websocket": rooms}),
        lifespan="off",
        log_config=None,
        access_log=False,
        ws_per_message_deflate=False,
        timeout_graceful_shutdown=_LEAVE_LIMIT,
    )
    server = uvicorn.Server(config)
    # The socket listens before the server runs, so that no client has to poll.
    with socket.create_server(("127.0.0.1", 0), backlog=_BACKLOG) as listener:
        serving = asyncio.ensure_future(server.serve(sockets=[listener]))
        over = asyncio.ensure_future(until_stopped(stage.board))
        stage.announce(ServedAt(listener.getsockname()[1], os.getpid()))
        try:
            await asyncio.wait([serving, over], return_when=asyncio.FIRST_COMPLETED)
            server.should_exit = True
            await serving
        finally:
            await cancel([serving, over])
    stage.report(Receipt(streams=[]))
