-- Sweeping: each call removes one part of bounded size.
--
-- The rows of a part are locked, and deleted by their places in the table (ctid). If they were
-- joined by their keys, a planner with the statistics of an empty table would walk a whole index,
-- dead entries included. A row that was updated meanwhile stays for the next part.

-- For SET search_path FROM CURRENT: see 0001_1_tables.sql.
SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

-- Delete expired messages of all prefixes, in the order in which they expired.
--
--   _after: messages that expired before this time (seconds since 1970) stay, because an earlier
--       part has deleted them. Messages that were written with an end in the past need a pass from
--       0.
--   _limit: the largest number of messages
--   Returns the number of deleted messages, and in last the _after of the next part: the end of the
--   last deleted message. If there are no more messages, at least a minute ago, because messages
--   are committed a moment after their ends were computed.
--   Called by clients at heartbeats (_db/queries/maintenance.py) and by pg_layer_sweep().
CREATE FUNCTION pg_layer_delete_expired(
    _after float8, _limit integer, OUT count bigint, OUT last float8
)
LANGUAGE sql
SET search_path FROM CURRENT
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $$
    WITH expired AS MATERIALIZED (
        SELECT m.ctid FROM pg_layer_message AS m
        WHERE m.expires_at >= CASE WHEN _after > 0 THEN to_timestamp(_after) ELSE '-infinity' END
            -- In a subquery it is computed once. A volatile function cannot be an index condition.
            AND m.expires_at <= (SELECT clock_timestamp())
        ORDER BY m.expires_at LIMIT _limit FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM pg_layer_message AS m
        WHERE m.ctid = ANY (ARRAY(SELECT e.ctid FROM expired AS e)) RETURNING m.expires_at
    )
    SELECT count(*), CASE
        WHEN count(*) < _limit THEN greatest(max(extract(epoch FROM g.expires_at)), _after,
            extract(epoch FROM clock_timestamp()) - 60)
        ELSE max(extract(epoch FROM g.expires_at))
    END::float8
    FROM gone AS g
$$;

-- Remove up to _limit of each kind: expired messages, membership requests that no longer count,
-- memberships of clients whose lease is over, and clients that ended over a day ago. Rows that
-- other transactions have locked stay for the next part, so that several sweepers may run at the
-- same time.
--
--   _alone: sweep only if no other session sweeps this prefix right now
--   _after: as for pg_layer_delete_expired()
--   Returns the number of removed rows of each kind, and in last the _after of the next part. All
--   null if _alone and another session sweeps.
--   Called by clients every sweep_interval, and by the command (_db/queries/maintenance.py).
--   pg_layer_sweepable() below counts by the same rules: change both.
CREATE FUNCTION pg_layer_sweep(
    _prefix text, _limit integer, _alone boolean, _after float8,
    OUT messages bigint, OUT memberships bigint, OUT clients bigint, OUT last float8
)
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
SET enable_bitmapscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $$
DECLARE
    _now timestamptz := clock_timestamp();
    _address text;
    _is_done boolean := true;
BEGIN
    IF _alone AND NOT pg_try_advisory_xact_lock(
        hashtextextended('pg_layer_sweep ' || _prefix, 0))
    THEN
        RETURN;
    END IF;
    SELECT d.count, d.last INTO messages, last FROM pg_layer_delete_expired(_after, _limit) AS d;
    _is_done := messages < _limit;

    -- Requests that have expired. An owner deletes the requests about its channels. They stay for a
    -- day, because an owner that is late still needs them: messages to a group without rows are not
    -- written.
    WITH over AS MATERIALIZED (
        SELECT m.ctid FROM pg_layer_membership AS m
        WHERE m.id <> 0
            AND m.expires_at <= _now
                - CASE WHEN position('!:' IN m.address) = 0 THEN interval '1 day'
                    ELSE interval '0' END
            AND m.expires_at <= _now
            -- A range of addresses would make the planner choose another index.
            AND split_part(m.address, '!', 1) = _prefix
        ORDER BY m.expires_at LIMIT _limit FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM pg_layer_membership AS m
        WHERE m.ctid = ANY (ARRAY(SELECT o.ctid FROM over AS o)) RETURNING 1
    )
    SELECT count(*) INTO memberships FROM gone;
    -- Requests about normal channels that a later request has replaced.
    WITH over AS MATERIALIZED (
        SELECT m.ctid FROM pg_layer_membership AS m
        WHERE m.id <> 0 AND m.address >= _prefix || '!:' AND m.address < _prefix || '!;'
            -- Whether the next request in order is about the same membership. If the columns were
            -- compared one by one, the planner might walk all requests of the address by the other
            -- index.
            AND (NOT m.present OR (
                SELECT (n.group_name, n.address, n.channel) = (m.group_name, m.address, m.channel)
                FROM pg_layer_membership AS n
                WHERE (n.group_name, n.address, n.channel, n.id)
                    > (m.group_name, m.address, m.channel, m.id)
                ORDER BY n.group_name, n.address, n.channel, n.id LIMIT 1))
        LIMIT _limit FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM pg_layer_membership AS m
        WHERE m.ctid = ANY (ARRAY(SELECT o.ctid FROM over AS o))
            -- A request with "not present" is deleted after all earlier ones, which would count
            -- again otherwise.
            AND (m.present OR coalesce((
                SELECT (n.group_name, n.address, n.channel) <> (m.group_name, m.address, m.channel)
                FROM pg_layer_membership AS n
                WHERE (n.group_name, n.address, n.channel, n.id)
                    < (m.group_name, m.address, m.channel, m.id)
                ORDER BY n.group_name DESC, n.address DESC, n.channel DESC, n.id DESC LIMIT 1
            ), true))
        RETURNING 1
    )
    SELECT memberships + count(*) INTO memberships FROM gone;
    _is_done := _is_done AND memberships < _limit;

    -- Memberships of clients that have closed or whose lease is over. Their messages stay until
    -- they expire: a client that was stopped reads them when it returns. The row of the client is
    -- locked, so that the client renews before or after the removal.
    FOR _address IN
        SELECT c.address FROM pg_layer_client AS c
        -- A range of addresses or an order would make the planner choose the index of all clients.
        -- The session would then walk the swept ones each time.
        WHERE c.swept_at IS NULL AND split_part(c.address, '!', 1) = _prefix
            AND (c.ended_at IS NOT NULL OR pg_layer_is_over(_prefix, c.expires_at, c.lease))
        FOR UPDATE SKIP LOCKED
    LOOP
        IF memberships >= _limit THEN
            _is_done := false;
            EXIT;
        END IF;
        memberships := memberships + pg_layer_delete_memberships(_address, _limit);
        IF NOT EXISTS (SELECT FROM pg_layer_membership AS m WHERE m.address = _address) THEN
            UPDATE pg_layer_client AS c SET swept_at = _now WHERE c.address = _address;
        ELSE
            _is_done := false;
        END IF;
    END LOOP;

    -- Low-water ids that no client keeps any longer. Without a row, counts begin with the first id.
    WITH old AS MATERIALIZED (
        SELECT l.ctid FROM pg_layer_low_id AS l
        WHERE l.kept_on < current_date - 1 LIMIT _limit FOR UPDATE SKIP LOCKED
    )
    DELETE FROM pg_layer_low_id AS l WHERE l.ctid = ANY (ARRAY(SELECT o.ctid FROM old AS o));

    -- Clients that ended a day ago.
    WITH old AS MATERIALIZED (
        SELECT c.ctid FROM pg_layer_client AS c
        WHERE (c.ended_at IS NOT NULL OR c.swept_at IS NOT NULL)
            AND coalesce(c.ended_at, c.swept_at) <= _now - interval '1 day'
            AND split_part(c.address, '!', 1) = _prefix
        ORDER BY coalesce(c.ended_at, c.swept_at) LIMIT _limit FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM pg_layer_client AS c
        WHERE c.ctid = ANY (ARRAY(SELECT o.ctid FROM old AS o)) RETURNING 1
    )
    SELECT count(*) INTO clients FROM gone;
    IF _is_done AND clients < _limit THEN
        INSERT INTO pg_layer_last_sweep AS l (prefix, swept_at) VALUES (_prefix, _now)
        ON CONFLICT (prefix) DO UPDATE SET swept_at = greatest(l.swept_at, excluded.swept_at);
    END IF;
END
$$;

-- Return how many rows of each kind pg_layer_sweep() would remove without a limit.
--
--   Called by the command pg_layer_sweep --dry-run (_db/queries/maintenance.py).
CREATE FUNCTION pg_layer_sweepable(
    _prefix text, OUT messages bigint, OUT memberships bigint, OUT clients bigint
)
LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
    WITH over AS (
        SELECT c.address FROM pg_layer_client AS c
        WHERE c.address >= _prefix || '!' AND c.address < _prefix || '"' AND c.swept_at IS NULL
            AND (c.ended_at IS NOT NULL OR pg_layer_is_over(_prefix, c.expires_at, c.lease))
    )
    SELECT
        (SELECT count(*) FROM pg_layer_message AS m WHERE m.expires_at <= clock_timestamp()),
        (SELECT count(*) FROM pg_layer_membership AS m
         WHERE m.address >= _prefix || '!' AND m.address < _prefix || '"'
            AND (m.address IN (SELECT o.address FROM over AS o)
                OR m.id <> 0 AND CASE
                    WHEN position('!:' IN m.address) = 0
                        THEN m.expires_at <= clock_timestamp() - interval '1 day'
                    ELSE m.expires_at <= clock_timestamp() OR NOT m.present OR (
                        SELECT (n.group_name, n.address, n.channel)
                            = (m.group_name, m.address, m.channel)
                        FROM pg_layer_membership AS n
                        WHERE (n.group_name, n.address, n.channel, n.id)
                            > (m.group_name, m.address, m.channel, m.id)
                        ORDER BY n.group_name, n.address, n.channel, n.id LIMIT 1)
                END)),
        (SELECT count(*) FROM pg_layer_client AS c
         WHERE c.address >= _prefix || '!' AND c.address < _prefix || '"'
            AND coalesce(c.ended_at, c.swept_at) <= clock_timestamp() - interval '1 day')
$$;
