-- Receiving and jobs: see docs/protocols.md, sections 3 and 6.

-- Where a catch-up begins: the boot, and the largest id drawn so far. Rows of transactions from next_xid on have larger ids.
--   _known: the boot of the client's cursor, or 0
CREATE FUNCTION pg_layer_position(_known bigint, OUT boot bigint, OUT last_id bigint, OUT next_xid bigint)
LANGUAGE plpgsql AS $$
DECLARE
    _xmax xid8;
BEGIN
    SELECT CASE WHEN s.is_called THEN s.last_value ELSE 0 END INTO last_id FROM pg_layer_message_id_seq AS s;
    -- The next transaction id: age() counts up to it as long as this transaction has none. The xmax of a snapshot will not do: open
    -- transactions from there on may have drawn ids, because it follows the last transaction that has ended.
    _xmax := pg_snapshot_xmax(pg_current_snapshot());
    next_xid := _xmax::text::bigint + age(_xmax::xid);
    boot := pg_layer_begin_boot(_known);
END
$$;

-- The keys of rows that are new to a cursor, or marked, in the order of ids; sizes in bytes.
--   _low_ids: by address; no row that is new has such an id, or a smaller one
--   _boot, _snapshot: those of the cursor, or -1 and null if it has none
--   _present_boot: the server's own
CREATE FUNCTION pg_layer_new_keys(
    _addresses text[], _low_ids bigint[], _boot bigint, _snapshot pg_snapshot, _present_boot bigint
) RETURNS TABLE (address text, id bigint, xid bigint, boot bigint, marked boolean, size integer)
LANGUAGE sql STABLE SET enable_seqscan = off SET jit = off AS $$
    SELECT m.address, m.id, m.xid::text::bigint, m.boot, m.marked, octet_length(m.payload)
    FROM unnest(_addresses, _low_ids) AS a (address, low_id)
    JOIN pg_layer_message AS m ON m.address = a.address AND m.id > a.low_id
    WHERE m.expires_at > clock_timestamp() AND CASE
        WHEN m.marked OR m.boot > _boot THEN true
        WHEN m.boot = _boot THEN NOT pg_visible_in_snapshot(m.xid, _snapshot)
        ELSE m.boot = _present_boot END
    ORDER BY m.id
$$;

-- The keys of marked rows at these addresses, with ids above _low_id, that were visible in a snapshot.
CREATE FUNCTION pg_layer_marked_keys(_addresses text[], _low_id bigint, _snapshot pg_snapshot)
RETURNS TABLE (address text, id bigint, xid bigint, boot bigint, marked boolean, size integer)
LANGUAGE sql STABLE SET enable_seqscan = off SET jit = off AS $$
    SELECT m.address, m.id, m.xid::text::bigint, m.boot, m.marked, octet_length(m.payload)
    FROM pg_layer_message AS m
    WHERE m.marked AND m.id > _low_id AND m.expires_at > clock_timestamp()
        AND m.address = ANY (_addresses) AND pg_visible_in_snapshot(m.xid, _snapshot)
    ORDER BY m.id
$$;

-- Delete rows that were received.
CREATE FUNCTION pg_layer_delete(_address text, _ids bigint[], _xids bigint[]) RETURNS void
LANGUAGE sql SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
    DELETE FROM pg_layer_message AS m USING unnest(_ids, _xids) AS d (id, xid)
    WHERE m.address = _address AND m.id = d.id AND m.xid = d.xid::text::xid8
$$;

-- Delete all rows of a client that are visible in a snapshot, except those that it holds: a crash has undone deletions.
CREATE FUNCTION pg_layer_delete_received(_address text, _snapshot pg_snapshot, _held bigint[]) RETURNS void
LANGUAGE sql SET enable_seqscan = off SET jit = off AS $$
    DELETE FROM pg_layer_message AS m
    WHERE m.address = _address AND pg_visible_in_snapshot(m.xid, _snapshot) AND NOT m.marked AND m.id <> ALL (_held)
$$;

-- Claim up to _limit jobs of a normal channel: move the oldest to the own address, where nobody else claims them. The caller commits
-- this durably: undone by a crash of the server, the same job would be handed out twice.
--   _low_id: nothing waits below this id
CREATE FUNCTION pg_layer_claim(_prefix text, _channel text, _address text, _fence bigint, _low_id bigint, _limit integer)
RETURNS TABLE (
    address text, id bigint, xid bigint, boot bigint, marked boolean, kind text, channel text, excluded text, payload bytea,
    expires_at float8
)
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE
    _boot bigint;
BEGIN
    PERFORM pg_layer_check_fence(_address, _fence);
    _boot := pg_layer_current_boot();
    IF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    RETURN QUERY
    WITH picked AS MATERIALIZED (
        SELECT m.address, m.id FROM pg_layer_message AS m
        WHERE m.address = pg_layer_address(_prefix, _channel) AND m.id >= _low_id AND m.expires_at > clock_timestamp()
        ORDER BY m.id LIMIT _limit
        FOR UPDATE SKIP LOCKED
    )
    UPDATE pg_layer_message AS m SET address = _address, xid = pg_current_xact_id(), boot = _boot, marked = false
    FROM picked AS p WHERE m.address = p.address AND m.id = p.id
    RETURNING m.address, m.id, m.xid::text::bigint, m.boot, m.marked, m.kind, m.channel, m.excluded, m.payload,
        extract(epoch FROM m.expires_at)::float8;
END
$$;

-- Give claimed jobs back to their channels, with their ids and their ends.
--   _fence: as for pg_layer_claim; null: the client closes
CREATE FUNCTION pg_layer_release(_prefix text, _address text, _fence bigint, _ids bigint[], _xids bigint[]) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET jit = off AS $$
DECLARE
    _count bigint;
BEGIN
    IF _fence IS NOT NULL THEN
        PERFORM pg_layer_check_fence(_address, _fence);
    END IF;
    WITH moved AS (
        UPDATE pg_layer_message AS m SET address = pg_layer_address(_prefix, m.channel)
        FROM unnest(_ids, _xids) AS r (id, xid)
        WHERE m.address = _address AND m.id = r.id AND m.xid = r.xid::text::xid8
        RETURNING m.address, m.id
    )
    SELECT count(pg_notify(pg_layer_notification_channel(b.address), 'J ' || b.first)) INTO _count
    FROM (SELECT address, min(id) AS first FROM moved GROUP BY address) AS b;
END
$$;
