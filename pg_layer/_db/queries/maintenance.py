"""Sweeping (``migrations/0001_8_sweeping.sql``), the status of a layer, and missing tables."""

from __future__ import annotations

import math
import socket
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from psycopg import Connection, errors, pq

from pg_layer._db.queries import all_statements
from pg_layer._db.queries.common import LAZY, Executor, one
from pg_layer._db.queries.receive import BEGIN_SNAPSHOT, COMMIT, QUEUE_USAGE
from pg_layer._db.session import Session
from pg_layer._db.statement import BOOL, FLOAT8, INT4, TEXT, TEXTS, Statement
from pg_layer._state.status import (
    DROPS,
    LOST_FOR,
    MAX_NAMED,
    ChannelStatus,
    ClientStatus,
    GroupStatus,
    Problem,
    Status,
    TableStatus,
)

SWEEP_TIMEOUT = 60.0  # seconds for one part
LOOK_TIMEOUT = 10.0  # seconds for each statement that only reads
FULL_PASS = 3600.0  # seconds between two sweeps that begin with the oldest message
START = 0.0  # the ``after`` of the first part of a full pass
MAX_CHANNELS = 1000  # normal channels whose capacity a status compares with their messages
TABLES = (
    "pg_layer_message",
    "pg_layer_membership",
    "pg_layer_client",
    "pg_layer_lease_clock",
    "pg_layer_boot",
    "pg_layer_low_id",
    "pg_layer_last_sweep",
)

# ---------------------------------------------------------------------- sweeping


class Swept(NamedTuple):
    """The number of rows of each kind that a sweep has removed."""

    messages: int
    memberships: int
    clients: int

    def __bool__(self) -> bool:
        return any(self)


SWEEP = Statement(LAZY + "f.* FROM pg_layer_sweep($1, $2, $3, $4) AS f", TEXT, INT4, BOOL, FLOAT8)


async def sweep(
    session: Executor, prefix: str, limit: int, after: float
) -> tuple[Swept, float] | None:
    """Sweep one part. Return None if another session sweeps the prefix right now.

    ``limit``: the largest number of rows of each kind. ``after``: messages that expired before this
    time (seconds since 1970) stay. Return also the ``after`` of the next part.
    """
    _, *counts, last = await one(session, SWEEP, prefix, limit, True, after)
    return None if None in counts else (Swept(*counts), after if last is None else last)


def sweep_now(
    conn: Connection[Any], prefix: str, limit: int, after: float, interrupt: socket.socket
) -> tuple[Swept, float]:
    """Sweep one part on a synchronous connection, whether or not another session sweeps.

    It takes the same arguments as `sweep`. When ``interrupt`` can be read, the call does not wait
    much longer for the server.
    """
    ((_, *counts, last),) = Session(conn).execute_now(
        SWEEP, prefix, limit, False, after, timeout=SWEEP_TIMEOUT, interrupt=interrupt
    )
    return Swept(*counts), after if last is None else last


DELETE_EXPIRED = Statement(LAZY + "f.* FROM pg_layer_delete_expired($1, $2) AS f", FLOAT8, INT4)


async def delete_expired(session: Executor, after: float, limit: int) -> tuple[int, float | None]:
    """Delete expired messages of all prefixes, at most ``limit``.

    ``after``: as in `sweep`. Return the number of deleted messages and the ``after`` of the next
    part.
    """
    _, count, last = await one(session, DELETE_EXPIRED, after, limit)
    return count, last


SWEEPABLE = Statement("SELECT * FROM pg_layer_sweepable($1)", TEXT)


def sweepable(conn: Connection[Any], prefix: str) -> Swept:
    """Return the number of rows of each kind that a sweep would remove."""
    (counts,) = Session(conn).execute_now(SWEEPABLE, prefix)
    return Swept(*counts)


LAST_SWEEP = Statement(
    """
    SELECT extract(epoch FROM clock_timestamp() - swept_at)::float8
    FROM pg_layer_last_sweep WHERE prefix = $1
    """,
    TEXT,
)
# The rows of a restored database are of another time. Its clients begin after a gap in renewals,
# which the lease clock records.
FIRST_USE = Statement(
    """
    SELECT extract(epoch FROM clock_timestamp() - greatest(
        least(
            (SELECT min(started_at) FROM pg_layer_client
             WHERE address > $1 || '!' AND address < $1 || '"'),
            (SELECT min(sent_at) FROM pg_layer_message
             WHERE address > $1 || '!' AND address < $1 || '"')
        ),
        (SELECT steady_since FROM pg_layer_lease_clock WHERE prefix = $1)
    ))::float8
    """,
    TEXT,
)


def unswept_for(conn: Connection[Any], prefix: str) -> float | None:
    """Return the seconds since a sweep has ended; without one, since the first use of the layer.

    None: the layer has not been used.
    """
    run = partial(Session(conn).execute_now, timeout=LOOK_TIMEOUT)
    sweeps = run(LAST_SWEEP, prefix)
    ((since,),) = sweeps or run(FIRST_USE, prefix)
    return None if since is None else float(since)


# ---------------------------------------------------------------------- status

# Clients that have neither closed nor been swept, those with expired leases first, then those to
# which notifications do not arrive. Whether a lease that has expired is over depends also on the
# renewals of other clients.
CLIENTS = Statement(
    """
    SELECT split_part(address, '!', 2), host, pid, lease,
        (extract(epoch FROM expires_at) - extract(epoch FROM clock_timestamp()))::float8,
        (SELECT count(*) FROM pg_stat_activity
         WHERE datname = current_database()
            AND application_name = 'pg_layer ' || split_part(address, '!', 2)),
        counters -> 'without_notifications' IS DISTINCT FROM '1'::jsonb
    FROM pg_layer_client
    WHERE address > $1 || '!' AND address < $1 || '"' AND ended_at IS NULL AND swept_at IS NULL
    ORDER BY expires_at > clock_timestamp(),
        counters -> 'without_notifications' IS DISTINCT FROM '1'::jsonb, host, pid, address
    LIMIT $2
    """,
    *(TEXT, INT4),
)
CLIENT_COUNTS = Statement(
    """
    SELECT count(*) FILTER (WHERE is_open AND expires_at > clock_timestamp()),
        count(*) FILTER (WHERE is_open AND expires_at <= clock_timestamp()),
        count(*) FILTER (WHERE NOT is_open),
        count(*) FILTER (WHERE is_open AND expires_at > clock_timestamp()
            AND counters -> 'without_notifications' = '1')
    FROM (
        SELECT expires_at, counters, ended_at IS NULL AND swept_at IS NULL AS is_open
        FROM pg_layer_client WHERE address > $1 || '!' AND address < $1 || '"'
    ) AS c
    """,
    TEXT,
)
# Clients that have not closed, and were swept at most $2 seconds ago because their lease was over.
LOST = Statement(
    """
    SELECT host, pid, count(*) OVER () FROM pg_layer_client
    WHERE address > $1 || '!' AND address < $1 || '"' AND ended_at IS NULL
        AND swept_at > clock_timestamp() - make_interval(secs => $2)
    ORDER BY swept_at DESC LIMIT $3
    """,
    *(TEXT, FLOAT8, INT4),
)
# A role that may write the counters may have written values that are not numbers. They are ignored.
COUNTER_SUMS = Statement(
    """
    SELECT d.name, coalesce(sum(
        CASE WHEN c.counters ->> d.name ~ '^[0-9]{1,15}$' THEN (c.counters ->> d.name)::bigint END
    ), 0)::bigint
    FROM unnest($2) AS d (name)
    LEFT JOIN pg_layer_client AS c ON c.address > $1 || '!' AND c.address < $1 || '"'
        AND c.ended_at IS NULL AND c.swept_at IS NULL AND c.expires_at > clock_timestamp()
    GROUP BY d.name ORDER BY array_position($2, d.name)
    """,
    *(TEXT, TEXTS),
)
GROUPS = Statement(
    """
    SELECT group_name, members, addresses, count(*) OVER (), (sum(members) OVER ())::bigint
    FROM pg_layer_group WHERE prefix = $1 ORDER BY members DESC, group_name LIMIT $2
    """,
    *(TEXT, INT4),
)
CHANNELS = Statement(
    """
    SELECT split_part(address, '!:', 2), count(*),
        extract(epoch FROM clock_timestamp() - min(sent_at))::float8,
        count(*) OVER (), (sum(count(*)) OVER ())::bigint
    FROM pg_layer_message
    WHERE address > $1 || '!:' AND address < $1 || '!;' AND expires_at > clock_timestamp()
    GROUP BY address ORDER BY 2 DESC, 1 LIMIT $2
    """,
    *(TEXT, INT4),
)
TABLE_SIZES = Statement(
    """
    SELECT t.name, pg_table_size(s.relid), pg_indexes_size(s.relid), s.n_live_tup, s.n_dead_tup
    FROM unnest($1) AS t (name) JOIN pg_stat_user_tables AS s ON s.relid = t.name::regclass
    ORDER BY array_position($1, t.name)
    """,
    TEXTS,
)
# No function of this module runs it. It makes `prove_tables` report pg_layer_boot if it is missing.
BOOT = Statement("SELECT boot FROM pg_layer_boot")


def status(
    conn: Connection[Any],
    prefix: str,
    top: int,
    *,
    are_named: bool,
    capacity_of: Callable[[str], int],
    role_problems: list[Problem],
) -> Status:
    """Return the status of a prefix at one moment.

    ``top``: the largest number of clients, of groups and of channels to list. ``are_named``: the
    names of connections show the client that they belong to. ``capacity_of``: returns how many
    messages may wait in a channel. ``role_problems``: what `access.role_problems` has returned.
    """
    run = partial(Session(conn).execute_now, timeout=LOOK_TIMEOUT)
    run(BEGIN_SNAPSHOT)
    clients = [
        ClientStatus(
            id=id,
            host=host,
            pid=pid,
            lease_age=None if math.isinf(left) else lease - left,
            lease_left=None if math.isinf(left) else left,
            connections=connections if are_named else None,
            has_notifications=has_notifications,
        )
        for id, host, pid, lease, left, connections, has_notifications in run(CLIENTS, prefix, top)
    ]
    ((live, overdue, ended, polling),) = run(CLIENT_COUNTS, prefix)
    lost = run(LOST, prefix, LOST_FOR, MAX_NAMED)
    groups = run(GROUPS, prefix, top)
    channels = run(CHANNELS, prefix, max(top, MAX_CHANNELS))
    listed = [
        ChannelStatus(name, waiting, oldest_age, capacity_of(name))
        for name, waiting, oldest_age, *_ in channels
    ]
    counted: dict[str, int] = dict(run(COUNTER_SUMS, prefix, (*DROPS, "failing_tasks")))
    failing_tasks = counted.pop("failing_tasks")
    tables = run(TABLE_SIZES, TABLES)
    ((notify_queue_usage,),) = run(QUEUE_USAGE)
    sweeps = run(LAST_SWEEP, prefix)
    ((first_use_age,),) = [(None,)] if sweeps else run(FIRST_USE, prefix)
    run(COMMIT)
    return Status(
        clients=clients,
        live_clients=live,
        overdue_clients=overdue,
        ended_clients=ended,
        lost=[f"process {pid} on {host}" for host, pid, _ in lost],
        lost_clients=lost[0][2] if lost else 0,
        polling_clients=polling,
        groups=[GroupStatus(*group[:3]) for group in groups],
        all_groups=groups[0][3] if groups else 0,
        all_members=groups[0][4] if groups else 0,
        channels=listed[:top],
        all_channels=channels[0][3] if channels else 0,
        all_waiting=channels[0][4] if channels else 0,
        full_channels=[channel for channel in listed if channel.waiting >= channel.capacity],
        drops=counted,
        failing_tasks=failing_tasks,
        tables=[TableStatus(*table) for table in tables],
        notify_queue_usage=notify_queue_usage,
        last_sweep_age=sweeps[0][0] if sweeps else None,
        first_use_age=first_use_age,
        role_problems=role_problems,
    )


def prove_tables(conn: Connection[Any]) -> None:
    """Raise psycopg's error if a statement needs a table or function that is missing.

    The statements are prepared, but not run.
    """
    for statement in all_statements():
        result = conn.pgconn.prepare(b"", statement.sql, statement.oids)
        if result.status != pq.ExecStatus.COMMAND_OK:
            raise errors.error_from_result(result)
