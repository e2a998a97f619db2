-- Jobs, the messages to normal channels: see docs/protocols.md, section 6.

-- For SET search_path FROM CURRENT: see 0001_1_tables.sql.
SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

-- Claim jobs of a normal channel: move the oldest ones to the address of a client. No other client
-- can claim them then. The transaction commits durably: if a crash of the server undid it, the same
-- jobs would be handed out twice.
--
--   _address, _fence: of the client
--   _low_id: the low-water id of the channel that the client knows; 0: unknown
--   _limit: the largest number of jobs
--   Returns the rows after the move, in no order.
--   Raises SQLSTATE 55000 if the fence is too small, and 25006 on a standby.
--   Called by clients (_db/queries/receive.py).
CREATE FUNCTION pg_layer_claim(
    _prefix text, _channel text, _address text, _fence bigint, _low_id bigint, _limit integer
)
RETURNS TABLE (
    address text, id bigint, xid bigint, boot bigint, marked boolean, kind text, channel text,
    excluded text, payload bytea, expires_at float8
)
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $$
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
        WHERE m.address = pg_layer_address(_prefix, _channel) AND m.id >= _low_id
            AND m.expires_at > clock_timestamp()
        ORDER BY m.id LIMIT _limit
        FOR UPDATE SKIP LOCKED
    )
    UPDATE pg_layer_message AS m
    SET address = _address, xid = pg_current_xact_id(), boot = _boot, marked = false
    WHERE m.address = pg_layer_address(_prefix, _channel)
        AND m.id = ANY (ARRAY(SELECT p.id FROM picked AS p))
    RETURNING m.address, m.id, m.xid::text::bigint, m.boot, m.marked, m.kind, m.channel,
        m.excluded, m.payload, extract(epoch FROM m.expires_at)::float8;
END
$$;

-- Release claimed jobs: move them back to their channels. They keep their ids and the times at
-- which they expire.
--
--   _fence: as in pg_layer_claim(); null: the client closes
--   _boots, _xids, _ids: one element per job
--   _quiet: do not announce the jobs
--   Raises SQLSTATE 55000 if the fence is too small.
--   Called by clients (_db/queries/receive.py) and by pg_layer_close().
CREATE FUNCTION pg_layer_release(
    _prefix text, _address text, _fence bigint, _boots bigint[], _xids bigint[], _ids bigint[],
    _quiet boolean DEFAULT false
) RETURNS void
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $$
DECLARE
    _distinct_xids xid8[] := ARRAY(SELECT DISTINCT x::text::xid8 FROM unnest(_xids) AS x);
    _released record;
BEGIN
    IF _fence IS NOT NULL THEN
        PERFORM pg_layer_check_fence(_address, _fence);
        -- Commit durably. Otherwise a crash could undo the release, and the client would count
        -- these jobs as received.
        IF current_setting('synchronous_commit') = 'off' THEN
            PERFORM set_config('synchronous_commit', 'on', true);
        END IF;
    END IF;
    FOR _released IN
        WITH moved AS (
            UPDATE pg_layer_message AS m SET address = pg_layer_address(_prefix, m.channel)
            WHERE m.address = _address AND m.id = ANY (_ids) AND m.xid = ANY (_distinct_xids)
                AND m.boot = ANY (_boots)
            RETURNING m.address, m.id
        )
        SELECT b.address, min(b.id) AS first FROM moved AS b GROUP BY b.address ORDER BY b.address
    LOOP
        -- Write the row also if there is none yet: pg_layer_keep_low_ids() must not raise the id
        -- while it cannot see the released jobs.
        INSERT INTO pg_layer_low_id AS l (address, low_id, kept_on)
        VALUES (_released.address, 0, current_date)
        ON CONFLICT (address) DO UPDATE SET low_id = least(l.low_id, _released.first);
        IF NOT _quiet THEN
            PERFORM pg_notify(
                pg_layer_notification_channel(_released.address), 'J ' || _released.first);
        END IF;
    END LOOP;
END
$$;
