-- Clients and their leases: see docs/protocols.md, section 5.

-- Renew a client's lease, or begin it. With a token, ring a ping: a listener that does not hear it is deaf.
--   _known_boot: the boot of the client's cursor, or 0
--   _swept_to: messages that expired before this (seconds since 1970) have been deleted
--   _marked_from: the id after which marked rows are of interest
--   returns: the database's clock (seconds since 1970); whether the lease begins, or had been over, so that rows of memberships may be
--       missing; whether it had been over; boot, largest id and next transaction as of pg_layer_position, then the snapshot; whether there is something to delete, and
--       whether there are marked rows
CREATE FUNCTION pg_layer_renew(
    _prefix text, _address text, _host text, _pid integer, _lease float8, _fence bigint, _counters jsonb, _token text,
    _known_boot bigint, _swept_to float8, _marked_from bigint,
    OUT clock float8, OUT is_new boolean, OUT was_over boolean, OUT boot bigint, OUT last_id bigint, OUT next_xid bigint, OUT snapshot text,
    OUT has_expired boolean, OUT has_marked boolean
)
LANGUAGE plpgsql SET enable_seqscan = off AS $$
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

-- A client's end: the rows that it names were received, its other jobs go back to their channels, and all else of it goes.
CREATE FUNCTION pg_layer_close(_prefix text, _address text, _done_ids bigint[], _done_xids bigint[]) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET jit = off AS $$
DECLARE
    _ids bigint[];
    _xids bigint[];
BEGIN
    -- Kept for a day, so that statements of the client that come late are refused.
    INSERT INTO pg_layer_client AS c (address, expires_at, lease, ended_at) VALUES (_address, clock_timestamp(), 0, clock_timestamp())
    ON CONFLICT (address) DO UPDATE SET expires_at = excluded.expires_at, ended_at = excluded.ended_at;
    PERFORM pg_layer_delete(_address, _done_ids, _done_xids);
    SELECT array_agg(m.id), array_agg(m.xid::text::bigint) INTO _ids, _xids
    FROM pg_layer_message AS m WHERE m.address = _address AND m.kind = 'message' AND position('!' IN m.channel) = 0;
    PERFORM pg_layer_release(_prefix, _address, NULL, _ids, _xids);
    DELETE FROM pg_layer_message AS m WHERE m.address = _address;
    DELETE FROM pg_layer_membership AS m WHERE m.address = _address;
END
$$;

-- Remove all messages and memberships of a prefix, and tell every client so in its one order.
--   returns: the boot and transaction, and the id of the control message to _address, if it is among the clients
CREATE FUNCTION pg_layer_flush(_prefix text, _address text, OUT boot bigint, OUT xid bigint, OUT id bigint)
LANGUAGE plpgsql AS $$
DECLARE
    _xid xid8;
    _ids bigint[];
    _addresses text[];
BEGIN
    SELECT w.xid, w.boot INTO _xid, boot FROM pg_layer_begin_write(true) AS w;
    xid := _xid::text::bigint;
    DELETE FROM pg_layer_message AS m WHERE m.address >= _prefix || '!' AND m.address < _prefix || '"';
    DELETE FROM pg_layer_membership AS m WHERE m.address >= _prefix || '!' AND m.address < _prefix || '"';
    WITH written AS (
        INSERT INTO pg_layer_message AS m (address, xid, boot, kind, expires_at)
        SELECT c.address, _xid, pg_layer_flush.boot, 'flush', clock_timestamp() + interval '1 day' FROM pg_layer_client AS c
        WHERE c.address >= _prefix || '!' AND c.address < _prefix || '"' AND c.ended_at IS NULL AND c.swept_at IS NULL
        RETURNING m.id, m.address
    )
    SELECT array_agg(w.id), array_agg(w.address), max(w.id) FILTER (WHERE w.address = _address) INTO _ids, _addresses, id
    FROM (SELECT * FROM written AS w ORDER BY w.id) AS w;
    IF _ids IS NOT NULL THEN
        PERFORM pg_layer_announce(false, array_fill(boot, ARRAY[cardinality(_ids)]), array_fill(_xid::text, ARRAY[cardinality(_ids)]),
            _ids, _addresses, NULL, array_fill('flush'::text, ARRAY[cardinality(_ids)]), NULL, NULL, NULL);
    END IF;
END
$$;
