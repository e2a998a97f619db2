"""The ASGI application of the test project."""

from __future__ import annotations

from typing import Any

from channels.routing import ChannelNameRouter, ProtocolTypeRouter, URLRouter
from django.urls import path

from tests.project import consumers

# Channels routes applications with Django's `path`, whose types only allow views.
route: Any = path

application = ProtocolTypeRouter(
    {
        "websocket": URLRouter(
            [
                route("async/", consumers.AsyncChat.as_asgi()),
                route("sync/", consumers.SyncChat.as_asgi()),
                route("declared/", consumers.DeclaredGroups.as_asgi()),
                route("leaving/", consumers.Leaving.as_asgi()),
                route("leaving-sync/", consumers.SyncLeaving.as_asgi()),
                route("json/", consumers.JsonChat.as_asgi()),
            ]
        ),
        "http": URLRouter([route("post/", consumers.Post.as_asgi())]),
        "channel": ChannelNameRouter({"thumbnails": consumers.Thumbnails.as_asgi()}),
    }
)
