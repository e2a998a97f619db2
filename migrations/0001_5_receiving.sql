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
CREATE FUNCTION pg_layer_new_keys(_addresses text[], _low_ids bigint[], _boot bigint, _snapshot pg_snapshot)
RETURNS TABLE (address text, id bigint, xid bigint, boot bigint, marked boolean, size integer)
LANGUAGE sql STABLE SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off AS $$
    SELECT m.address, m.id, m.xid::text::bigint, m.boot, m.marked, octet_length(m.payload)
    FROM unnest(_addresses, _low_ids) AS a (address, low_id)
    -- Address by address, also where statistics of an empty table make the planner walk all rows instead (OFFSET 0).
    CROSS JOIN LATERAL (
        SELECT m.* FROM pg_layer_message AS m WHERE m.address = a.address AND m.id > a.low_id OFFSET 0
    ) AS m
    WHERE m.expires_at > clock_timestamp()
        AND (m.marked OR m.boot > _boot OR m.boot = _boot AND NOT pg_visible_in_snapshot(m.xid, _snapshot))
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

-- Delete rows that were received, boot by boot: after a crash a row of a later boot may have the id and the transaction id of a row that
-- was lost. Each transaction once: the list is looked through for each row.
CREATE FUNCTION pg_layer_delete(_address text, _boots bigint[], _xids bigint[], _ids bigint[]) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE
    _one bigint;
BEGIN
    FOR _one IN SELECT DISTINCT b FROM unnest(_boots) AS b LOOP
        DELETE FROM pg_layer_message AS m
        WHERE m.address = _address AND m.boot = _one
            AND m.id = ANY (ARRAY(SELECT r.id FROM unnest(_boots, _ids) AS r (boot, id) WHERE r.boot = _one))
            AND m.xid = ANY (ARRAY(
                SELECT DISTINCT r.xid::text::xid8 FROM unnest(_boots, _xids) AS r (boot, xid) WHERE r.boot = _one));
    END LOOP;
END
$$;

-- Delete the rows of a client that are visible in a snapshot, except those that it holds: a crash has undone deletions. Looks at
-- _limit rows with ids above _after.
--   returns: the id to go on after; null: there are no more
CREATE FUNCTION pg_layer_delete_received(
    _address text, _snapshot pg_snapshot, _held bigint[], _after bigint DEFAULT 0, _limit integer DEFAULT 1000
) RETURNS bigint
LANGUAGE sql SET enable_seqscan = off SET enable_bitmapscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off AS $$
    WITH part AS MATERIALIZED (
        SELECT m.id, pg_visible_in_snapshot(m.xid, _snapshot) AND NOT m.marked AS is_old FROM pg_layer_message AS m
        WHERE m.address = _address AND m.id > _after ORDER BY m.id LIMIT _limit
    ), gone AS (
        DELETE FROM pg_layer_message AS m WHERE m.address = _address AND m.id = ANY (ARRAY(
            SELECT p.id FROM part AS p WHERE p.is_old AND p.id NOT IN (SELECT h.id FROM unnest(_held) AS h (id))))
    )
    SELECT CASE WHEN count(*) = _limit THEN max(p.id) END FROM part AS p
$$;

-- Claim up to _limit jobs of a normal channel: move the oldest to the own address, where nobody else claims them. The caller commits
-- this durably: undone by a crash of the server, the same job would be handed out twice.
--   _low_id: nothing waits below this id; 0: the caller does not know
CREATE FUNCTION pg_layer_claim(_prefix text, _channel text, _address text, _fence bigint, _low_id bigint, _limit integer)
RETURNS TABLE (
    address text, id bigint, xid bigint, boot bigint, marked boolean, kind text, channel text, excluded text, payload bytea,
    expires_at float8
)
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
    SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
DECLARE
    _boot bigint;
BEGIN
    PERFORM pg_layer_check_fence(_address, _fence);
    _boot := pg_layer_current_boot();
    IF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    IF _low_id = 0 THEN
        _low_id := pg_layer_low_id(pg_layer_address(_prefix, _channel));
    END IF;
    RETURN QUERY
    WITH picked AS MATERIALIZED (
        SELECT m.id FROM pg_layer_message AS m
        WHERE m.address = pg_layer_address(_prefix, _channel) AND m.id >= _low_id AND m.expires_at > clock_timestamp()
        ORDER BY m.id LIMIT _limit
        FOR UPDATE SKIP LOCKED
    )
    UPDATE pg_layer_message AS m SET address = _address, xid = pg_current_xact_id(), boot = _boot, marked = false
    WHERE m.address = pg_layer_address(_prefix, _channel) AND m.id = ANY (ARRAY(SELECT p.id FROM picked AS p))
    RETURNING m.address, m.id, m.xid::text::bigint, m.boot, m.marked, m.kind, m.channel, m.excluded, m.payload,
        extract(epoch FROM m.expires_at)::float8;
END
$$;

-- Give claimed jobs back to their channels, with their ids and their ends.
--   _fence: as for pg_layer_claim; null: the client closes
--   _quiet: do not announce them
CREATE FUNCTION pg_layer_release(
    _prefix text, _address text, _fence bigint, _boots bigint[], _xids bigint[], _ids bigint[], _quiet boolean DEFAULT false
) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off
    SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
DECLARE
    _distinct_xids xid8[] := ARRAY(SELECT DISTINCT x::text::xid8 FROM unnest(_xids) AS x);
    _released record;
BEGIN
    IF _fence IS NOT NULL THEN
        PERFORM pg_layer_check_fence(_address, _fence);
        -- Durably: what a crash has undone would count as received by a client that goes on.
        IF current_setting('synchronous_commit') = 'off' THEN
            PERFORM set_config('synchronous_commit', 'on', true);
        END IF;
    END IF;
    FOR _released IN
        WITH moved AS (
            UPDATE pg_layer_message AS m SET address = pg_layer_address(_prefix, m.channel)
            WHERE m.address = _address AND m.id = ANY (_ids) AND m.xid = ANY (_distinct_xids) AND m.boot = ANY (_boots)
            RETURNING m.address, m.id
        )
        SELECT b.address, min(b.id) AS first FROM moved AS b GROUP BY b.address ORDER BY b.address
    LOOP
        -- Also where there is no row yet: pg_layer_keep_low_ids must not raise the id while the released jobs are not visible to it.
        INSERT INTO pg_layer_low_id AS l (address, low_id, kept_on) VALUES (_released.address, 0, current_date)
        ON CONFLICT (address) DO UPDATE SET low_id = least(l.low_id, _released.first);
        IF NOT _quiet THEN
            PERFORM pg_notify(pg_layer_notification_channel(_released.address), 'J ' || _released.first);
        END IF;
    END LOOP;
END
$$;

-- Raise the low ids of addresses: to the first message that waits there, or to _low_id, whichever is smaller.
--   _low_id: a row that is not visible now has a larger id, unless it is a released job
CREATE FUNCTION pg_layer_keep_low_ids(_addresses text[], _low_id bigint) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE
    _address text;
    _kept pg_layer_low_id;
    _first bigint;
BEGIN
    FOR _address IN SELECT a.address FROM unnest(_addresses) AS a (address) ORDER BY a.address COLLATE "C" LOOP
        -- Locked before the look. Who releases jobs locks it as well, so that they are either visible to the look or lower the id later.
        SELECT l.* INTO _kept FROM pg_layer_low_id AS l WHERE l.address = _address FOR UPDATE SKIP LOCKED;
        IF NOT FOUND THEN
            INSERT INTO pg_layer_low_id AS l (address, low_id, kept_on) VALUES (_address, 0, current_date)
            ON CONFLICT DO NOTHING RETURNING l.* INTO _kept;
            CONTINUE WHEN NOT FOUND;
        END IF;
        -- Not at each heartbeat: versions of the row stay for as long as an old snapshot.
        CONTINUE WHEN _low_id < _kept.low_id + 1000 AND _kept.kept_on = current_date;
        SELECT m.id INTO _first FROM pg_layer_message AS m
        WHERE m.address = _address AND m.id >= _kept.low_id AND m.expires_at > clock_timestamp() AND m.kind = 'message'
        ORDER BY m.id LIMIT 1;
        UPDATE pg_layer_low_id AS l SET low_id = greatest(_kept.low_id, least(coalesce(_first, _low_id), _low_id)), kept_on = current_date
        WHERE l.address = _address;
    END LOOP;
END
$$;
