-- Memberships and leases that are over: see docs/protocols.md, sections 4 and 5.
--
-- A membership request is a row of pg_layer_membership with an id above 0: see 0001_1_tables.sql.

-- For SET search_path FROM CURRENT: see 0001_1_tables.sql.
SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

-- ------------------------------------------------------------------------- what counts

-- Return whether the membership rows of a prefix are known to be complete. The condition: in this
-- boot, leases have been renewed without a gap for a whole lease, and still are.
--
--   _boot: the current boot
--   Called by pg_layer_group_send_batch(), which skips groups without rows only then.
CREATE FUNCTION pg_layer_is_steady(_prefix text, _boot bigint) RETURNS boolean
LANGUAGE sql STABLE AS $$
    SELECT coalesce((
        SELECT l.boot = _boot
            AND l.steady_since <= clock_timestamp() - make_interval(secs => l.lease)
            AND l.renewed_at > clock_timestamp() - make_interval(secs => l.lease / 2)
        FROM pg_layer_lease_clock AS l WHERE l.prefix = _prefix), false)
$$;

-- Return whether the lease of a client is over. The condition: it has expired, and clients of the
-- prefix have renewed their leases without a gap for as long as the lease, and still do.
--
-- now() and not clock_timestamp(): a lease that was valid when the transaction began counts as
-- valid. A transaction with one snapshot does not see later renewals.
--
-- search_path is set because the view pg_layer_group calls this function with the path of its
-- reader.
--
--   _expires_at, _lease: of the client; _lease in seconds
--   Called by the functions that count members, renew and sweep, and by the view.
CREATE FUNCTION pg_layer_is_over(_prefix text, _expires_at timestamptz, _lease float8)
RETURNS boolean
LANGUAGE sql STABLE
SET search_path FROM CURRENT
AS $$
    SELECT _expires_at <= now() AND coalesce((
        SELECT l.boot = (SELECT b.boot FROM pg_layer_boot AS b)
            AND l.steady_since <= now() - make_interval(secs => _lease)
            AND l.renewed_at > now() - make_interval(secs => l.lease / 2)
        FROM pg_layer_lease_clock AS l WHERE l.prefix = _prefix), false)
$$;

-- Return the normal channels in a group, with their capacities.
--
--   Called by pg_layer_group_send_batch().
CREATE FUNCTION pg_layer_normal_members(_prefix text, _group text)
RETURNS TABLE (group_name text, channel text, capacity integer)
LANGUAGE sql STABLE AS $$
    SELECT c.group_name, c.channel, c.capacity
    FROM (
        SELECT DISTINCT ON (m.channel) m.* FROM pg_layer_membership AS m
        WHERE m.group_name = _group AND m.address >= _prefix || '!:' AND m.address < _prefix || '!;'
            AND m.expires_at > clock_timestamp()
        ORDER BY m.channel, m.id DESC
    ) AS c
    WHERE c.present
$$;

-- Return the channels in a group, except the channels of clients that have closed or whose lease is
-- over.
--
--   Called by clients (_db/queries/groups.py).
CREATE FUNCTION pg_layer_group_channels(_prefix text, _group text) RETURNS SETOF text
LANGUAGE sql STABLE
SET search_path FROM CURRENT
SET enable_seqscan = off
SET jit = off
AS $$
    WITH member AS MATERIALIZED (
        SELECT DISTINCT ON (m.address, m.channel) m.address, m.channel, m.present
        FROM pg_layer_membership AS m
        WHERE m.group_name = _group AND m.address > _prefix || '!' AND m.address < _prefix || '"'
            AND m.expires_at > clock_timestamp()
        ORDER BY m.address, m.channel, m.id DESC
    ), gone AS MATERIALIZED (
        SELECT l.address
        FROM (SELECT DISTINCT m.address FROM member AS m) AS a
        JOIN pg_layer_client AS l ON l.address = a.address
        WHERE l.ended_at IS NOT NULL OR l.swept_at IS NOT NULL
            OR pg_layer_is_over(_prefix, l.expires_at, l.lease)
    )
    SELECT m.channel FROM member AS m
    WHERE m.present AND m.address NOT IN (SELECT g.address FROM gone AS g)
    ORDER BY m.address, m.channel
$$;

-- All groups that have members, with the number of members. The key is unique among all prefixes.
CREATE VIEW pg_layer_group AS
    WITH gone AS MATERIALIZED (
        SELECT l.address FROM pg_layer_client AS l
        WHERE l.ended_at IS NOT NULL OR l.swept_at IS NOT NULL
            OR pg_layer_is_over(split_part(l.address, '!', 1), l.expires_at, l.lease)
    )
    SELECT c.prefix || '!' || c.group_name AS key, c.prefix, c.group_name, count(*) AS members,
        count(DISTINCT c.address) AS addresses
    FROM (
        SELECT DISTINCT ON (m.group_name, m.address, m.channel)
            split_part(m.address, '!', 1) AS prefix, m.group_name, m.address, m.present
        FROM pg_layer_membership AS m
        WHERE m.expires_at > clock_timestamp()
        ORDER BY m.group_name, m.address, m.channel, m.id DESC
    ) AS c
    WHERE c.present AND c.address NOT IN (SELECT g.address FROM gone AS g)
    GROUP BY c.prefix, c.group_name;

-- ------------------------------------------------------------------------- changes by the owner

-- Write the membership rows of an owner (id 0). A pair of group and channel occurs only once in the
-- arguments.
--
--   _groups, _channels: the memberships that exist
--   _ttls: seconds until each of them ends; null: with the lease of the client
--   _gone_groups, _gone_channels: the memberships that have ended
--   _request_groups, _request_channels, _request_ids: requests up to these ids have been applied by
--       the owner, and are deleted
--   Returns the boot and the snapshot: the moment in which new memberships begin.
--   Raises SQLSTATE 55000 if the fence is too small, and 25006 on a standby.
--   Called by the owner (_db/queries/groups.py).
CREATE FUNCTION pg_layer_write_memberships(
    _address text, _fence bigint, _groups text[], _channels text[], _ttls float8[],
    _gone_groups text[], _gone_channels text[],
    _request_groups text[], _request_channels text[], _request_ids bigint[],
    OUT boot bigint, OUT snapshot text
)
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $$
DECLARE
    _now timestamptz := clock_timestamp();
BEGIN
    PERFORM pg_layer_check_fence(_address, _fence);
    IF cardinality(_request_groups) > 0 THEN
        DELETE FROM pg_layer_membership AS m WHERE m.ctid = ANY (ARRAY(
            SELECT m.ctid
            FROM unnest(_request_groups, _request_channels, _request_ids)
                AS r (group_name, channel, id)
            CROSS JOIN LATERAL (
                SELECT m.ctid FROM pg_layer_membership AS m
                WHERE m.group_name = r.group_name AND m.address = _address
                    AND m.channel = r.channel AND m.id BETWEEN 1 AND r.id
                OFFSET 0
            ) AS m));
    END IF;
    IF cardinality(_gone_groups) > 0 THEN
        DELETE FROM pg_layer_membership AS m WHERE m.ctid = ANY (ARRAY(
            SELECT m.ctid
            FROM unnest(_gone_groups, _gone_channels) AS g (group_name, channel)
            CROSS JOIN LATERAL (
                SELECT m.ctid FROM pg_layer_membership AS m
                WHERE m.group_name = g.group_name AND m.address = _address
                    AND m.channel = g.channel AND m.id = 0
                OFFSET 0
            ) AS m));
    END IF;
    IF cardinality(_groups) > 0 THEN
        INSERT INTO pg_layer_membership AS m (group_name, address, channel, expires_at)
        SELECT j.group_name, _address, j.channel,
            CASE WHEN j.ttl IS NULL THEN 'infinity' ELSE _now + make_interval(secs => j.ttl) END
        FROM unnest(_groups, _channels, _ttls) AS j (group_name, channel, ttl)
        ON CONFLICT (group_name, address, channel, id)
            DO UPDATE SET expires_at = excluded.expires_at, present = true;
    END IF;
    boot := pg_layer_current_boot();
    snapshot := pg_current_snapshot()::text;
END
$$;

-- ------------------------------------------------------------------------- membership requests

-- Request that channels are added to groups or discarded.
--
-- For a specific channel the statement writes a control message, which the owner applies in its one
-- order. It also writes a request row, which counts until the owner has written its own row. A
-- normal channel has no owner: its request row is the membership.
--
--   _groups, _channels: one element per change; a pair occurs only once
--   _adds: whether the channel is added
--   _expiry: seconds that a membership lasts; null: as long as the lease
--   _capacities: of the channels
--   _request_seconds: for how long a request about a specific channel counts
--   _own, _quiet: see 0001_3_sending.sql
--   _requester, _number: the requesting client and the number of the statement. The owner ignores a
--       statement that arrives after one with a larger number. Null in a transaction of the
--       application.
--   Returns the rows of the control messages. If _quiet, the caller must announce them.
--   Raises SQLSTATE 25006 on a standby.
--   Called by clients (_db/queries/groups.py).
CREATE FUNCTION pg_layer_request_memberships(
    _prefix text, _groups text[], _channels text[], _adds boolean[], _expiry float8,
    _capacities integer[], _request_seconds float8, _own boolean, _quiet boolean,
    _requester text DEFAULT NULL, _number bigint DEFAULT NULL,
    OUT ids bigint[], OUT addresses text[], OUT channels text[], OUT kinds text[],
    OUT payloads bytea[], OUT xid bigint, OUT boot bigint
)
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET jit = off
AS $$
DECLARE
    _now timestamptz := clock_timestamp();
    _expires_at timestamptz := CASE
        WHEN _expiry IS NULL THEN 'infinity'
        ELSE _now + make_interval(secs => _expiry)
    END;
    _control_end timestamptz := _now + interval '1 day';
    _xid xid8;
    _requests bigint[];
BEGIN
    SELECT w.xid, w.boot INTO _xid, boot FROM pg_layer_begin_write(_own) AS w;
    xid := _xid::text::bigint;
    SELECT array_agg(nextval('pg_layer_message_id_seq')) INTO _requests
    FROM generate_series(1, cardinality(_groups));
    INSERT INTO pg_layer_membership
        (group_name, address, channel, id, present, expires_at, capacity)
    SELECT a.group_name, pg_layer_address(_prefix, a.channel), a.channel, a.request, a.adds,
        CASE
            WHEN position('!' IN a.channel) > 0
                THEN least(_expires_at, _now + make_interval(secs => _request_seconds))
            ELSE _expires_at
        END,
        CASE WHEN position('!' IN a.channel) = 0 THEN a.capacity END
    FROM unnest(_groups, _channels, _adds, _capacities, _requests)
        AS a (group_name, channel, adds, capacity, request);
    -- Delete older requests about normal channels: they no longer count. The sweeper deletes those
    -- that another transaction has locked.
    DELETE FROM pg_layer_membership AS m WHERE m.ctid = ANY (ARRAY(
        SELECT m.ctid
        FROM unnest(_groups, _channels, _requests) AS a (group_name, channel, request)
        CROSS JOIN LATERAL (
            SELECT m.ctid FROM pg_layer_membership AS m
            WHERE m.group_name = a.group_name AND m.address = pg_layer_address(_prefix, a.channel)
                AND m.channel = a.channel AND m.id < a.request
            FOR UPDATE SKIP LOCKED
        ) AS m
        WHERE position('!' IN a.channel) = 0));

    -- Return before the INSERT: a role that adds only normal channels needs no privilege to write
    -- messages.
    IF NOT EXISTS (
        SELECT FROM unnest(_channels) AS c (channel) WHERE position('!' IN c.channel) > 0
    ) THEN
        RETURN;
    END IF;
    WITH written AS (
        INSERT INTO pg_layer_message AS m
            (address, xid, boot, marked, kind, channel, payload, expires_at)
        SELECT pg_layer_address(_prefix, a.channel), _xid, pg_layer_request_memberships.boot,
            _quiet OR pg_layer_request_memberships.boot = 0,
            CASE WHEN a.adds THEN 'add' ELSE 'discard' END, a.channel,
            convert_to(json_build_object(
                'group', a.group_name, 'request', a.request,
                'snapshot', pg_current_snapshot()::text,
                'expires_at',
                    CASE WHEN _expiry IS NOT NULL THEN extract(epoch FROM _expires_at) END,
                'requester', _requester, 'number', _number)::text, 'UTF8'),
            _control_end
        FROM unnest(_groups, _channels, _adds, _requests)
            WITH ORDINALITY AS a (group_name, channel, adds, request, position)
        WHERE position('!' IN a.channel) > 0
        ORDER BY a.position
        RETURNING m.id, m.address, m.channel, m.kind, m.payload
    )
    SELECT array_agg(w.id), array_agg(w.address), array_agg(w.channel), array_agg(w.kind),
        array_agg(w.payload)
    INTO ids, addresses, channels, kinds, payloads
    FROM (SELECT * FROM written ORDER BY id) AS w;
    IF ids IS NOT NULL AND NOT _quiet THEN
        PERFORM pg_layer_announce(boot = 0, array_fill(boot, ARRAY[cardinality(ids)]),
            array_fill(_xid::text, ARRAY[cardinality(ids)]), ids, addresses, channels, kinds, NULL,
            payloads, NULL);
    END IF;
END
$$;
