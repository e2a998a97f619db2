"""The fencing token of a client, as the database knows it. See `Client.fence`."""

from __future__ import annotations

from pg_layer._db.queries import receive as queries
from pg_layer._db.session import Session
from pg_layer._state.client import Client


async def raise_fence(session: Session, client: Client) -> None:
    """Make the server refuse the client's statements that were given up.

    If there are none, no query runs. Call this before the next statement that carries the fence,
    and before a read that must find all effects of the last ones.
    """
    if not client.is_fence_raised:
        fence = client.fence
        await queries.raise_fence(session, client.address, fence)
        client.fence_raised(fence)
