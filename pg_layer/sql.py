"""The SQL of the layer, and the only module with any.

The functions it calls are defined, and explained, in the migrations' SQL.

The layer's own writes commit with ``synchronous_commit = off``: a crash of the server may undo the last
moments, and no NOTIFY's commit waits for the disk. The setting is made within the statement's transaction,
so that it works through a pooler and leaves the session as it was. Taking jobs is the exception: undone, it
would hand them out twice.
"""

from __future__ import annotations

import functools

from pg_layer.statement import (
    BOOL,
    BYTEA,
    BYTEAS,
    FLOAT8,
    FLOAT8S,
    FLOAT8S_OR_NULL,
    INT4,
    INT4S,
    INT8,
    INT8S,
    INT8S_OR_NULL,
    TEXT,
    TEXTS,
    Statement,
)

_LAZY = "set_config('synchronous_commit', 'off', true)"
_LAZY_CALL = "SELECT " + _LAZY + ", "
_LAZILY = _LAZY_CALL + "f.* FROM "

SEND_ONE = Statement(
    _LAZY_CALL + "pg_layer_send_one($1, $2, $3, $4, $5, $6)", TEXT, TEXT, BYTEA, FLOAT8, INT4, INT8
)
SEND_BATCH = Statement(
    _LAZILY + "pg_layer_send_batch($1, $2, $3, $4, $5, $6, $7) AS f",
    *(TEXT, TEXTS, BYTEAS, FLOAT8S, INT4S, TEXTS, INT8S),
)
GROUP_SEND_ONE = Statement(
    _LAZY_CALL + "pg_layer_group_send_one($1, $2, $3, $4, $5)", TEXT, TEXT, BYTEA, FLOAT8, TEXT
)
GROUP_SEND_BATCH = Statement(
    _LAZILY + "pg_layer_group_send_batch($1, $2, $3, $4, $5) AS f", TEXT, TEXTS, BYTEAS, FLOAT8S, TEXTS
)
GROUP_CHANNELS = Statement("SELECT pg_layer_group_channels($1, $2)", TEXT, TEXT)
GROUP_COUNT = Statement("SELECT count(*) FROM pg_layer_group_channels($1, $2)", TEXT, TEXT)
REGROUP = Statement(
    _LAZILY + "pg_layer_regroup($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) AS f",
    *(TEXT, TEXT, FLOAT8, FLOAT8, TEXTS, TEXTS, INT4S, TEXTS, TEXTS, INT8S_OR_NULL),
)
REASSERT = Statement(_LAZILY + "pg_layer_reassert($1, $2, $3, $4) AS f", TEXT, TEXTS, TEXTS, FLOAT8S_OR_NULL)
WITHDRAW = Statement(_LAZY_CALL + "pg_layer_withdraw($1, $2, $3)", TEXT, TEXTS, TEXTS)
RENEW = Statement(
    _LAZILY + "pg_layer_renew($1, $2, $3, $4, $5, $6::jsonb, $7) AS f",
    *(TEXT, TEXT, INT4, FLOAT8, INT8, TEXT, TEXT),
)
BACKEND_PID = Statement("SELECT pg_backend_pid()")
NO_SCANS = Statement(
    "SELECT set_config('enable_seqscan', 'off', false), set_config('enable_bitmapscan', 'off', false)"
)
NONCE = Statement("SELECT pg_layer_nonce()")
LISTEN = Statement("SELECT pg_layer_listen(pg_layer_inbox($1, $2))", TEXT, TEXT)
UNLISTEN = Statement("SELECT pg_layer_unlisten(pg_layer_inbox($1, $2))", TEXT, TEXT)
READ = Statement(
    """
    SELECT id, nonce, kind, channel, group_name, payload, ends, excluded
    FROM (
        SELECT m.*, sum(octet_length(payload)) OVER (ORDER BY id) - octet_length(payload) AS bytes_before
        FROM (
            SELECT id, nonce, kind, channel, group_name, payload, excluded,
                extract(epoch FROM expires_at)::float8 AS ends
            FROM pg_layer_message
            WHERE inbox = $1 AND id BETWEEN $2 AND $3 AND expires_at > clock_timestamp()
            ORDER BY id LIMIT $4
        ) AS m
    ) AS m
    WHERE bytes_before < $5
    ORDER BY id
    """,
    *(TEXT, INT8, INT8, INT4, INT8),
)
QUEUE_USAGE = Statement("SELECT pg_notification_queue_usage()")
BEGIN = Statement("BEGIN")
SILENCE = Statement("SELECT set_config('pg_layer.silent', 'on', true)")
SAVEPOINT = Statement("SAVEPOINT pg_layer")
ROLLBACK_TO_SAVEPOINT = Statement("ROLLBACK TO SAVEPOINT pg_layer")
RELEASE_SAVEPOINT = Statement("RELEASE SAVEPOINT pg_layer")
BEGIN_SNAPSHOT = Statement("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
COMMIT = Statement("COMMIT")
DELETE = Statement(
    """
    WITH lazily AS MATERIALIZED (SELECT set_config('synchronous_commit', 'off', true))
    DELETE FROM pg_layer_message
    WHERE inbox = $1 AND id = ANY ($2) AND nonce = ANY ($3) AND (SELECT true FROM lazily)
    """,
    *(TEXT, INT8S, INT8S),
)
TAKE = Statement("SELECT * FROM pg_layer_take($1, $2, $3, $4, $5, $6)", TEXT, TEXT, TEXT, INT8, INT8, INT4)
PUT_BACK = Statement(_LAZY_CALL + "pg_layer_put_back($1, $2, $3, $4, $5)", TEXT, TEXT, INT8, INT8S, INT8S)
RAISE_FENCE = Statement(_LAZY_CALL + "pg_layer_raise_fence($1, $2)", TEXT, INT8)
CLOSE = Statement(
    _LAZY_CALL + "pg_layer_close($1, $2, $3, $4, $5, $6)", TEXT, TEXT, INT8S, INT8S, TEXTS, TEXTS
)
FLUSH = Statement(_LAZY_CALL + "pg_layer_flush($1)", TEXT)
SWEEP = Statement(_LAZILY + "pg_layer_sweep($1, $2, $3, $4, $5) AS f", TEXT, INT4, BOOL, TEXT, INT8)
SWEEPABLE = Statement("SELECT * FROM pg_layer_sweepable($1)", TEXT)
# Who adds a channel to a group writes a lease for its client if that has none, with no host and no process.
# That client may be about to come, or never have been: its lease is never overdue.
CLIENTS = Statement(
    """
    SELECT split_part(inbox, '!', 2), host, pid,
        (extract(epoch FROM expires_at) - extract(epoch FROM clock_timestamp()))::float8,
        (SELECT count(*) FROM pg_stat_activity
         WHERE datname = current_database() AND application_name = 'pg_layer ' || split_part(inbox, '!', 2))
    FROM pg_layer_client
    WHERE inbox > $1 || '!' AND inbox < $1 || '"' AND ended_at IS NULL
        AND (expires_at > clock_timestamp() OR host <> '' OR pid <> 0)
    ORDER BY expires_at > clock_timestamp(), host = '' AND pid = 0, host, pid, inbox LIMIT $2
    """,
    *(TEXT, INT4),
)
CLIENT_COUNTS = Statement(
    """
    SELECT count(*) FILTER (WHERE ended_at IS NULL AND expires_at > clock_timestamp()),
        count(*) FILTER (
            WHERE ended_at IS NULL AND expires_at <= clock_timestamp() AND (host <> '' OR pid <> 0)),
        count(ended_at)
    FROM pg_layer_client WHERE inbox > $1 || '!' AND inbox < $1 || '"'
    """,
    TEXT,
)
# Anybody with the privilege may have written what is no count.
DROPS = Statement(
    """
    SELECT d.name, coalesce(sum(
        CASE WHEN c.counters ->> d.name ~ '^[0-9]{1,15}$' THEN (c.counters ->> d.name)::bigint END
    ), 0)::bigint
    FROM unnest($2) AS d (name)
    LEFT JOIN pg_layer_client AS c ON c.inbox > $1 || '!' AND c.inbox < $1 || '"'
        AND c.ended_at IS NULL AND c.expires_at > clock_timestamp()
    GROUP BY d.name ORDER BY array_position($2, d.name)
    """,
    *(TEXT, TEXTS),
)
GROUPS = Statement(
    """
    SELECT group_name, members, inboxes, count(*) OVER (), (sum(members) OVER ())::bigint
    FROM pg_layer_group WHERE prefix = $1 ORDER BY members DESC, group_name LIMIT $2
    """,
    *(TEXT, INT4),
)
CHANNELS = Statement(
    """
    SELECT split_part(inbox, '!:', 2), count(*),
        extract(epoch FROM clock_timestamp() - min(sent_at))::float8,
        count(*) OVER (), (sum(count(*)) OVER ())::bigint
    FROM pg_layer_message
    WHERE inbox > $1 || '!:' AND inbox < $1 || '!;' AND expires_at > clock_timestamp()
    GROUP BY inbox ORDER BY 2 DESC, 1 LIMIT $2
    """,
    *(TEXT, INT4),
)
TABLES = Statement(
    """
    SELECT t.name, pg_table_size(s.relid), pg_indexes_size(s.relid), s.n_live_tup, s.n_dead_tup
    FROM unnest($1) AS t (name) JOIN pg_stat_user_tables AS s ON s.relid = t.name::regclass
    ORDER BY array_position($1, t.name)
    """,
    TEXTS,
)
LAST_SWEEP = Statement(
    """
    SELECT extract(epoch FROM clock_timestamp() - swept_at)::float8
    FROM pg_layer_last_sweep WHERE prefix = $1
    """,
    TEXT,
)
FIRST_USE = Statement(
    """
    SELECT extract(epoch FROM clock_timestamp() - least(
        (SELECT min(started_at) FROM pg_layer_client WHERE inbox > $1 || '!' AND inbox < $1 || '"'),
        (SELECT min(sent_at) FROM pg_layer_message WHERE inbox > $1 || '!' AND inbox < $1 || '"')))::float8
    """,
    TEXT,
)


def all_statements() -> list[Statement]:
    """Each statement above."""
    return [value for value in globals().values() if isinstance(value, Statement)]


@functools.cache
def for_transaction(statement: Statement) -> Statement:
    """The statement as a part of somebody's transaction.

    That is to be as durable as he wants it, and not to fail at its commit because NOTIFY's queue is full.
    """
    sql = statement.sql.decode()
    if _LAZY not in sql:
        return statement
    sql = sql.replace(_LAZY, "NULL").replace("($1", "(pg_layer_spare_commit($1)", 1)
    return Statement(sql, *statement.types)


@functools.cache
def for_cursor(statement: Statement) -> str:
    """The statement as psycopg's cursors take it, with its parameters in their order."""
    sql = statement.sql.decode()
    names = [type.name for type in statement.types]
    for number, name in reversed([*enumerate(names, 1)]):
        sql = sql.replace(f"${number}", f"%s::{name}")
    return sql
