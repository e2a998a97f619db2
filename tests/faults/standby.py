"""A standby that streams from a primary, lags behind it and is promoted."""

from __future__ import annotations

import asyncio

from psycopg.conninfo import conninfo_to_dict, make_conninfo

from devtools.postgres import PostgresServer
from tests.faults.proxy import Proxy
from tests.processes import until


def writable(database: str, *ports: int) -> str:
    """Return the DSN of the database at the first of these local ports that accepts writes."""
    return make_conninfo(
        database,
        host=",".join("127.0.0.1" for _ in ports),
        port=",".join(str(port) for port in ports),
        target_session_attrs="read-write",
    )


def port_of(proxy: Proxy) -> int:
    """Return the local port of the proxy."""
    return int(str(conninfo_to_dict(proxy.dsn())["port"]))


async def caught_up(primary: PostgresServer, standby: PostgresServer) -> None:
    """Return when the standby has replayed all WAL that the primary has written so far."""
    ((lsn,),) = primary.execute("SELECT pg_logical_emit_message(true, 'test', 'so far')")
    await until(lambda: standby.execute(f"SELECT pg_last_wal_replay_lsn() >= '{lsn}'") == [(True,)])


async def cut_off(standby: PostgresServer) -> None:
    """Stop the replication: the standby lags behind from here on.

    A pause of the replay or ``recovery_min_apply_delay`` does not suffice. A promotion ends both,
    and the standby first replays all WAL that it has received.
    """
    standby.execute("ALTER SYSTEM SET primary_conninfo = ''")
    standby.execute("SELECT pg_reload_conf()")
    await until(lambda: standby.execute("SELECT count(*) FROM pg_stat_wal_receiver") == [(0,)])


async def fail_over(primary: PostgresServer, standby: PostgresServer) -> None:
    """Crash the primary for good, and promote the standby."""
    await asyncio.to_thread(primary.stop, "immediate")
    assert await asyncio.to_thread(standby.execute, "SELECT pg_promote()") == [(True,)]
