-- Clients and their leases: see docs/protocols.md, section 5.

-- Renew a client's lease, or begin it. With a token, ring a ping: a listener that does not hear it is deaf.
--   _known_boot: the boot of the client's cursor, or 0
--   _swept_to: messages that expired before this (seconds since 1970) have been deleted
--   _marked_from: the id after which marked rows are of interest
--   _addresses, _low_id: addresses whose low id is kept, and the cursor's: see pg_layer_keep_low_ids
--   returns: the database's clock (seconds since 1970); whether the lease begins, or had been over, so that rows of memberships may be
--       missing; whether it had been over; boot, largest id and next transaction as of pg_layer_position, then the snapshot; whether there is something to delete, and
--       whether there are marked rows
CREATE FUNCTION pg_layer_renew(
    _prefix text, _address text, _host text, _pid integer, _lease float8, _fence bigint, _counters jsonb, _token text,
    _known_boot bigint, _swept_to float8, _marked_from bigint, _addresses text[] DEFAULT '{}', _low_id bigint DEFAULT 0,
    OUT clock float8, OUT is_new boolean, OUT was_over boolean, OUT boot bigint, OUT last_id bigint, OUT next_xid bigint, OUT snapshot text,
    OUT has_expired boolean, OUT has_marked boolean
)
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE
    _now timestamptz := clock_timestamp();
    _client pg_layer_client;
BEGIN
    SELECT p.boot, p.last_id, p.next_xid INTO boot, last_id, next_xid FROM pg_layer_position(_known_boot) AS p;
    snapshot := pg_current_snapshot()::text;
    -- Locked, so that no sweep clears this client between the look and the renewal.
    SELECT * INTO _client FROM pg_layer_client AS c WHERE c.address = _address FOR UPDATE;
    is_new := _client.address IS NULL;
    was_over := NOT is_new AND (_client.swept_at IS NOT NULL OR pg_layer_is_over(_prefix, _client.expires_at, _client.lease));
    is_new := is_new OR was_over;
    -- A client that has closed has a new address when it is used again: a renewal that comes late does not revive it.
    IF _client.ended_at IS NULL THEN
        INSERT INTO pg_layer_client AS c (address, host, pid, expires_at, lease, fence, counters)
        VALUES (_address, _host, _pid, _now + make_interval(secs => _lease), _lease, _fence, _counters)
        ON CONFLICT (address) DO UPDATE SET expires_at = excluded.expires_at, lease = excluded.lease,
            fence = greatest(c.fence, excluded.fence), counters = excluded.counters;
        IF _client.swept_at IS NOT NULL THEN
            UPDATE pg_layer_client AS c SET swept_at = NULL WHERE c.address = _address;
        END IF;
        INSERT INTO pg_layer_lease_clock AS l (prefix, boot, lease, renewed_at, steady_since)
        VALUES (_prefix, pg_layer_renew.boot, _lease, _now, _now)
        ON CONFLICT (prefix) DO UPDATE SET renewed_at = excluded.renewed_at, boot = excluded.boot,
            -- A gap of half a lease: heartbeats come more often, and a lease that ends in an outage needs a longer one.
            steady_since = CASE WHEN l.boot = excluded.boot
                    AND l.renewed_at > excluded.renewed_at - make_interval(secs => greatest(l.lease, excluded.lease) / 2)
                THEN l.steady_since ELSE excluded.steady_since END,
            lease = CASE WHEN l.boot = excluded.boot
                    AND l.renewed_at > excluded.renewed_at - make_interval(secs => greatest(l.lease, excluded.lease) / 2)
                THEN greatest(l.lease, excluded.lease) ELSE excluded.lease END
        -- Not at each renewal of each client: versions of this row stay for as long as somebody's old snapshot.
        WHERE l.boot <> excluded.boot OR l.lease < excluded.lease
            OR l.renewed_at < excluded.renewed_at - make_interval(secs => l.lease / 10);
    END IF;
    has_expired := EXISTS (SELECT FROM pg_layer_message AS m
                           WHERE m.expires_at > to_timestamp(_swept_to) AND m.expires_at <= _now);
    has_marked := EXISTS (SELECT FROM pg_layer_message AS m WHERE m.marked AND m.id > _marked_from);
    -- Of an earlier boot the cursor's id says nothing: ids may have been drawn again.
    IF _low_id > 0 AND boot = _known_boot THEN
        PERFORM pg_layer_keep_low_ids(_addresses, _low_id);
    END IF;
    IF _token IS NOT NULL THEN
        PERFORM pg_notify(pg_layer_notification_channel(_address), 'P ' || _token);
    END IF;
    clock := extract(epoch FROM clock_timestamp());
END
$$;

-- A client gives up statements that it sent with a smaller number and has no answer to. A network may deliver them late: then they are
-- refused.
CREATE FUNCTION pg_layer_raise_fence(_address text, _fence bigint) RETURNS void
LANGUAGE sql AS $$
    UPDATE pg_layer_client AS c SET fence = greatest(c.fence, _fence) WHERE c.address = _address
$$;

-- A client's end: its jobs go back to their channels, and all else of it goes, up to _limit messages and memberships. What the caller leaves expires, or the sweeper removes it.
--   _quiet: do not announce the jobs
--   returns: whether nothing is left
CREATE FUNCTION pg_layer_close(
    _prefix text, _address text, _limit integer DEFAULT 5000, _quiet boolean DEFAULT false
) RETURNS boolean
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
    SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
DECLARE
    _boots bigint[];
    _xids bigint[];
    _ids bigint[];
    _messages bigint;
    _memberships bigint;
BEGIN
    -- Kept for a day, so that statements of the client that come late are refused.
    INSERT INTO pg_layer_client AS c (address, expires_at, lease, ended_at) VALUES (_address, clock_timestamp(), 0, clock_timestamp())
    ON CONFLICT (address) DO UPDATE SET expires_at = excluded.expires_at, ended_at = excluded.ended_at;
    WITH part AS MATERIALIZED (
        SELECT m.boot, m.xid, m.id, m.kind = 'message' AND position('!' IN m.channel) = 0 AS is_job FROM pg_layer_message AS m
        WHERE m.address = _address ORDER BY m.id LIMIT _limit
    ), gone AS (
        DELETE FROM pg_layer_message AS m
        WHERE m.address = _address AND m.id = ANY (ARRAY(SELECT p.id FROM part AS p WHERE NOT p.is_job))
    )
    SELECT count(*), array_agg(p.boot) FILTER (WHERE p.is_job), array_agg(p.xid::text::bigint) FILTER (WHERE p.is_job),
        array_agg(p.id) FILTER (WHERE p.is_job)
    INTO _messages, _boots, _xids, _ids FROM part AS p;
    IF _ids IS NOT NULL THEN
        PERFORM pg_layer_release(_prefix, _address, NULL, _boots, _xids, _ids, _quiet);
    END IF;
    _memberships := pg_layer_delete_memberships(_address, _limit);
    IF _memberships < _limit THEN
        UPDATE pg_layer_client AS c SET swept_at = c.ended_at
        WHERE c.address = _address AND NOT EXISTS (SELECT FROM pg_layer_membership AS m WHERE m.address = _address);
    END IF;
    DELETE FROM pg_layer_low_id AS l WHERE l.address = _address;
    RETURN _messages < _limit AND _memberships < _limit;
END
$$;

-- Delete up to _limit memberships of a client. Rows that others have locked are left for the next time.
CREATE FUNCTION pg_layer_delete_memberships(_address text, _limit integer) RETURNS bigint
LANGUAGE sql SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
    WITH part AS MATERIALIZED (
        SELECT m.ctid FROM pg_layer_membership AS m WHERE m.address = _address LIMIT _limit FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM pg_layer_membership AS m WHERE m.ctid = ANY (ARRAY(SELECT p.ctid FROM part AS p)) RETURNING 1
    )
    SELECT count(*) FROM gone
$$;

-- Remove up to _limit messages and memberships of a prefix each; when nothing is left, tell every client so in its one order.
--   returns: whether nothing is left; then the boot and transaction, and the id of the control message to _address, if it is among
--       the clients; all control messages, for whoever announces quiet ones
CREATE FUNCTION pg_layer_flush(
    _prefix text, _address text, _limit integer DEFAULT 5000, _quiet boolean DEFAULT false,
    OUT is_done boolean, OUT boot bigint, OUT xid bigint, OUT id bigint, OUT ids bigint[], OUT addresses text[]
)
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off
    SET enable_hashjoin = off SET enable_mergejoin = off SET jit = off AS $$
DECLARE
    _xid xid8;
BEGIN
    -- Under the lock nobody sends what the last part would leave. Rows that others have locked are left, as all who send wait for this
    -- one: those of open transactions, and jobs that are claimed or released just now.
    SELECT w.xid, w.boot INTO _xid, boot FROM pg_layer_begin_write(true) AS w;
    xid := _xid::text::bigint;
    WITH part AS MATERIALIZED (
        SELECT m.ctid FROM pg_layer_message AS m
        WHERE m.address >= _prefix || '!' AND m.address < _prefix || '"' ORDER BY m.address, m.id LIMIT _limit
        FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM pg_layer_message AS m WHERE m.ctid = ANY (ARRAY(SELECT p.ctid FROM part AS p))
    )
    SELECT count(*) < _limit INTO is_done FROM part;
    WITH part AS MATERIALIZED (
        SELECT m.ctid FROM pg_layer_membership AS m
        WHERE m.address >= _prefix || '!' AND m.address < _prefix || '"' ORDER BY m.address LIMIT _limit
        FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM pg_layer_membership AS m WHERE m.ctid = ANY (ARRAY(SELECT p.ctid FROM part AS p))
    )
    SELECT is_done AND count(*) < _limit INTO is_done FROM part;
    IF NOT is_done THEN
        RETURN;
    END IF;
    WITH written AS (
        INSERT INTO pg_layer_message AS m (address, xid, boot, marked, kind, expires_at)
        SELECT c.address, _xid, pg_layer_flush.boot, _quiet, 'flush', clock_timestamp() + interval '1 day' FROM pg_layer_client AS c
        WHERE c.address >= _prefix || '!' AND c.address < _prefix || '"' AND c.ended_at IS NULL
        RETURNING m.id, m.address
    )
    SELECT array_agg(w.id), array_agg(w.address), max(w.id) FILTER (WHERE w.address = _address) INTO ids, addresses, id
    FROM (SELECT * FROM written AS w ORDER BY w.id) AS w;
    IF ids IS NOT NULL AND NOT _quiet THEN
        PERFORM pg_layer_announce(false, array_fill(boot, ARRAY[cardinality(ids)]), array_fill(_xid::text, ARRAY[cardinality(ids)]),
            ids, addresses, NULL, array_fill('flush'::text, ARRAY[cardinality(ids)]), NULL, NULL, NULL);
    END IF;
END
$$;
