from channels.routing import URLRouter
from channels_broadcast.routing import websocket_urlpatterns

application = URLRouter(websocket_urlpatterns)
