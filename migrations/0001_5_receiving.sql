-- Listening, catch-ups and the deletion of received rows: see docs/protocols.md, sections 2 and 3.
-- Rows are read by the statements in pg_layer/_db/queries/receive.py.

-- For SET search_path FROM CURRENT: see 0001_1_tables.sql.
SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

-- ------------------------------------------------------------------------- listening

-- Listen to NOTIFY channels. It takes effect when the transaction has committed.
--
--   Called by clients (_db/queries/receive.py). It uses no tables, so that no search_path is set.
CREATE FUNCTION pg_layer_listen(_channels text[]) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    FOR _i IN 1 .. cardinality(_channels) LOOP
        EXECUTE format('LISTEN %I', _channels[_i]);
    END LOOP;
END
$$;

-- Stop listening to NOTIFY channels, when the transaction has committed.
--
--   Called by clients (_db/queries/receive.py).
CREATE FUNCTION pg_layer_unlisten(_channels text[]) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    FOR _i IN 1 .. cardinality(_channels) LOOP
        EXECUTE format('UNLISTEN %I', _channels[_i]);
    END LOOP;
END
$$;

-- ------------------------------------------------------------------------- catch-ups

-- Return the position at which a later catch-up may begin: the boot, the largest id that has been
-- drawn, and the next transaction id. Rows of transactions from next_xid on have larger ids. Begin
-- a boot if there is none.
--
--   _known: the boot of the client's cursor, or 0
--   Raises SQLSTATE 25006 on a standby.
--   Called by clients (_db/queries/receive.py) and by pg_layer_renew().
CREATE FUNCTION pg_layer_position(
    _known bigint, OUT boot bigint, OUT last_id bigint, OUT next_xid bigint
)
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    _xmax xid8;
BEGIN
    -- Read the id before the transaction id. In the other order, a transaction from next_xid on
    -- could draw ids in between, and last_id would include them.
    SELECT CASE WHEN s.is_called THEN s.last_value ELSE 0 END INTO last_id
    FROM pg_layer_message_id_seq AS s;
    -- age() counts up to the next transaction id as long as this transaction has none. The xmax of
    -- the snapshot is not that id. It follows the last transaction that has ended, and open
    -- transactions from there on may have drawn ids.
    _xmax := pg_snapshot_xmax(pg_current_snapshot());
    next_xid := _xmax::text::bigint + age(_xmax::xid);
    boot := pg_layer_begin_boot(_known);
END
$$;

-- Return the keys of rows that are new to a cursor, and of marked rows, in the order of the ids.
--
--   _addresses, _low_ids: for each address an id that all new rows exceed
--   _boot, _snapshot: of the cursor; -1 and null if it has none
--   Returns in size the bytes of the payload.
--   Called by clients (_db/queries/receive.py), in a snapshot.
CREATE FUNCTION pg_layer_new_keys(
    _addresses text[], _low_ids bigint[], _boot bigint, _snapshot pg_snapshot
)
RETURNS TABLE (address text, id bigint, xid bigint, boot bigint, marked boolean, size integer)
LANGUAGE sql STABLE
SET search_path FROM CURRENT
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $$
    SELECT m.address, m.id, m.xid::text::bigint, m.boot, m.marked, octet_length(m.payload)
    FROM unnest(_addresses, _low_ids) AS a (address, low_id)
    -- OFFSET 0: address by address. With the statistics of an empty table the planner would read
    -- all rows instead.
    CROSS JOIN LATERAL (
        SELECT m.* FROM pg_layer_message AS m
        WHERE m.address = a.address AND m.id > a.low_id OFFSET 0
    ) AS m
    WHERE m.expires_at > clock_timestamp()
        AND (m.marked OR m.boot > _boot
            OR m.boot = _boot AND NOT pg_visible_in_snapshot(m.xid, _snapshot))
    ORDER BY m.id
$$;

-- Return the keys of marked rows that were visible in a snapshot, in the order of the ids.
--
--   _low_id: rows up to this id are left out
--   Called by clients (_db/queries/receive.py), at heartbeats that find marked rows.
CREATE FUNCTION pg_layer_marked_keys(_addresses text[], _low_id bigint, _snapshot pg_snapshot)
RETURNS TABLE (address text, id bigint, xid bigint, boot bigint, marked boolean, size integer)
LANGUAGE sql STABLE
SET search_path FROM CURRENT
SET enable_seqscan = off
SET jit = off
AS $$
    SELECT m.address, m.id, m.xid::text::bigint, m.boot, m.marked, octet_length(m.payload)
    FROM pg_layer_message AS m
    WHERE m.marked AND m.id > _low_id AND m.expires_at > clock_timestamp()
        AND m.address = ANY (_addresses) AND pg_visible_in_snapshot(m.xid, _snapshot)
    ORDER BY m.id
$$;

-- ------------------------------------------------------------------------- received rows

-- Delete rows that were received.
--
-- Boot by boot: after a crash, a row of a later boot may have the same id and transaction id as a
-- row that was lost. DISTINCT: the list of transactions is searched for each row.
--
--   _boots, _xids, _ids: one element per row
--   Called by clients (_db/queries/receive.py).
CREATE FUNCTION pg_layer_delete(_address text, _boots bigint[], _xids bigint[], _ids bigint[])
RETURNS void
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
SET jit = off
AS $$
DECLARE
    _one bigint;
BEGIN
    FOR _one IN SELECT DISTINCT b FROM unnest(_boots) AS b LOOP
        DELETE FROM pg_layer_message AS m
        WHERE m.address = _address AND m.boot = _one
            AND m.id = ANY (ARRAY(
                SELECT r.id FROM unnest(_boots, _ids) AS r (boot, id) WHERE r.boot = _one))
            AND m.xid = ANY (ARRAY(
                SELECT DISTINCT r.xid::text::xid8 FROM unnest(_boots, _xids) AS r (boot, xid)
                WHERE r.boot = _one));
    END LOOP;
END
$$;

-- Delete the rows of a client that were visible in a snapshot, except those that the client still
-- needs. After a crash of the server, which may have undone deletions.
--
--   _kept: ids of rows that the client has not received yet
--   _after: rows up to this id are left out
--   _limit: the number of rows that are read
--   Returns the id to pass as _after in the next call; null: there are no more rows.
--   Called by clients (_db/queries/receive.py).
CREATE FUNCTION pg_layer_delete_received(
    _address text, _snapshot pg_snapshot, _kept bigint[], _after bigint DEFAULT 0,
    _limit integer DEFAULT 1000
) RETURNS bigint
LANGUAGE sql
SET search_path FROM CURRENT
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $$
    WITH part AS MATERIALIZED (
        SELECT m.id, pg_visible_in_snapshot(m.xid, _snapshot) AND NOT m.marked AS is_old
        FROM pg_layer_message AS m
        WHERE m.address = _address AND m.id > _after ORDER BY m.id LIMIT _limit
    ), gone AS (
        DELETE FROM pg_layer_message AS m WHERE m.address = _address AND m.id = ANY (ARRAY(
            SELECT p.id FROM part AS p
            WHERE p.is_old AND p.id NOT IN (SELECT k.id FROM unnest(_kept) AS k (id))))
    )
    SELECT CASE WHEN count(*) = _limit THEN max(p.id) END FROM part AS p
$$;
