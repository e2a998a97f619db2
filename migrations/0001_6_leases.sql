-- Clients: the fence, the heartbeat, the end of a client, and flush. See docs/protocols.md,
-- sections 5 and 7.

-- For SET search_path FROM CURRENT: see 0001_1_tables.sql.
SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

-- ------------------------------------------------------------------------- the fence

-- Raise an error if a client may no longer write with this fence: it has closed, or a larger fence
-- is in the table. The row is locked, so that a statement that raises the fence waits for the
-- calling statement.
--
-- A client without a row may write: a test suite may have emptied the table, and the next heartbeat
-- writes the row again.
--
--   Raises SQLSTATE 55000.
--   Called by the statements that carry a fence: pg_layer_write_memberships(), pg_layer_claim(),
--   pg_layer_release().
CREATE FUNCTION pg_layer_check_fence(_address text, _fence bigint) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    _may_write boolean;
BEGIN
    SELECT c.fence <= _fence AND c.ended_at IS NULL INTO _may_write
    FROM pg_layer_client AS c WHERE c.address = _address FOR SHARE;
    IF NOT _may_write THEN
        RAISE object_not_in_prerequisite_state
            USING MESSAGE = 'pg_layer: the client has closed, or has given this statement up.';
    END IF;
END
$$;

-- Raise the fence of a client. The client calls it before it repeats a statement whose outcome is
-- unknown: the network may deliver the earlier statement late, and it is then refused.
--
--   Called by clients (_db/queries/receive.py).
CREATE FUNCTION pg_layer_raise_fence(_address text, _fence bigint) RETURNS void
LANGUAGE sql
SET search_path FROM CURRENT
AS $$
    UPDATE pg_layer_client AS c SET fence = greatest(c.fence, _fence) WHERE c.address = _address
$$;

-- ------------------------------------------------------------------------- the heartbeat

-- Renew the lease of a client, or begin it. A heartbeat is one call of this function. It also
-- reports the client's counters, takes the snapshot that may become the cursor's, keeps low-water
-- ids, and sends the ping. A listener that does not receive the ping is deaf.
--
--   _lease: its length in seconds
--   _fence: the client's; a smaller one in the table is raised
--   _token: of the ping; null: send no ping
--   _known_boot: the boot of the client's cursor, or 0
--   _swept_to: messages that expired before this time (seconds since 1970) have been deleted
--   _marked_from: the id after which marked rows are of interest
--   _addresses, _low_id: addresses whose low-water ids this client keeps, and the low-water id of
--       its cursor: see pg_layer_keep_low_ids()
--   Returns:
--   clock: the time of the database, seconds since 1970
--   is_new: membership rows may be missing, because the lease begins or had been over
--   was_over: the lease had been over
--   boot, last_id, next_xid: as pg_layer_position(), from before the snapshot
--   snapshot: to become the cursor's when the ping is received
--   has_expired: there are expired messages to delete
--   has_marked: there are marked rows
--   Raises SQLSTATE 25006 on a standby.
--   Called by clients (_db/queries/lease.py).
CREATE FUNCTION pg_layer_renew(
    _prefix text, _address text, _host text, _pid integer, _lease float8, _fence bigint,
    _counters jsonb, _token text, _known_boot bigint, _swept_to float8, _marked_from bigint,
    _addresses text[] DEFAULT '{}', _low_id bigint DEFAULT 0,
    OUT clock float8, OUT is_new boolean, OUT was_over boolean, OUT boot bigint,
    OUT last_id bigint, OUT next_xid bigint, OUT snapshot text, OUT has_expired boolean,
    OUT has_marked boolean
)
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET enable_seqscan = off
SET enable_bitmapscan = off
SET jit = off
AS $$
DECLARE
    _now timestamptz := clock_timestamp();
    _client pg_layer_client;
BEGIN
    SELECT p.boot, p.last_id, p.next_xid INTO boot, last_id, next_xid
    FROM pg_layer_position(_known_boot) AS p;
    snapshot := pg_current_snapshot()::text;
    -- Lock the row: otherwise a sweep could remove the memberships of this client between the check
    -- and the renewal.
    SELECT * INTO _client FROM pg_layer_client AS c WHERE c.address = _address FOR UPDATE;
    is_new := _client.address IS NULL;
    was_over := NOT is_new AND (_client.swept_at IS NOT NULL
        OR pg_layer_is_over(_prefix, _client.expires_at, _client.lease));
    is_new := is_new OR was_over;
    -- A late renewal does not revive a client that has closed. When the layer is used again, it
    -- begins a client with a new address.
    IF _client.ended_at IS NULL THEN
        INSERT INTO pg_layer_client AS c (address, host, pid, expires_at, lease, fence, counters)
        VALUES (_address, _host, _pid, _now + make_interval(secs => _lease), _lease, _fence,
            _counters)
        ON CONFLICT (address) DO UPDATE SET expires_at = excluded.expires_at,
            lease = excluded.lease, fence = greatest(c.fence, excluded.fence),
            counters = excluded.counters;
        IF _client.swept_at IS NOT NULL THEN
            UPDATE pg_layer_client AS c SET swept_at = NULL WHERE c.address = _address;
        END IF;
        INSERT INTO pg_layer_lease_clock AS l (prefix, boot, lease, renewed_at, steady_since)
        VALUES (_prefix, pg_layer_renew.boot, _lease, _now, _now)
        ON CONFLICT (prefix) DO UPDATE SET renewed_at = excluded.renewed_at, boot = excluded.boot,
            -- A gap is half a lease without renewals. Heartbeats are more frequent, and a lease
            -- that expires in an outage needs a longer gap.
            steady_since = CASE
                WHEN l.boot = excluded.boot AND l.renewed_at > excluded.renewed_at
                    - make_interval(secs => greatest(l.lease, excluded.lease) / 2)
                THEN l.steady_since ELSE excluded.steady_since
            END,
            lease = CASE
                WHEN l.boot = excluded.boot AND l.renewed_at > excluded.renewed_at
                    - make_interval(secs => greatest(l.lease, excluded.lease) / 2)
                THEN greatest(l.lease, excluded.lease) ELSE excluded.lease
            END
        -- Not at each renewal: the versions of this row stay as long as any old snapshot does.
        WHERE l.boot <> excluded.boot OR l.lease < excluded.lease
            OR l.renewed_at < excluded.renewed_at - make_interval(secs => l.lease / 10);
    END IF;
    has_expired := EXISTS (
        SELECT FROM pg_layer_message AS m
        WHERE m.expires_at > to_timestamp(_swept_to) AND m.expires_at <= _now);
    has_marked := EXISTS (SELECT FROM pg_layer_message AS m WHERE m.marked AND m.id > _marked_from);
    -- The cursor's id is of its boot. In another boot ids may have been drawn again.
    IF _low_id > 0 AND boot = _known_boot THEN
        PERFORM pg_layer_keep_low_ids(_addresses, _low_id);
    END IF;
    IF _token IS NOT NULL THEN
        PERFORM pg_notify(pg_layer_notification_channel(_address), 'P ' || _token);
    END IF;
    clock := extract(epoch FROM clock_timestamp());
END
$$;

-- Raise the low-water ids of addresses: each to the first message that waits there or to _low_id,
-- whichever is smaller.
--
--   _low_id: a row that is not visible now has a larger id, unless it is a released job
--   Called by pg_layer_renew().
CREATE FUNCTION pg_layer_keep_low_ids(_addresses text[], _low_id bigint) RETURNS void
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
SET jit = off
AS $$
DECLARE
    _address text;
    _kept pg_layer_low_id;
    _first bigint;
BEGIN
    -- In the order of the addresses, as pg_layer_release() locks these rows.
    FOR _address IN
        SELECT a.address FROM unnest(_addresses) AS a (address) ORDER BY a.address COLLATE "C"
    LOOP
        -- Lock the row before the SELECT below. pg_layer_release() locks it as well. Released jobs
        -- are then either visible to the SELECT, or lower the id later.
        SELECT l.* INTO _kept
        FROM pg_layer_low_id AS l WHERE l.address = _address FOR UPDATE SKIP LOCKED;
        IF NOT FOUND THEN
            INSERT INTO pg_layer_low_id AS l (address, low_id, kept_on)
            VALUES (_address, 0, current_date)
            ON CONFLICT DO NOTHING RETURNING l.* INTO _kept;
            CONTINUE WHEN NOT FOUND;
        END IF;
        -- Not at each heartbeat: the versions of the row stay as long as any old snapshot does.
        CONTINUE WHEN _low_id < _kept.low_id + 1000 AND _kept.kept_on = current_date;
        SELECT m.id INTO _first FROM pg_layer_message AS m
        WHERE m.address = _address AND m.id >= _kept.low_id AND m.expires_at > clock_timestamp()
            AND m.kind = 'message'
        ORDER BY m.id LIMIT 1;
        UPDATE pg_layer_low_id AS l SET kept_on = current_date,
            low_id = greatest(_kept.low_id, least(coalesce(_first, _low_id), _low_id))
        WHERE l.address = _address;
    END LOOP;
END
$$;

-- ------------------------------------------------------------------------- the end of a client

-- Close a client: release its jobs, and delete its memberships and other messages. Rows that are
-- left after the caller's last call expire, or the sweeper removes them.
--
--   _limit: the number of messages, and of memberships, that one call handles
--   _quiet: do not announce the released jobs
--   Returns whether nothing is left.
--   Called by clients (_db/queries/lease.py), until nothing is left or the time is over.
CREATE FUNCTION pg_layer_close(
    _prefix text, _address text, _limit integer DEFAULT 5000, _quiet boolean DEFAULT false
) RETURNS boolean
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
    _boots bigint[];
    _xids bigint[];
    _ids bigint[];
    _messages bigint;
    _memberships bigint;
BEGIN
    -- The row stays for a day, so that late statements of the client are refused.
    INSERT INTO pg_layer_client AS c (address, expires_at, lease, ended_at)
    VALUES (_address, clock_timestamp(), 0, clock_timestamp())
    ON CONFLICT (address) DO UPDATE SET expires_at = excluded.expires_at,
        ended_at = excluded.ended_at;
    WITH part AS MATERIALIZED (
        SELECT m.boot, m.xid, m.id,
            m.kind = 'message' AND position('!' IN m.channel) = 0 AS is_job
        FROM pg_layer_message AS m
        WHERE m.address = _address ORDER BY m.id LIMIT _limit
    ), gone AS (
        DELETE FROM pg_layer_message AS m
        WHERE m.address = _address
            AND m.id = ANY (ARRAY(SELECT p.id FROM part AS p WHERE NOT p.is_job))
    )
    SELECT count(*), array_agg(p.boot) FILTER (WHERE p.is_job),
        array_agg(p.xid::text::bigint) FILTER (WHERE p.is_job),
        array_agg(p.id) FILTER (WHERE p.is_job)
    INTO _messages, _boots, _xids, _ids FROM part AS p;
    IF _ids IS NOT NULL THEN
        PERFORM pg_layer_release(_prefix, _address, NULL, _boots, _xids, _ids, _quiet);
    END IF;
    _memberships := pg_layer_delete_memberships(_address, _limit);
    IF _memberships < _limit THEN
        UPDATE pg_layer_client AS c SET swept_at = c.ended_at
        WHERE c.address = _address
            AND NOT EXISTS (SELECT FROM pg_layer_membership AS m WHERE m.address = _address);
    END IF;
    DELETE FROM pg_layer_low_id AS l WHERE l.address = _address;
    RETURN _messages < _limit AND _memberships < _limit;
END
$$;

-- Delete up to _limit memberships of a client. Rows that another transaction has locked stay.
--
--   Returns the number of deleted rows.
--   Called by pg_layer_close() and pg_layer_sweep().
CREATE FUNCTION pg_layer_delete_memberships(_address text, _limit integer) RETURNS bigint
LANGUAGE sql
SET search_path FROM CURRENT
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $$
    WITH part AS MATERIALIZED (
        SELECT m.ctid FROM pg_layer_membership AS m
        WHERE m.address = _address LIMIT _limit FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM pg_layer_membership AS m
        WHERE m.ctid = ANY (ARRAY(SELECT p.ctid FROM part AS p)) RETURNING 1
    )
    SELECT count(*) FROM gone
$$;

-- ------------------------------------------------------------------------- flush

-- Delete messages and memberships of a prefix. When nothing is left, write a control message to
-- each client. A client that has applied it deletes it, which confirms the flush.
--
--   _address: the calling client, if it receives: it gets a control message even if the table of
--       clients was emptied; otherwise null
--   _limit: the number of messages, and of memberships, that one call deletes
--   _quiet: see 0001_3_sending.sql
--   Returns in is_done whether nothing is left; boot and xid; in ids and addresses the control
--   messages. If _quiet, the caller must announce them.
--   Raises SQLSTATE 25006 on a standby.
--   Called by clients (_db/queries/lease.py), until is_done.
CREATE FUNCTION pg_layer_flush(
    _prefix text, _address text, _limit integer DEFAULT 5000, _quiet boolean DEFAULT false,
    OUT is_done boolean, OUT boot bigint, OUT xid bigint, OUT ids bigint[], OUT addresses text[]
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
    _xid xid8;
BEGIN
    -- The lock keeps statements from sending messages that the last call would not see. All senders
    -- wait for this transaction, so it leaves locked rows. Open transactions lock rows, and so
    -- do claims and releases of jobs.
    SELECT w.xid, w.boot INTO _xid, boot FROM pg_layer_begin_write(true) AS w;
    xid := _xid::text::bigint;
    WITH part AS MATERIALIZED (
        SELECT m.ctid FROM pg_layer_message AS m
        WHERE m.address >= _prefix || '!' AND m.address < _prefix || '"'
            -- Only the last call replaces these. Their absence would mean that they were applied.
            AND m.kind <> 'flush'
        ORDER BY m.address, m.id LIMIT _limit
        FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM pg_layer_message AS m WHERE m.ctid = ANY (ARRAY(SELECT p.ctid FROM part AS p))
    )
    SELECT count(*) < _limit INTO is_done FROM part;
    WITH part AS MATERIALIZED (
        SELECT m.ctid FROM pg_layer_membership AS m
        WHERE m.address >= _prefix || '!' AND m.address < _prefix || '"'
        ORDER BY m.address LIMIT _limit
        FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM pg_layer_membership AS m
        WHERE m.ctid = ANY (ARRAY(SELECT p.ctid FROM part AS p))
    )
    SELECT is_done AND count(*) < _limit INTO is_done FROM part;
    IF NOT is_done THEN
        RETURN;
    END IF;
    -- The new control message counts for those of earlier flushes. It keeps the time of the
    -- earliest: since then the client has not confirmed.
    WITH client AS MATERIALIZED (
        SELECT c.address FROM pg_layer_client AS c
        WHERE c.address >= _prefix || '!' AND c.address < _prefix || '"' AND c.ended_at IS NULL
        UNION SELECT _address WHERE _address IS NOT NULL
    ), earlier AS MATERIALIZED (
        SELECT m.* FROM client AS c CROSS JOIN LATERAL (
            SELECT m.ctid, m.address, m.sent_at FROM pg_layer_message AS m
            WHERE m.address = c.address AND m.kind = 'flush'
            FOR UPDATE SKIP LOCKED
        ) AS m
    ), replaced AS (
        DELETE FROM pg_layer_message AS m WHERE m.ctid = ANY (ARRAY(SELECT e.ctid FROM earlier AS e))
    ), written AS (
        INSERT INTO pg_layer_message AS m (address, xid, boot, marked, kind, sent_at, expires_at)
        SELECT c.address, _xid, pg_layer_flush.boot, _quiet, 'flush',
            coalesce((SELECT min(e.sent_at) FROM earlier AS e WHERE e.address = c.address),
                clock_timestamp()),
            clock_timestamp() + interval '1 day'
        FROM client AS c
        RETURNING m.id, m.address
    )
    SELECT array_agg(w.id), array_agg(w.address) INTO ids, addresses
    FROM (SELECT * FROM written AS w ORDER BY w.id) AS w;
    IF ids IS NOT NULL AND NOT _quiet THEN
        PERFORM pg_layer_announce(false, array_fill(boot, ARRAY[cardinality(ids)]),
            array_fill(_xid::text, ARRAY[cardinality(ids)]), ids, addresses, NULL,
            array_fill('flush'::text, ARRAY[cardinality(ids)]), NULL, NULL, NULL);
    END IF;
END
$$;
