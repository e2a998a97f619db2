"""The ASGI application: pages through Django, WebSockets through Channels."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from typing import Any

from channels.layers import get_channel_layer
from channels.routing import ProtocolTypeRouter, URLRouter
from channels.security.websocket import AllowedHostsOriginValidator
from django.core.asgi import get_asgi_application

from pg_layer import PostgresChannelLayer

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "example.settings")
pages = get_asgi_application()

# This import needs the apps, which get_asgi_application() has loaded.
from example.urls import websocket_urlpatterns  # noqa: E402


async def lifespan(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """Close the layer when the server stops, so that its lease and connections end at once."""
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()
    layer = get_channel_layer()
    if isinstance(layer, PostgresChannelLayer):
        await layer.close()
    await send({"type": "lifespan.shutdown.complete"})


application = ProtocolTypeRouter(
    {
        "http": pages,
        "websocket": AllowedHostsOriginValidator(URLRouter(websocket_urlpatterns)),
        "lifespan": lifespan,
    }
)
