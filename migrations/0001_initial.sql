-- pg_layer: tables and functions.
--
-- The functions are the one write path: routing, capacity, expiry and the doorbell exist here and nowhere else.
-- Names compare bytewise (COLLATE "C"), so that all inboxes of one prefix lie in one range of the index.
-- Time is the database's. clock_timestamp() and not now(): a message sent late in a long transaction must not be
-- born expired.

CREATE TABLE pg_layer_message (
    inbox      text COLLATE "C" NOT NULL,                 -- who reads it: one client, or the readers of a normal channel
    id         bigint GENERATED ALWAYS AS IDENTITY,       -- order, and nothing else
    nonce      bigint NOT NULL,                           -- random, one per statement: with id, the message's identity,
                                                          -- also where a failover hands the same ids out again
    kind       text COLLATE "C" NOT NULL DEFAULT 'message',  -- message | join | leave | flush
    channel    text COLLATE "C",                          -- null: for all local members of the group
    group_name text COLLATE "C",
    payload    bytea NOT NULL DEFAULT '',
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (inbox, id)
);
-- Messages live for seconds: compressing them costs more than it saves, and dead ones must go before they pile up.
ALTER TABLE pg_layer_message ALTER COLUMN payload SET STORAGE EXTERNAL;
ALTER TABLE pg_layer_message SET (
    autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 20000,
    autovacuum_vacuum_insert_scale_factor = 0.0, autovacuum_vacuum_insert_threshold = 200000,
    autovacuum_vacuum_cost_delay = 0
);
CREATE INDEX pg_layer_message_expiry ON pg_layer_message USING brin (expires_at) WITH (pages_per_range = 16);

CREATE TABLE pg_layer_membership (
    group_name text COLLATE "C" NOT NULL,
    inbox      text COLLATE "C" NOT NULL,
    channel    text COLLATE "C" NOT NULL,
    expires_at timestamptz NOT NULL,                      -- infinity: as long as its client's lease
    PRIMARY KEY (group_name, inbox, channel)
);
ALTER TABLE pg_layer_membership SET (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 20000);

CREATE TABLE pg_layer_client (
    inbox      text COLLATE "C" PRIMARY KEY,
    host       text NOT NULL DEFAULT '',
    pid        integer NOT NULL DEFAULT 0,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz NOT NULL                       -- the lease: past it, nothing is written for this client
) WITH (fillfactor = 50);


-- ---------------------------------------------------------------------------------------------- addresses

-- The inbox a channel is read from. 'specific.<client>!<local>' belongs to its client, every other name to all who compete for it.
CREATE FUNCTION pg_layer_inbox(_prefix text, _channel text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT _prefix || '!' || CASE
        WHEN position('!' IN _channel) = 0 THEN ':' || _channel
        ELSE split_part(split_part(_channel, '!', 1), '.', -1)
    END
$$;

-- The NOTIFY channel of an inbox. A hash, because names may be longer than the 63 bytes NOTIFY takes.
CREATE FUNCTION pg_layer_doorbell(_inbox text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT 'pg_layer_' || left(encode(sha256(_inbox::bytea), 'hex'), 40)
$$;

-- LISTEN to an inbox's doorbell; returns the doorbell's name.
CREATE FUNCTION pg_layer_listen(_inbox text) RETURNS text
LANGUAGE plpgsql AS $$
DECLARE
    _doorbell text := pg_layer_doorbell(_inbox);
BEGIN
    EXECUTE format('LISTEN %I', _doorbell);
    RETURN _doorbell;
END
$$;

CREATE FUNCTION pg_layer_unlisten(_inbox text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('UNLISTEN %I', pg_layer_doorbell(_inbox));
END
$$;

CREATE FUNCTION pg_layer_nonce() RETURNS bigint
LANGUAGE sql VOLATILE AS $$ SELECT (random() * 9007199254740992)::bigint $$;


-- ---------------------------------------------------------------------------------------------- sending

-- What a doorbell says. 'M id nonce expires channel group base64': this one message, itself.
-- 'R nonce first last': read these. A payload must stay below 8000 bytes.
CREATE FUNCTION pg_layer_ring(
    _inbox text, _nonce bigint, _first bigint, _last bigint, _count bigint,
    _expires_at timestamptz, _channel text, _group text, _payload bytea
) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    _say text;
BEGIN
    IF _count = 1 AND _payload IS NOT NULL AND octet_length(_payload) < 5900 THEN
        _say := concat_ws(' ', 'M', _first, _nonce, extract(epoch FROM _expires_at),
                          coalesce(_channel, ''), coalesce(_group, ''), encode(_payload, 'base64'));
    END IF;
    IF _say IS NULL OR octet_length(_say) > 7999 THEN
        _say := concat_ws(' ', 'R', _nonce, _first, _last);
    END IF;
    PERFORM pg_notify(pg_layer_doorbell(_inbox), _say);
END
$$;

-- Send one message to its channel; the same rules as pg_layer_send_batch, without the cost of planning for many.
CREATE FUNCTION pg_layer_send_one(
    _prefix text, _channel text, _payload bytea, _expiry float8, _capacity integer, _floor bigint,
    OUT is_full boolean, OUT floor_id bigint
)
LANGUAGE plpgsql AS $$
DECLARE
    _inbox text := pg_layer_inbox(_prefix, _channel);
    _now timestamptz := clock_timestamp();
    _nonce bigint := pg_layer_nonce();
    _expires_at timestamptz := _now + make_interval(secs => _expiry);
    _count bigint;
    _id bigint;
BEGIN
    is_full := false;
    PERFORM FROM pg_layer_client AS c WHERE c.inbox = _inbox AND c.expires_at <= _now;
    IF FOUND THEN
        floor_id := _floor;
        RETURN;
    END IF;
    SELECT count(*) FILTER (WHERE m.channel = _channel), min(m.id) INTO _count, floor_id
    FROM pg_layer_message AS m
    WHERE m.inbox = _inbox AND m.id >= _floor AND m.expires_at > _now AND m.channel IS NOT NULL;
    IF _count >= _capacity THEN
        is_full := true;
        RETURN;
    END IF;
    INSERT INTO pg_layer_message (inbox, nonce, channel, payload, expires_at)
    VALUES (_inbox, _nonce, _channel, _payload, _expires_at)
    RETURNING id INTO _id;
    PERFORM pg_layer_ring(_inbox, _nonce, _id, _id, 1, _expires_at, _channel, NULL,
                          CASE WHEN position('!' IN _channel) > 0 THEN _payload END);
    floor_id := coalesce(floor_id, _id);
END
$$;

-- Send each message to its channel. Capacity counts what waits per channel, unread and unexpired.
--   floors: per inbox the id below which the caller has seen nothing waiting, so that a count never walks the dead
--   returns: positions (from 1) refused because their channel is full, and the floors for the next call
CREATE FUNCTION pg_layer_send_batch(
    _prefix text, _channels text[], _payloads bytea[], _expiries float8[], _capacities integer[],
    _floor_inboxes text[], _floor_ids bigint[],
    OUT full_positions bigint[], OUT floor_inboxes text[], OUT floor_ids bigint[]
)
LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    _now timestamptz := clock_timestamp();
    _nonce bigint := pg_layer_nonce();
BEGIN
    WITH sent AS MATERIALIZED (
        SELECT s.*, pg_layer_inbox(_prefix, s.channel) AS inbox
        FROM unnest(_channels, _payloads, _expiries, _capacities)
            WITH ORDINALITY AS s (channel, payload, expiry, capacity, position)
    ), target AS MATERIALIZED (
        SELECT t.inbox, coalesce(f.id, 0) AS floor, NOT EXISTS (SELECT FROM pg_layer_client AS c WHERE c.inbox = t.inbox AND c.expires_at <= _now) AS live
        FROM (SELECT DISTINCT inbox FROM sent) AS t
        LEFT JOIN unnest(_floor_inboxes, _floor_ids) AS f (inbox, id) ON f.inbox = t.inbox
    ), waiting AS MATERIALIZED (
        SELECT t.inbox, m.channel, count(*) AS count, min(m.id) AS first
        FROM target AS t
        CROSS JOIN LATERAL (
            SELECT m.channel, m.id FROM pg_layer_message AS m
            WHERE m.inbox = t.inbox AND m.id >= t.floor AND m.expires_at > _now AND m.channel IS NOT NULL
        ) AS m
        GROUP BY t.inbox, m.channel
    ), placed AS MATERIALIZED (
        SELECT s.*, t.live,
            coalesce(w.count, 0) + row_number() OVER (PARTITION BY s.channel ORDER BY s.position) > s.capacity AS is_full
        FROM sent AS s
        JOIN target AS t ON t.inbox = s.inbox
        LEFT JOIN waiting AS w ON w.inbox = s.inbox AND w.channel = s.channel
    ), written AS (
        INSERT INTO pg_layer_message (inbox, nonce, channel, payload, expires_at)
        SELECT inbox, _nonce, channel, payload, _now + make_interval(secs => expiry)
        FROM placed WHERE live AND NOT is_full
        ORDER BY position
        RETURNING inbox, id, channel, payload, expires_at
    ), batch AS (
        SELECT inbox, min(id) AS first, max(id) AS last, count(*) AS count, min(expires_at) AS expires_at,
            min(channel) AS channel, (array_agg(payload))[1] AS payload
        FROM written GROUP BY inbox
    ), rung AS MATERIALIZED (
        SELECT b.inbox, b.first,
            pg_layer_ring(b.inbox, _nonce, b.first, b.last, b.count, b.expires_at, b.channel, NULL,
                          CASE WHEN b.inbox NOT LIKE '%!:%' THEN b.payload END)
        FROM batch AS b
    )
    SELECT
        (SELECT array_agg(position) FROM placed WHERE live AND is_full),
        array_agg(t.inbox),
        array_agg(coalesce((SELECT min(w.first) FROM waiting AS w WHERE w.inbox = t.inbox), r.first, t.floor))
    INTO full_positions, floor_inboxes, floor_ids
    FROM target AS t LEFT JOIN rung AS r ON r.inbox = t.inbox;
END
$$;

-- Send one message to its group; the same rules as pg_layer_group_send_batch.
CREATE FUNCTION pg_layer_group_send_one(
    _prefix text, _group text, _payload bytea, _expiry float8, _capacity integer,
    OUT missed_channels text[]
)
LANGUAGE plpgsql AS $$
DECLARE
    _now timestamptz := clock_timestamp();
    _nonce bigint := pg_layer_nonce();
    _expires_at timestamptz := _now + make_interval(secs => _expiry);
    _inbox text := _prefix || '!';
    _channel text;
    _count bigint;
    _id bigint;
BEGIN
    LOOP
        SELECT m.inbox INTO _inbox FROM pg_layer_membership AS m
        WHERE m.group_name = _group AND m.inbox > _inbox AND m.inbox < _prefix || '"'
        ORDER BY m.inbox LIMIT 1;
        EXIT WHEN NOT FOUND;
        PERFORM FROM pg_layer_membership AS m
        WHERE m.group_name = _group AND m.inbox = _inbox AND m.expires_at > _now LIMIT 1;
        CONTINUE WHEN NOT FOUND;
        _channel := NULL;
        IF _inbox LIKE '%!:%' THEN
            _channel := split_part(_inbox, '!:', 2);
            SELECT count(*) INTO _count FROM pg_layer_message AS m WHERE m.inbox = _inbox AND m.expires_at > _now;
            IF _count >= _capacity THEN
                missed_channels := missed_channels || _channel;
                CONTINUE;
            END IF;
        ELSE
            PERFORM FROM pg_layer_client AS c WHERE c.inbox = _inbox AND c.expires_at <= _now;
            CONTINUE WHEN FOUND;
        END IF;
        INSERT INTO pg_layer_message (inbox, nonce, channel, group_name, payload, expires_at)
        VALUES (_inbox, _nonce, _channel, _group, _payload, _expires_at)
        RETURNING id INTO _id;
        PERFORM pg_layer_ring(_inbox, _nonce, _id, _id, 1, _expires_at, NULL, _group,
                              CASE WHEN _channel IS NULL THEN _payload END);
    END LOOP;
END
$$;

-- Send each message to its group: one row per inbox that has a live member, found by hopping through the index, so that the
-- cost grows with processes and not with members. A normal channel that is a member and full misses the message.
--   returns: how many such messages were missed, by group and channel
CREATE FUNCTION pg_layer_group_send_batch(
    _prefix text, _groups text[], _payloads bytea[], _expiries float8[], _capacity integer,
    OUT missed_groups text[], OUT missed_channels text[]
)
LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    _now timestamptz := clock_timestamp();
    _nonce bigint := pg_layer_nonce();
BEGIN
    WITH RECURSIVE sent AS MATERIALIZED (
        SELECT s.*
        FROM unnest(_groups, _payloads, _expiries) WITH ORDINALITY AS s (group_name, payload, expiry, position)
    ), hop (group_name, inbox) AS (
        SELECT g.group_name, (
            SELECT m.inbox FROM pg_layer_membership AS m
            WHERE m.group_name = g.group_name AND m.inbox > _prefix || '!' AND m.inbox < _prefix || '"'
            ORDER BY m.inbox LIMIT 1)
        FROM (SELECT DISTINCT group_name FROM sent) AS g
        UNION ALL
        SELECT h.group_name, (
            SELECT m.inbox FROM pg_layer_membership AS m
            WHERE m.group_name = h.group_name AND m.inbox > h.inbox AND m.inbox < _prefix || '"'
            ORDER BY m.inbox LIMIT 1)
        FROM hop AS h WHERE h.inbox IS NOT NULL
    ), target AS MATERIALIZED (
        SELECT h.group_name, h.inbox,
            CASE WHEN h.inbox LIKE '%!:%' THEN split_part(h.inbox, '!:', 2) END AS channel
        FROM hop AS h
        WHERE h.inbox IS NOT NULL
            AND EXISTS (SELECT FROM pg_layer_membership AS m
                        WHERE m.group_name = h.group_name AND m.inbox = h.inbox AND m.expires_at > _now)
            AND NOT EXISTS (SELECT FROM pg_layer_client AS c WHERE c.inbox = h.inbox AND c.expires_at <= _now)
    ), waiting AS MATERIALIZED (
        SELECT t.inbox, (SELECT count(*) FROM pg_layer_message AS m
                         WHERE m.inbox = t.inbox AND m.expires_at > _now) AS count
        FROM (SELECT DISTINCT inbox FROM target WHERE channel IS NOT NULL) AS t
    ), placed AS MATERIALIZED (
        SELECT t.inbox, t.channel, s.*, t.channel IS NOT NULL
            AND w.count + row_number() OVER (PARTITION BY t.inbox ORDER BY s.position) > _capacity AS is_full
        FROM sent AS s
        JOIN target AS t ON t.group_name = s.group_name
        LEFT JOIN waiting AS w ON w.inbox = t.inbox
    ), written AS (
        INSERT INTO pg_layer_message (inbox, nonce, channel, group_name, payload, expires_at)
        SELECT inbox, _nonce, channel, group_name, payload, _now + make_interval(secs => expiry)
        FROM placed WHERE is_full IS NOT TRUE
        ORDER BY position, inbox
        RETURNING inbox, id, channel, group_name, payload, expires_at
    ), batch AS (
        SELECT inbox, min(id) AS first, max(id) AS last, count(*) AS count, min(expires_at) AS expires_at,
            min(group_name) AS group_name, min(channel) AS channel, (array_agg(payload))[1] AS payload
        FROM written GROUP BY inbox
    ), rung AS MATERIALIZED (
        SELECT pg_layer_ring(b.inbox, _nonce, b.first, b.last, b.count, b.expires_at, NULL, b.group_name,
                             CASE WHEN b.channel IS NULL THEN b.payload END)
        FROM batch AS b
    )
    SELECT array_agg(p.group_name), array_agg(p.channel)
    INTO missed_groups, missed_channels
    FROM (SELECT count(*) FROM rung) AS r
    LEFT JOIN placed AS p ON p.is_full;
END
$$;


-- ---------------------------------------------------------------------------------------------- groups

-- Tell the owners of other clients' channels of a change of membership: a row in their inbox, so that it takes its place in the order.
CREATE FUNCTION pg_layer_tell(
    _prefix text, _own_inbox text, _kind text, _groups text[], _channels text[], _expires_at timestamptz
) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    _nonce bigint := pg_layer_nonce();
    _rung bigint;
BEGIN
    WITH written AS (
        INSERT INTO pg_layer_message (inbox, nonce, kind, channel, group_name, expires_at)
        SELECT pg_layer_inbox(_prefix, c.channel), _nonce, _kind, c.channel, c.group_name, _expires_at
        FROM unnest(_groups, _channels) AS c (group_name, channel)
        WHERE position('!' IN c.channel) > 0 AND pg_layer_inbox(_prefix, c.channel) IS DISTINCT FROM _own_inbox
        RETURNING inbox, id
    )
    SELECT count(pg_layer_ring(b.inbox, _nonce, b.first, b.last, b.count, NULL, NULL, NULL, NULL)) INTO _rung
    FROM (SELECT inbox, min(id) AS first, max(id) AS last, count(*) AS count FROM written GROUP BY inbox) AS b;
END
$$;

-- Change memberships: some channels join their groups, some leave. No (group, channel) may stand twice.
--   _own_inbox: the caller's own client, which needs no telling of its own channels
--   _expiry: seconds, or null for as long as the client's lease
--   returns: messages up to this id were sent before the joining, and when the memberships end (seconds since 1970)
CREATE FUNCTION pg_layer_regroup(
    _prefix text, _own_inbox text, _lease float8, _expiry float8,
    _join_groups text[], _join_channels text[], _leave_groups text[], _leave_channels text[],
    OUT since_id bigint, OUT expires_at float8
)
LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    _now timestamptz := clock_timestamp();
    _expires_at timestamptz := CASE WHEN _expiry IS NULL THEN 'infinity' ELSE _now + make_interval(secs => _expiry) END;
BEGIN
    IF cardinality(_leave_groups) > 0 THEN
        WITH doomed AS MATERIALIZED (
            SELECT m.group_name, m.inbox, m.channel
            FROM unnest(_leave_groups, _leave_channels) AS l (group_name, channel)
            JOIN pg_layer_membership AS m ON m.group_name = l.group_name AND m.channel = l.channel
                AND m.inbox = pg_layer_inbox(_prefix, l.channel)
            ORDER BY 1, 2, 3
            FOR UPDATE OF m
        )
        DELETE FROM pg_layer_membership AS m USING doomed AS d
        WHERE m.group_name = d.group_name AND m.inbox = d.inbox AND m.channel = d.channel;
        PERFORM pg_layer_tell(_prefix, _own_inbox, 'leave', _leave_groups, _leave_channels, _now + interval '1 day');
    END IF;
    IF cardinality(_join_groups) > 0 THEN
        -- A client that joins before its first receive() has a lease from here on.
        INSERT INTO pg_layer_client (inbox, expires_at)
        SELECT DISTINCT pg_layer_inbox(_prefix, j.channel), _now + make_interval(secs => _lease)
        FROM unnest(_join_channels) AS j (channel) WHERE position('!' IN j.channel) > 0
        ORDER BY 1
        ON CONFLICT DO NOTHING;
        INSERT INTO pg_layer_membership AS m (group_name, inbox, channel, expires_at)
        SELECT j.group_name, pg_layer_inbox(_prefix, j.channel), j.channel, _expires_at
        FROM unnest(_join_groups, _join_channels) AS j (group_name, channel)
        ORDER BY 1, 2, 3
        ON CONFLICT (group_name, inbox, channel) DO UPDATE SET expires_at = excluded.expires_at;
        PERFORM pg_layer_tell(_prefix, _own_inbox, 'join', _join_groups, _join_channels, _expires_at);
    END IF;
    since_id := nextval('pg_layer_message_id_seq');
    expires_at := extract(epoch FROM _expires_at);
END
$$;

-- Put back memberships that a client remembers and the tables may have lost (a crash, a failover, a lapsed lease).
--   _ttls: seconds each has left, or null for as long as the client's lease
CREATE FUNCTION pg_layer_reassert(_inbox text, _groups text[], _channels text[], _ttls float8[]) RETURNS void
LANGUAGE sql SET enable_seqscan = off AS $$
    INSERT INTO pg_layer_membership AS m (group_name, inbox, channel, expires_at)
    SELECT r.group_name, _inbox, r.channel,
        CASE WHEN r.ttl IS NULL THEN 'infinity' ELSE clock_timestamp() + make_interval(secs => r.ttl) END
    FROM unnest(_groups, _channels, _ttls) AS r (group_name, channel, ttl)
    ORDER BY 1, 2, 3
    ON CONFLICT (group_name, inbox, channel) DO UPDATE SET expires_at = excluded.expires_at
    WHERE m.expires_at < excluded.expires_at
$$;


-- ---------------------------------------------------------------------------------------------- clients

-- Take or renew a client's lease. With a token, rings the client's own doorbell: a listener that does not hear it is deaf.
--   returns: the database's clock (seconds since 1970), and whether there was no lease to renew, so that memberships may be gone
CREATE FUNCTION pg_layer_renew(
    _inbox text, _host text, _pid integer, _lease float8, _token text,
    OUT clock float8, OUT is_new boolean
)
LANGUAGE plpgsql AS $$
DECLARE
    _now timestamptz := clock_timestamp();
BEGIN
    -- Locked, so that no sweeper clears this client between the look and the renewal.
    SELECT c.expires_at <= _now INTO is_new FROM pg_layer_client AS c WHERE c.inbox = _inbox FOR UPDATE;
    is_new := coalesce(is_new, true);
    INSERT INTO pg_layer_client AS c (inbox, host, pid, expires_at)
    VALUES (_inbox, _host, _pid, _now + make_interval(secs => _lease))
    ON CONFLICT (inbox) DO UPDATE SET host = excluded.host, pid = excluded.pid, expires_at = excluded.expires_at;
    IF _token IS NOT NULL THEN
        PERFORM pg_notify(pg_layer_doorbell(_inbox), 'P ' || _token);
    END IF;
    clock := extract(epoch FROM clock_timestamp());
END
$$;

-- Competing readers: move up to _limit messages of a normal channel into the own inbox, where nobody else takes them.
-- The caller commits this durably: undone by a crash of the server, the same job would be handed out twice.
CREATE FUNCTION pg_layer_take(_prefix text, _channel text, _inbox text, _floor bigint, _limit integer)
RETURNS TABLE (id bigint, nonce bigint, kind text, channel text, group_name text, payload bytea, expires_at float8)
LANGUAGE plpgsql SET enable_seqscan = off AS $$
BEGIN
    IF current_setting('synchronous_commit') = 'off' THEN
        PERFORM set_config('synchronous_commit', 'on', true);
    END IF;
    RETURN QUERY
    WITH picked AS MATERIALIZED (
        SELECT m.inbox, m.id FROM pg_layer_message AS m
        WHERE m.inbox = pg_layer_inbox(_prefix, _channel) AND m.id >= _floor AND m.expires_at > clock_timestamp()
        ORDER BY m.id LIMIT _limit
        FOR UPDATE SKIP LOCKED
    )
    UPDATE pg_layer_message AS m SET inbox = _inbox
    FROM picked AS p WHERE m.inbox = p.inbox AND m.id = p.id
    RETURNING m.id, m.nonce, m.kind, m.channel, NULL::text, m.payload, extract(epoch FROM m.expires_at)::float8;
END
$$;

-- Give taken messages back to their channel, with their place and their expiry.
CREATE FUNCTION pg_layer_put_back(_prefix text, _inbox text, _ids bigint[], _nonces bigint[]) RETURNS void
LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    _rung bigint;
BEGIN
    WITH moved AS (
        UPDATE pg_layer_message AS m SET inbox = pg_layer_inbox(_prefix, m.channel)
        WHERE m.inbox = _inbox AND m.id = ANY (_ids) AND m.nonce = ANY (_nonces)
        RETURNING m.inbox, m.id
    )
    SELECT count(pg_layer_ring(b.inbox, pg_layer_nonce(), b.first, b.last, 0, NULL, NULL, NULL, NULL)) INTO _rung
    FROM (SELECT inbox, min(id) AS first, max(id) AS last FROM moved GROUP BY inbox) AS b;
END
$$;

-- A client's end: its unread jobs go back to their channels, all else of it goes.
CREATE FUNCTION pg_layer_close(
    _prefix text, _inbox text, _ids bigint[], _nonces bigint[], _groups text[], _channels text[]
) RETURNS void
LANGUAGE plpgsql SET enable_seqscan = off AS $$
BEGIN
    PERFORM pg_layer_put_back(_prefix, _inbox, _ids, _nonces);
    DELETE FROM pg_layer_client WHERE inbox = _inbox;
    DELETE FROM pg_layer_message WHERE inbox = _inbox;
    DELETE FROM pg_layer_membership AS m USING unnest(_groups, _channels) AS g (group_name, channel)
    WHERE m.group_name = g.group_name AND m.inbox = _inbox AND m.channel = g.channel;
END
$$;

-- Back to a blank state: no messages, no memberships, and every client is told so.
CREATE FUNCTION pg_layer_flush(_prefix text) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    _nonce bigint := pg_layer_nonce();
    _rung bigint;
BEGIN
    DELETE FROM pg_layer_message AS m WHERE m.inbox > _prefix || '!' AND m.inbox < _prefix || '"';
    DELETE FROM pg_layer_membership AS m WHERE m.inbox > _prefix || '!' AND m.inbox < _prefix || '"';
    WITH written AS (
        INSERT INTO pg_layer_message (inbox, nonce, kind, expires_at)
        SELECT c.inbox, _nonce, 'flush', clock_timestamp() + interval '1 day' FROM pg_layer_client AS c
        WHERE c.inbox > _prefix || '!' AND c.inbox < _prefix || '"' AND c.expires_at > clock_timestamp()
        RETURNING inbox, id
    )
    SELECT count(pg_layer_ring(w.inbox, _nonce, w.id, w.id, 0, NULL, NULL, NULL, NULL)) INTO _rung FROM written AS w;
END
$$;


-- ---------------------------------------------------------------------------------------------- sweeping

-- Remove up to _limit of each kind of what is over: expired messages and memberships, all that clients without a lease left.
-- A lapsed client itself is remembered for a day, so that nothing is written for the dead. Rows somebody else holds are left
-- for the next time, so that several sweepers do no harm.
--   _alone: only if nobody else sweeps right now; returns nulls if somebody does
CREATE FUNCTION pg_layer_sweep(
    _prefix text, _limit integer, _alone boolean,
    OUT messages bigint, OUT memberships bigint, OUT clients bigint
)
LANGUAGE plpgsql AS $$
DECLARE
    _now timestamptz := clock_timestamp();
    _lapsed text[];
BEGIN
    IF _alone AND NOT pg_try_advisory_xact_lock(hashtextextended('pg_layer_sweep ' || _prefix, 0)) THEN
        RETURN;
    END IF;
    -- Locked, so that a client that comes back renews after this sweep, and puts its memberships back after it.
    _lapsed := ARRAY(SELECT c.inbox FROM pg_layer_client AS c
                     WHERE c.inbox > _prefix || '!' AND c.inbox < _prefix || '"' AND c.expires_at <= _now
                     FOR UPDATE SKIP LOCKED);
    WITH doomed AS MATERIALIZED (
        SELECT m.inbox, m.id FROM pg_layer_message AS m
        WHERE m.inbox > _prefix || '!' AND m.inbox < _prefix || '"' AND (m.expires_at <= _now OR m.inbox = ANY (_lapsed))
        LIMIT _limit FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM pg_layer_message AS m USING doomed AS d WHERE m.inbox = d.inbox AND m.id = d.id RETURNING 1
    )
    SELECT count(*) INTO messages FROM gone;
    WITH doomed AS MATERIALIZED (
        SELECT m.group_name, m.inbox, m.channel FROM pg_layer_membership AS m
        WHERE m.inbox > _prefix || '!' AND m.inbox < _prefix || '"' AND (m.expires_at <= _now OR m.inbox = ANY (_lapsed))
        LIMIT _limit FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM pg_layer_membership AS m USING doomed AS d
        WHERE m.group_name = d.group_name AND m.inbox = d.inbox AND m.channel = d.channel RETURNING 1
    )
    SELECT count(*) INTO memberships FROM gone;
    WITH doomed AS MATERIALIZED (
        SELECT c.inbox FROM pg_layer_client AS c
        WHERE c.inbox = ANY (_lapsed) AND c.expires_at <= _now - interval '1 day'
        LIMIT _limit FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM pg_layer_client AS c USING doomed AS d WHERE c.inbox = d.inbox RETURNING 1
    )
    SELECT count(*) INTO clients FROM gone;
END
$$;

-- What pg_layer_sweep would remove, without a limit.
CREATE FUNCTION pg_layer_sweepable(_prefix text, OUT messages bigint, OUT memberships bigint, OUT clients bigint)
LANGUAGE sql STABLE AS $$
    WITH client AS (
        SELECT c.inbox, c.expires_at FROM pg_layer_client AS c
        WHERE c.inbox > _prefix || '!' AND c.inbox < _prefix || '"' AND c.expires_at <= clock_timestamp()
    )
    SELECT
        (SELECT count(*) FROM pg_layer_message AS m
         WHERE m.inbox > _prefix || '!' AND m.inbox < _prefix || '"'
            AND (m.expires_at <= clock_timestamp() OR m.inbox IN (SELECT c.inbox FROM client AS c))),
        (SELECT count(*) FROM pg_layer_membership AS m
         WHERE m.inbox > _prefix || '!' AND m.inbox < _prefix || '"'
            AND (m.expires_at <= clock_timestamp() OR m.inbox IN (SELECT c.inbox FROM client AS c))),
        (SELECT count(*) FROM client AS c WHERE c.expires_at <= clock_timestamp() - interval '1 day')
$$;
