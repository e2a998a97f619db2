"""The URLs of pages and WebSockets. A room has the same name in both."""

from __future__ import annotations

from typing import Any

from django.urls import re_path

from example.consumers import ChatConsumer
from example.views import chat

# The name of a room consists of characters that are allowed in the name of a group.
ROOM = r"(?P<room>[A-Za-z0-9_-]{1,40})"

urlpatterns = [
    re_path(r"^$", chat, {"room": "lobby"}),
    re_path(rf"^{ROOM}/$", chat),
]

websocket_urlpatterns: list[Any] = [
    re_path(rf"^ws/{ROOM}/$", ChatConsumer.as_asgi()),  # type: ignore[arg-type]  # not a view
]
