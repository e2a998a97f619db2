"""The ASGI application of the test project."""

from __future__ import annotations

import os
from typing import Any

import django
from channels.routing import ChannelNameRouter, ProtocolTypeRouter, URLRouter
from django.urls import path

from tests.project import consumers

if "DJANGO_SETTINGS_MODULE" in os.environ:  # a server; tests that import this have no settings
    django.setup()  # configures the log

# Channels routes applications by Django's `path`, whose types know of views only.
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
