"""Event loops that end while the layer is at work on them."""

from __future__ import annotations

import asyncio
import threading

from pg_layer import PostgresChannelLayer
from tests.faults.proxy import Proxy
from tests.processes import PATIENCE, UNHURRIED, until

CALLS = 8  # more than the connections that are open before


def test_loop_that_ends_while_its_engine_stops_ends_although_the_pool_connects(migrated_dsn: str) -> None:
    """The database does not answer: cancelled calls hold their connections, and the pool makes another one.

    A takeover by another loop stops the engine, and waits for those connections. Now the loop ends, and
    asyncio cancels that wait and the pool's worker. The worker of psycopg's pool takes the cancellation for a
    connection that failed, and waits for its next task: it ends only when the pool is closed.
    """
    with Proxy(migrated_dsn) as proxy:
        layer = PostgresChannelLayer(
            dsn=proxy.dsn(connect_timeout=2), pool_max_size=20, send_timeout=2 * PATIENCE, **UNHURRIED
        )

        async def main() -> None:
            await layer.group_add("room", await layer.new_channel())
            engine = layer._loops.home
            assert engine is not None
            connections = engine.connections
            proxy.swallow()
            calls = [asyncio.create_task(layer.group_count("room")) for _ in range(CALLS)]
            await until(lambda: connections._pool.get_stats().get("requests_waiting"))
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)
            stopping = asyncio.create_task(engine.stop())
            await until(lambda: connections._is_closed)
            assert not stopping.done()

        thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
        thread.start()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        proxy.let_go(revive=False)
        asyncio.run(layer.close())
