"""Listening, reading, catching up, jobs and deletions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pg_layer._db.queries.common import LAZY, one
from pg_layer._db.session import Session
from pg_layer._db.statement import BOOL, INT4, INT8, INT8S, TEXT, TEXTS, Statement
from pg_layer._messages.rows import Key, KeyAt, Row, Span, columns_of, row_from_columns
from pg_layer._state.snapshot import Moment, Position, Snapshot

READ_ROWS = 1000
READ_BYTES = 4 * 1024 * 1024
DELETE_PART = 1000  # rows

LISTEN = Statement("SELECT pg_layer_listen($1)", TEXTS)
NOTIFY = Statement(LAZY + "pg_notify($1, $2)", TEXT, TEXT)
UNLISTEN = Statement("SELECT pg_layer_unlisten($1)", TEXTS)
BACKEND_PID = Statement("SELECT pg_backend_pid()")
# What a role or a database may set otherwise. Not default_transaction_read_only: it also tells that another
# server takes over.
_STEADY = {"idle_session_timeout": "0", "default_transaction_isolation": "read committed"}
_NO_SCANS = {"enable_seqscan": "off", "enable_bitmapscan": "off", "jit": "off"}


def _settings(values: Mapping[str, str]) -> Statement:
    calls = (f"set_config('{name}', '{value}', false)" for name, value in values.items())
    return Statement(f"SELECT {', '.join(calls)}")


POOL_SETTINGS = _settings(_STEADY | _NO_SCANS)
LISTENER_SETTINGS = _settings(_STEADY | {"statement_timeout": "0"})
PROBE = Statement("SELECT pg_layer_address('', '')")
QUEUE_USAGE = Statement("SELECT pg_notification_queue_usage()")
# A limit on rows and bytes cuts the result; the first row always comes.
READ = Statement(
    """
    SELECT m.span, m.address, m.id, m.xid::text::bigint, m.boot, m.marked, m.kind, m.channel,
        m.excluded, m.payload, extract(epoch FROM m.expires_at)::float8
    FROM (
        SELECT m.*, sum(m.size) OVER (ORDER BY m.span, m.id) - m.size AS before
        FROM (
            SELECT s.span, m.*, octet_length(m.payload) AS size
            FROM unnest($1, $2, $3, $4, $5) WITH ORDINALITY AS s (address, boot, xid, first, last, span)
            -- Span by span (OFFSET 0): with statistics of an empty table the planner walks all rows.
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
POSITION = Statement(LAZY + "f.* FROM pg_layer_position($1) AS f", INT8)
BEGIN_SNAPSHOT = Statement("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
SNAPSHOT = Statement("SELECT pg_current_snapshot()::text")
COMMIT = Statement("COMMIT")
NEW_KEYS = Statement(
    "SELECT * FROM pg_layer_new_keys($1, $2, $3, $4::text::pg_snapshot)", TEXTS, INT8S, INT8, TEXT
)
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
MARKED_KEYS = Statement(
    "SELECT * FROM pg_layer_marked_keys($1, $2, $3::text::pg_snapshot)", TEXTS, INT8, TEXT
)
DELETE = Statement(LAZY + "pg_layer_delete($1, $2, $3, $4)", TEXT, INT8S, INT8S, INT8S)
DELETE_RECEIVED = Statement(
    LAZY + "pg_layer_delete_received($1, $2::text::pg_snapshot, $3, $4, $5)",
    *(TEXT, TEXT, INT8S, INT8, INT4),
)
CLAIM = Statement(
    "SELECT * FROM pg_layer_claim($1, $2, $3, $4, $5, $6)", TEXT, TEXT, TEXT, INT8, INT8, INT4
)
RELEASE = Statement(
    "SELECT pg_layer_release($1, $2, $3, $4, $5, $6, $7)",
    TEXT,
    TEXT,
    INT8,
    INT8S,
    INT8S,
    INT8S,
    BOOL,
)
RAISE_FENCE = Statement(LAZY + "pg_layer_raise_fence($1, $2)", TEXT, INT8)


# ---------------------------------------------------------------------- sessions


async def is_direct(session: Session) -> bool:
    """Whether one server process answers for good: a pooler makes up the id that it tells at first."""
    (pid,) = await one(session, BACKEND_PID)
    return bool(pid == session.conn.info.backend_pid)


async def set_up_pooled(session: Session) -> None:
    """Have the server keep an idle session, and use indexes for what is prepared from now on.

    Plans stay when the tables have grown, or are full of dead rows, however small they were before. A plan
    that has no index to use counts as so expensive then that PostgreSQL would compile it at each call.
    """
    await session.execute(POOL_SETTINGS)


async def set_up_listener(session: Session) -> None:
    """Have the server keep an idle session, and end no statement because it takes long."""
    await session.execute(LISTENER_SETTINGS)


async def probe(session: Session) -> None:
    """Check that the database answers, and has the layer's functions."""
    await session.execute(PROBE)


async def look_at_queue(session: Session) -> None:
    """Have the server notice that NOTIFY's queue is empty: nothing else moves its end when it was full."""
    await session.execute(QUEUE_USAGE)


async def listen(session: Session, channels: Sequence[str]) -> None:
    """LISTEN to NOTIFY channels."""
    await session.execute(LISTEN, channels)


async def notify(session: Session, channel: str, payload: str) -> None:
    """NOTIFY a channel."""
    await session.execute(NOTIFY, channel, payload)


async def unlisten(session: Session, channels: Sequence[str]) -> None:
    """Stop listening to NOTIFY channels."""
    await session.execute(UNLISTEN, channels)


# ---------------------------------------------------------------------- reading


class ReadSpan(NamedTuple):
    """The rows of a span, as many as the limits allow. ``is_all``: there are no more."""

    rows: list[Row]
    is_all: bool


async def read(session: Session, spans: Sequence[Span]) -> list[ReadSpan]:
    """Read the rows of spans, in their order, until a limit; spans beyond it have no result."""
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


async def read_keys(session: Session, keys: Sequence[KeyAt]) -> list[Row]:
    """Read rows by their keys, in this order; those that are gone or expired are left out."""
    columns = await session.execute(
        READ_KEYS, [at.address for at in keys], *columns_of([at.key for at in keys])
    )
    return list(map(row_from_columns, columns))


def parts(keys: Sequence[KeyAt]) -> list[Sequence[KeyAt]]:
    """Split keys so that each part is within the limits of a read, or is a single row."""
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


async def position(session: Session, known_boot: int) -> tuple[int, Position]:
    """Return the boot, and the largest id drawn so far. Begins a boot where there is none."""
    _, boot, last_id, next_xid = await one(session, POSITION, known_boot)
    return boot, Position(last_id, next_xid)


async def begin_snapshot(session: Session, boot: int) -> Moment:
    """Begin a transaction that sees one snapshot, to be ended by `commit`."""
    await session.execute(BEGIN_SNAPSHOT)
    (text,) = await one(session, SNAPSHOT)
    return Moment(boot, Snapshot(text))


async def commit(session: Session) -> None:
    """End a transaction."""
    await session.execute(COMMIT)


async def new_keys(
    session: Session, addresses: Sequence[str], low_ids: Sequence[int], after: Moment | None
) -> list[KeyAt]:
    """Return the keys of rows that are new after a moment, and of marked rows; in the order of ids.

    ``low_ids``: by address, an id that all of them exceed.
    """
    before = (-1, None) if after is None else (after.boot, after.snapshot.text)
    return list(map(KeyAt._make, await session.execute(NEW_KEYS, addresses, low_ids, *before)))


async def new_in_group(
    session: Session, address: str, low_id: int, after: Moment, boot: int, limit: int
) -> list[Row]:
    """Return the first rows of a group that were not visible at a moment, with larger ids.

    ``boot``: the latest boot that is known; rows of boot 0 count as its own.
    """
    before = (after.boot, after.snapshot.text)
    columns = await session.execute(NEW_IN_GROUP, address, low_id, *before, boot, limit)
    return list(map(row_from_columns, columns))


async def marked_keys(
    session: Session, addresses: Sequence[str], low_id: int, moment: Moment
) -> list[KeyAt]:
    """Return the keys of marked rows that were visible at a moment, with larger ids."""
    found = await session.execute(MARKED_KEYS, addresses, low_id, moment.snapshot.text)
    return list(map(KeyAt._make, found))


# ---------------------------------------------------------------------- what was received


async def delete(session: Session, address: str, keys: Sequence[Key]) -> None:
    """Delete rows that were received."""
    await session.execute(DELETE, address, *columns_of(keys))


async def delete_received(
    session: Session, address: str, moment: Moment, held: Sequence[Key]
) -> None:
    """Delete what a moment sees at an address, but for the rows that are held; in parts."""
    ids, after = sorted(key.id for key in held), 0
    while after is not None:
        _, after = await one(
            session, DELETE_RECEIVED, address, moment.snapshot.text, ids, after, DELETE_PART
        )


# ---------------------------------------------------------------------- jobs


async def claim(
    session: Session, prefix: str, channel: str, address: str, fence: int, low_id: int, limit: int
) -> list[Row]:
    """Claim the oldest jobs of a normal channel, in the order of ids."""
    columns = await session.execute(CLAIM, prefix, channel, address, fence, low_id, limit)
    return sorted(map(row_from_columns, columns), key=lambda row: row.id)


async def release(
    session: Session,
    prefix: str,
    address: str,
    fence: int,
    keys: Sequence[Key],
    *,
    quiet: bool = False,
) -> None:
    """Give claimed jobs back to their channels. If ``quiet``, do not announce them."""
    await session.execute(RELEASE, prefix, address, fence, *columns_of(keys), quiet)


async def raise_fence(session: Session, address: str, fence: int) -> None:
    """Have the server refuse statements of the client that carry a smaller number."""
    await session.execute(RAISE_FENCE, address, fence)
