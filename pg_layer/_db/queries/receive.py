"""Sessions, listening, reading, received rows and jobs.

See ``migrations/0001_5_receiving.sql``, ``migrations/0001_7_jobs.sql`` and, for the fence,
``migrations/0001_6_leases.sql``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pg_layer._db.queries.common import LAZY, one
from pg_layer._db.session import Session
from pg_layer._db.statement import BOOL, INT4, INT8, INT8S, TEXT, TEXTS, Statement
from pg_layer._messages.rows import Key, KeyAt, Row, Span, columns_of, row_from_columns
from pg_layer._state.snapshot import Moment, Position, Snapshot

READ_ROWS = 1000  # the most rows of one read
READ_BYTES = 4 * 1024 * 1024  # of payloads; a read ends with the row that exceeds it
DELETE_PART = 1000  # rows that one statement deletes

# ---------------------------------------------------------------------- sessions

BACKEND_PID = Statement("SELECT pg_backend_pid()")


async def is_direct(session: Session) -> bool:
    """Return whether the session is connected to the server itself, without a pooler.

    A pooler invents the process id that it reports when the connection begins.
    """
    (pid,) = await one(session, BACKEND_PID)
    return bool(pid == session.conn.info.backend_pid)


# Settings that a role or a database may have changed. default_transaction_read_only is not among
# them: it also shows that another server has become the primary.
_STEADY = {"idle_session_timeout": "0", "default_transaction_isolation": "read committed"}
_NO_SCANS = {"enable_seqscan": "off", "enable_bitmapscan": "off", "jit": "off"}


def _settings(values: Mapping[str, str]) -> Statement:
    calls = (f"set_config('{name}', '{value}', false)" for name, value in values.items())
    return Statement(f"SELECT {', '.join(calls)}")


POOL_SETTINGS = _settings(_STEADY | _NO_SCANS)


async def set_up_pooled(session: Session) -> None:
    """Set up a session of the pool: plans use indexes, and the server keeps an idle session.

    A plan stays when the tables have grown or are full of dead rows. So it must not scan a table
    that was small when it was made. A plan that has no index to use then counts as so expensive
    that PostgreSQL would compile it at each call: jit is off.
    """
    await session.execute(POOL_SETTINGS)


LISTENER_SETTINGS = _settings(_STEADY | {"statement_timeout": "0"})


async def set_up_listener(session: Session) -> None:
    """Set up the listening session: the server does not end it or its statements for their time."""
    await session.execute(LISTENER_SETTINGS)


PROBE = Statement("SELECT pg_layer_address('', '')")


async def probe(session: Session) -> None:
    """Check that the database answers and has the layer's functions."""
    await session.execute(PROBE)


# ---------------------------------------------------------------------- notifications

LISTEN = Statement("SELECT pg_layer_listen($1)", TEXTS)


async def listen(session: Session, channels: Sequence[str]) -> None:
    """Listen to NOTIFY channels."""
    await session.execute(LISTEN, channels)


UNLISTEN = Statement("SELECT pg_layer_unlisten($1)", TEXTS)


async def unlisten(session: Session, channels: Sequence[str]) -> None:
    """Stop listening to NOTIFY channels."""
    await session.execute(UNLISTEN, channels)


NOTIFY = Statement(LAZY + "pg_notify($1, $2)", TEXT, TEXT)


async def notify(session: Session, channel: str, payload: str) -> None:
    """Send a notification."""
    await session.execute(NOTIFY, channel, payload)


QUEUE_USAGE = Statement("SELECT pg_notification_queue_usage()")


async def look_at_queue(session: Session) -> None:
    """Make the server free the part of NOTIFY's queue that all sessions have read.

    After the queue was full, nothing else moves its end.
    """
    await session.execute(QUEUE_USAGE)


# ---------------------------------------------------------------------- reading

# The inner LIMIT and the sum cut the result by rows and by bytes. The first row is always returned.
READ = Statement(
    """
    SELECT m.span, m.address, m.id, m.xid::text::bigint, m.boot, m.marked, m.kind, m.channel,
        m.excluded, m.payload, extract(epoch FROM m.expires_at)::float8
    FROM (
        SELECT m.*, sum(m.size) OVER (ORDER BY m.span, m.id) - m.size AS before
        FROM (
            SELECT s.span, m.*, octet_length(m.payload) AS size
            FROM unnest($1, $2, $3, $4, $5)
                WITH ORDINALITY AS s (address, boot, xid, first, last, span)
            -- OFFSET 0: span by span. With the statistics of an empty table the planner would read
            -- all rows.
            CROSS JOIN LATERAL (
                SELECT * FROM pg_layer_message AS m
                WHERE m.address = s.address AND m.id BETWEEN s.first AND s.last OFFSET 0
            ) AS m
            WHERE m.xid = s.xid::text::xid8 AND m.boot = s.boot AND m.expires_at > clock_timestamp()
            ORDER BY s.span, m.id LIMIT $6
        ) AS m
    ) AS m
    WHERE m.before < $7
    ORDER BY m.span, m.id
    """,
    *(TEXTS, INT8S, INT8S, INT8S, INT8S, INT4, INT8),
)


class ReadSpan(NamedTuple):
    """The rows of a span that one read has returned. ``is_all``: the span has no more rows."""

    rows: list[Row]
    is_all: bool


async def read(session: Session, spans: Sequence[Span]) -> list[ReadSpan]:
    """Read the rows of spans, in their order, at most `READ_ROWS` and about `READ_BYTES`.

    The result ends with the span in which the limit was reached.
    """
    columns = await session.execute(
        READ,
        [span.address for span in spans],
        [span.boot for span in spans],
        [span.xid for span in spans],
        [span.first for span in spans],
        [span.last for span in spans],
        READ_ROWS,
        READ_BYTES,
    )
    rows: list[list[Row]] = [[] for _ in spans]
    for number, *rest in columns:
        rows[number - 1].append(row_from_columns(rest))
    if len(columns) < READ_ROWS and sum(len(columns[-2]) for columns in columns) < READ_BYTES:
        return [ReadSpan(found, True) for found in rows]
    last = columns[-1][0]
    return [ReadSpan(found, number < last) for number, found in enumerate(rows[:last], 1)]


READ_KEYS = Statement(
    """
    SELECT m.address, m.id, m.xid::text::bigint, m.boot, m.marked, m.kind, m.channel,
        m.excluded, m.payload, extract(epoch FROM m.expires_at)::float8
    FROM unnest($1, $2, $3, $4) WITH ORDINALITY AS k (address, boot, xid, id, position)
    CROSS JOIN LATERAL (
        SELECT * FROM pg_layer_message AS m WHERE m.address = k.address AND m.id = k.id OFFSET 0
    ) AS m
    WHERE m.xid = k.xid::text::xid8 AND m.boot = k.boot AND m.expires_at > clock_timestamp()
    ORDER BY k.position
    """,
    *(TEXTS, INT8S, INT8S, INT8S),
)


async def read_keys(session: Session, keys: Sequence[KeyAt]) -> list[Row]:
    """Read rows by their keys, in this order. Rows that are deleted or expired are left out."""
    columns = await session.execute(
        READ_KEYS, [at.address for at in keys], *columns_of([at.key for at in keys])
    )
    return list(map(row_from_columns, columns))


def parts(keys: Sequence[KeyAt]) -> list[Sequence[KeyAt]]:
    """Split keys into parts for `read_keys`.

    Each part is within `READ_ROWS` and `READ_BYTES`, or is a single row.
    """
    found: list[Sequence[KeyAt]] = []
    start = size = 0
    for index, at in enumerate(keys):
        if index > start and (size + at.size > READ_BYTES or index - start >= READ_ROWS):
            found.append(keys[start:index])
            start, size = index, 0
        size += at.size
    if start < len(keys):
        found.append(keys[start:])
    return found


# ---------------------------------------------------------------------- catch-ups

POSITION = Statement(LAZY + "f.* FROM pg_layer_position($1) AS f", INT8)


async def position(session: Session, known_boot: int) -> tuple[int, Position]:
    """Return the boot, and the position at which a later catch-up may begin.

    Begin a boot if there is none. ``known_boot``: the boot of the cursor, or 0.
    """
    _, boot, last_id, next_xid = await one(session, POSITION, known_boot)
    return boot, Position(last_id, next_xid)


BEGIN_SNAPSHOT = Statement("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
SNAPSHOT = Statement("SELECT pg_current_snapshot()::text")


async def begin_snapshot(session: Session, boot: int) -> Moment:
    """Begin a transaction with one snapshot, and return the snapshot. `commit` ends it.

    ``boot``: the current boot.
    """
    await session.execute(BEGIN_SNAPSHOT)
    (text,) = await one(session, SNAPSHOT)
    return Moment(boot, Snapshot(text))


COMMIT = Statement("COMMIT")


async def commit(session: Session) -> None:
    """End a transaction."""
    await session.execute(COMMIT)


NEW_KEYS = Statement(
    "SELECT * FROM pg_layer_new_keys($1, $2, $3, $4::text::pg_snapshot)", TEXTS, INT8S, INT8, TEXT
)


async def new_keys(
    session: Session, addresses: Sequence[str], low_ids: Sequence[int], after: Moment | None
) -> list[KeyAt]:
    """Return the keys of marked rows and of rows that were not visible at a moment, by id.

    ``low_ids``: for each address an id that all new rows exceed. ``after``: the moment, None for
    all rows.
    """
    before = (-1, None) if after is None else (after.boot, after.snapshot.text)
    return list(map(KeyAt._make, await session.execute(NEW_KEYS, addresses, low_ids, *before)))


NEW_IN_GROUP = Statement(
    """
    SELECT m.address, m.id, m.xid::text::bigint, m.boot, m.marked, m.kind, m.channel,
        m.excluded, m.payload, extract(epoch FROM m.expires_at)::float8
    FROM pg_layer_message AS m
    WHERE m.address = $1 AND m.id > $2 AND m.expires_at > clock_timestamp()
        AND (m.boot > $3 OR (m.boot = 0 AND $3 < $5)
            OR (m.boot IN (0, $3) AND NOT pg_visible_in_snapshot(m.xid, $4::text::pg_snapshot)))
    ORDER BY m.id LIMIT $6
    """,
    *(TEXT, INT8, INT8, TEXT, INT8, INT4),
)


async def new_in_group(
    session: Session, address: str, low_id: int, after: Moment, boot: int, limit: int
) -> list[Row]:
    """Return the first rows of a group that were not visible at a moment, by id.

    ``address``: of the group. ``low_id``: rows up to this id are left out. ``boot``: the latest
    boot that is known; rows with boot 0 count as rows of that boot.
    """
    before = (after.boot, after.snapshot.text)
    columns = await session.execute(NEW_IN_GROUP, address, low_id, *before, boot, limit)
    return list(map(row_from_columns, columns))


MARKED_KEYS = Statement(
    "SELECT * FROM pg_layer_marked_keys($1, $2, $3::text::pg_snapshot)", TEXTS, INT8, TEXT
)


async def marked_keys(
    session: Session, addresses: Sequence[str], low_id: int, moment: Moment
) -> list[KeyAt]:
    """Return the keys of marked rows that were visible at a moment, with ids above ``low_id``."""
    found = await session.execute(MARKED_KEYS, addresses, low_id, moment.snapshot.text)
    return list(map(KeyAt._make, found))


# ---------------------------------------------------------------------- received rows

DELETE = Statement(LAZY + "pg_layer_delete($1, $2, $3, $4)", TEXT, INT8S, INT8S, INT8S)


async def delete(session: Session, address: str, keys: Sequence[Key]) -> None:
    """Delete rows that were received."""
    await session.execute(DELETE, address, *columns_of(keys))


DELETE_RECEIVED = Statement(
    LAZY + "pg_layer_delete_received($1, $2::text::pg_snapshot, $3, $4, $5)",
    *(TEXT, TEXT, INT8S, INT8, INT4),
)


async def delete_received(
    session: Session, address: str, moment: Moment, kept: Sequence[Key]
) -> None:
    """Delete the rows at an address that were visible at a moment, except ``kept``; in parts."""
    ids, after = sorted(key.id for key in kept), 0
    while after is not None:
        _, after = await one(
            session, DELETE_RECEIVED, address, moment.snapshot.text, ids, after, DELETE_PART
        )


# ---------------------------------------------------------------------- jobs

CLAIM = Statement(
    "SELECT * FROM pg_layer_claim($1, $2, $3, $4, $5, $6)", TEXT, TEXT, TEXT, INT8, INT8, INT4
)


async def claim(
    session: Session, prefix: str, channel: str, address: str, fence: int, low_id: int, limit: int
) -> list[Row]:
    """Claim the oldest jobs of a normal channel, at most ``limit``. Return them by id.

    ``low_id``: the low-water id of the channel, 0 if it is unknown.
    """
    columns = await session.execute(CLAIM, prefix, channel, address, fence, low_id, limit)
    return sorted(map(row_from_columns, columns), key=lambda row: row.id)


RELEASE = Statement(
    "SELECT pg_layer_release($1, $2, $3, $4, $5, $6, $7)",
    *(TEXT, TEXT, INT8, INT8S, INT8S, INT8S, BOOL),
)


async def release(
    session: Session,
    prefix: str,
    address: str,
    fence: int,
    keys: Sequence[Key],
    *,
    quiet: bool = False,
) -> None:
    """Release claimed jobs: move them back to their channels. ``quiet``: do not announce them."""
    await session.execute(RELEASE, prefix, address, fence, *columns_of(keys), quiet)


RAISE_FENCE = Statement(LAZY + "pg_layer_raise_fence($1, $2)", TEXT, INT8)


async def raise_fence(session: Session, address: str, fence: int) -> None:
    """Make the server refuse statements of the client that carry a smaller fence."""
    await session.execute(RAISE_FENCE, address, fence)
