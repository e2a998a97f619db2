"""A process whose many membership rows were lost: the time until they are written again."""

from __future__ import annotations

import asyncio
import time
from multiprocessing.connection import Connection

import psycopg

from benchmarks.compared.base import Reading, Result, Room, Setting, percentiles
from benchmarks.compared.children import CAPACITY, Children
from pg_layer import PostgresChannelLayer

#: Messages a second to another process meanwhile.
RATE = 50
_CHANNELS = 1_000
_HEARTBEAT = 1.0
_TICK = 0.2
_TIMEOUT = 120.0


def restore(setting: Setting, *, memberships: int) -> Result:
    """Measure the seconds until the last row, and the latency of another process meanwhile.

    A deletion of the rows simulates a failover. Delivery to the process does not depend on the
    rows.
    """
    with Children() as children, psycopg.connect(setting.dsn, autocommit=True) as observer:
        room = Room(children, observer, setting.dsn, 1)
        holder = children.start(_hold, setting.dsn, memberships // _CHANNELS)
        holder.receive()
        room.ages()
        room.sender.send(("pace", room.channels[0], setting.seconds + _TIMEOUT, RATE))
        own = "group_name LIKE 'restored.%'"
        observer.execute(f"DELETE FROM pg_layer_membership WHERE {own}".encode())
        observer.execute("DELETE FROM pg_layer_boot")
        count = f"SELECT count(*) FROM pg_layer_membership WHERE {own}".encode()
        began = ended = None
        deadline = time.monotonic() + _TIMEOUT
        while ended is None and time.monotonic() < deadline:
            time.sleep(_TICK)
            row = observer.execute(count).fetchone()
            rows = row[0] if row else 0
            began = began or (time.monotonic() if rows else None)
            ended = time.monotonic() if rows == memberships else None
        if began is None or ended is None:
            return Result([Reading("FAULT", "memberships missing", memberships - rows)])
        connections = observer.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
        ).fetchone()
        return Result(
            [
                Reading("written again", "seconds", ended - began + _TICK),
                *percentiles("others' messages meanwhile", room.ages(), 50, 99),
                Reading("all processes", "connections", connections[0] if connections else 0),
            ]
        )


async def _hold(pipe: Connection, dsn: str, groups: int) -> None:
    layer = PostgresChannelLayer(dsn=dsn, capacity=CAPACITY, heartbeat=_HEARTBEAT)
    channels = [await layer.new_channel() for _ in range(_CHANNELS)]
    for group in range(groups):
        await asyncio.gather(
            *(layer.group_add(f"restored.{group}", channel) for channel in channels)
        )
    pipe.send("ready")
    await asyncio.to_thread(pipe.recv)
