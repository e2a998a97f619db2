-- pg_layer: tables and functions.
--
-- The functions are the one write path: routing, capacity, expiry and the doorbell exist here and nowhere else.
-- Names compare bytewise (COLLATE "C"), so that all inboxes of one prefix lie in one range of the index.
-- Time is the database's. clock_timestamp() and not now(): a message sent late in a long transaction must not be
-- born expired.

CREATE TABLE pg_layer_message (
    inbox      text COLLATE "C" NOT NULL,                 -- who reads it: one client, or the readers of a normal channel
    id         bigint GENERATED ALWAYS AS IDENTITY,       -- order, and nothing else
    nonce      bigint NOT NULL,                           -- random, one for all that a doorbell announces: with id, the message's
                                                          -- identity, also where a failover hands the same ids out again
    kind       text COLLATE "C" NOT NULL DEFAULT 'message',  -- message | join | leave | flush
    channel    text COLLATE "C",                          -- null: for all local members of the group
    group_name text COLLATE "C",
    excluded   text COLLATE "C",                          -- the member of the group that is not to get it
    payload    bytea NOT NULL DEFAULT '',
    sent_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
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

CREATE TABLE pg_layer_membership (
    group_name text COLLATE "C" NOT NULL,
    inbox      text COLLATE "C" NOT NULL,
    channel    text COLLATE "C" NOT NULL,
    expires_at timestamptz NOT NULL,                      -- infinity: as long as its client's lease
    capacity   integer,                                   -- of a normal channel
    put_back   boolean NOT NULL DEFAULT false,            -- by its client, and nobody has joined since: see pg_layer_reassert
    joined     bigint NOT NULL DEFAULT 0,                 -- what was sent with a larger id came after it last joined, or meanwhile
    PRIMARY KEY (group_name, inbox, channel)
);
ALTER TABLE pg_layer_membership SET (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 20000);

CREATE TABLE pg_layer_client (
    inbox      text COLLATE "C" PRIMARY KEY,
    host       text NOT NULL DEFAULT '',
    pid        integer NOT NULL DEFAULT 0,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz NOT NULL,                      -- the lease: past it, nothing is written for this client
    fence      bigint NOT NULL DEFAULT 0,                 -- what it began with a smaller number it has given up
    ended_at   timestamptz,                               -- it has taken leave, or a sweeper has cleared what it left
    counters   jsonb NOT NULL DEFAULT '{}'                -- what it did since its start, as of the last renewal
) WITH (fillfactor = 50);

CREATE TABLE pg_layer_last_sweep (
    prefix     text COLLATE "C" PRIMARY KEY,
    swept_at   timestamptz NOT NULL
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

-- Ring an inbox's doorbell. What it says is either the one message itself, 'M id nonce expires channel group excluded
-- base64', or what to read, 'R nonce first last'. A NOTIFY payload must stay below 8000 bytes: 5600 are 7564 in base64, with
-- names and numbers at most 7922. Written so that PostgreSQL inlines it, and of few parts, as each is made ready at each call.
-- With pg_layer.silent on, as where NOTIFY cannot be had, it does not ring: readers find the rows by looking.
CREATE FUNCTION pg_layer_ring(_inbox text, _nonce bigint, _first bigint, _last bigint) RETURNS text
LANGUAGE sql VOLATILE AS $$
    SELECT CASE WHEN current_setting('pg_layer.silent', true) = 'on' THEN ''
        ELSE pg_notify(pg_layer_doorbell(_inbox), concat_ws(' ', 'R', _nonce, _first, _last))::text END
$$;

--   _payload: null where it is not to ride along
CREATE FUNCTION pg_layer_ring_with(
    _inbox text, _nonce bigint, _id bigint, _expires_at timestamptz, _channel text, _group text, _excluded text,
    _payload bytea
) RETURNS text
LANGUAGE sql VOLATILE AS $$
    SELECT CASE WHEN current_setting('pg_layer.silent', true) = 'on' THEN '' ELSE pg_notify(pg_layer_doorbell(_inbox),
        CASE WHEN octet_length(_payload) <= 5600
            THEN concat_ws(' ', 'M', _id, _nonce, extract(epoch FROM _expires_at), _channel, _group, _excluded,
                           encode(_payload, 'base64'))
            ELSE concat_ws(' ', 'R', _nonce, _id, _id)
        END)::text END
$$;

-- What messages pass through never scans a table (enable_seqscan): a plan that was made while the table was small stays in use
-- when it has grown, or is full of dead rows. Nor is an index walked into a bitmap (enable_bitmapscan): who wants the first few
-- rows in its order would sort them all, where nobody has counted them yet; and it marks no dead entries, which the next one
-- then walks again.
-- Look-ups of a lease are scalar subqueries: an EXISTS may become a hash of all clients. A lease counts that was good when the
-- transaction began: where one snapshot serves it all (REPEATABLE READ), no later renewal is seen.

-- Send one message to its channel. Capacity counts what waits per channel, unread and unexpired.
--   _floor: the id below which the caller has seen nothing waiting in the inbox, so that a count never walks the dead;
--       null: the caller has looked a moment ago, and there was more room than it has used since
--   returns: how many wait in the channel now and the floor for the next call; nothing, if it was not to look; null, if
--       the channel was full and refuses the message
CREATE FUNCTION pg_layer_send_one(
    _prefix text, _channel text, _payload bytea, _expiry float8, _capacity integer, _floor bigint
) RETURNS bigint[]
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    _waiting bigint;
    _next_floor bigint;
    _is_lapsed boolean;
    _id bigint;
    _rung text;
BEGIN
    IF _floor IS NOT NULL THEN
        SELECT count(*) FILTER (WHERE m.channel = _channel), min(m.id),
            coalesce((SELECT c.expires_at <= now() FROM pg_layer_client AS c
                      WHERE c.inbox = pg_layer_inbox(_prefix, _channel)), false)
        INTO _waiting, _next_floor, _is_lapsed
        FROM pg_layer_message AS m
        WHERE m.inbox = pg_layer_inbox(_prefix, _channel) AND m.id >= _floor AND m.expires_at > clock_timestamp()
            AND m.channel IS NOT NULL;
        IF _is_lapsed THEN
            RETURN ARRAY[]::bigint[];
        ELSIF _waiting >= _capacity THEN
            RETURN NULL;
        END IF;
    END IF;
    -- One statement writes and rings: each that PL/pgSQL runs, and each expression, costs as much as the row.
    INSERT INTO pg_layer_message AS m (inbox, nonce, channel, payload, expires_at)
    VALUES (pg_layer_inbox(_prefix, _channel), pg_layer_nonce(), _channel, _payload,
            clock_timestamp() + make_interval(secs => _expiry))
    RETURNING m.id, pg_layer_ring_with(m.inbox, m.nonce, m.id, m.expires_at, m.channel, '', '',
                                       CASE WHEN position('!' IN _channel) > 0 THEN _payload END)
    INTO _id, _rung;
    IF _floor IS NULL THEN
        RETURN ARRAY[]::bigint[];
    END IF;
    RETURN ARRAY[_waiting + 1, coalesce(_next_floor, _id)];
END
$$;

-- Send many messages to their channels, by the same rules, in their order.
--   _floor_inboxes, _floor_ids: floors by inbox; null: the caller has looked a moment ago, as for pg_layer_send_one
--   returns: positions (from 1) refused because their channel is full; the floors for the next call, and how many wait now
--       in the fullest of the inboxes, unless a lease is over; nothing of it, if it was not to look
CREATE FUNCTION pg_layer_send_batch(
    _prefix text, _channels text[], _payloads bytea[], _expiries float8[], _capacities integer[],
    _floor_inboxes text[], _floor_ids bigint[],
    OUT full_positions bigint[], OUT floor_inboxes text[], OUT floor_ids bigint[], OUT waiting bigint
)
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE
    _now timestamptz := clock_timestamp();
    _nonce bigint := pg_layer_nonce();
    _lapsed text[];
    _refused boolean[];  -- by position; looked up in it, as a list of positions is walked for each message
    _inboxes text[];
    _firsts bigint[];
    _lasts bigint[];
    _places bigint[];
    _positions bigint[];
    _position bigint;
    _first bigint;
    _rung text;
BEGIN
    -- A few that are small are quicker one by one: each rides along with its doorbell, so that nobody has to read.
    IF _floor_inboxes IS NULL AND cardinality(_channels) <= 4 AND pg_column_size(_payloads) <= 8000 THEN
        FOR _i IN 1 .. cardinality(_channels) LOOP
            PERFORM pg_layer_send_one(_prefix, _channels[_i], _payloads[_i], _expiries[_i], _capacities[_i], NULL);
        END LOOP;
        RETURN;
    END IF;
    IF _floor_inboxes IS NOT NULL THEN
        SELECT array_agg(t.inbox), array_agg(w.first), max(w.count), array_agg(t.inbox) FILTER (WHERE t.is_lapsed)
        INTO floor_inboxes, floor_ids, waiting, _lapsed
        FROM (
            SELECT d.inbox,
                coalesce((SELECT f.id FROM unnest(_floor_inboxes, _floor_ids) AS f (inbox, id) WHERE f.inbox = d.inbox), 0)
                    AS floor,
                coalesce((SELECT c.expires_at <= now() FROM pg_layer_client AS c WHERE c.inbox = d.inbox), false) AS is_lapsed
            FROM (SELECT DISTINCT pg_layer_inbox(_prefix, s.channel) AS inbox FROM unnest(_channels) AS s (channel)) AS d
        ) AS t
        CROSS JOIN LATERAL (
            SELECT count(*) AS count, min(m.id) AS first FROM pg_layer_message AS m
            WHERE m.inbox = t.inbox AND m.id >= t.floor AND m.expires_at > _now AND m.channel IS NOT NULL
        ) AS w;

        IF _lapsed IS NOT NULL THEN
            _refused := ARRAY(
                SELECT l.inbox IS NOT NULL
                FROM unnest(_channels) WITH ORDINALITY AS s (channel, position)
                LEFT JOIN unnest(_lapsed) AS l (inbox) ON l.inbox = pg_layer_inbox(_prefix, s.channel)
                ORDER BY s.position);
        END IF;
        -- Only where an inbox holds enough for a channel of it to be full is it counted which.
        IF waiting + cardinality(_channels) > (SELECT min(c) FROM unnest(_capacities) AS c) THEN
            SELECT array_agg(s.position) FILTER (WHERE s.is_full), array_agg(s.is_full OR s.is_lapsed ORDER BY s.position)
            INTO full_positions, _refused
            FROM (
                SELECT s.position, s.is_lapsed, NOT s.is_lapsed AND s.capacity < coalesce(w.count, 0)
                    + row_number() OVER (PARTITION BY s.channel ORDER BY s.position) AS is_full
                FROM (
                    SELECT s.channel, s.capacity, s.position, coalesce(s.refused, false) AS is_lapsed
                    FROM unnest(_channels, _capacities, _refused) WITH ORDINALITY
                        AS s (channel, capacity, refused, position)
                ) AS s
                LEFT JOIN (
                    SELECT m.channel, count(*) AS count
                    FROM unnest(floor_inboxes, floor_ids) AS t (inbox, first)
                    JOIN pg_layer_message AS m ON m.inbox = t.inbox AND m.id >= t.first
                    WHERE m.expires_at > _now AND m.channel IS NOT NULL
                    GROUP BY m.channel
                ) AS w ON w.channel = s.channel
            ) AS s;
        END IF;
    END IF;

    WITH written AS (
        INSERT INTO pg_layer_message (inbox, nonce, channel, payload, expires_at)
        SELECT pg_layer_inbox(_prefix, s.channel), _nonce, s.channel, s.payload, _now + make_interval(secs => s.expiry)
        FROM unnest(_channels, _payloads, _expiries, _refused) WITH ORDINALITY
            AS s (channel, payload, expiry, is_refused, position)
        WHERE s.is_refused IS NOT TRUE
        ORDER BY s.position
        RETURNING inbox, id
    )
    SELECT array_agg(b.inbox), array_agg(b.first), array_agg(b.last), array_agg(b.place)
    INTO _inboxes, _firsts, _lasts, _places
    FROM (
        SELECT w.inbox, min(w.id) AS first, max(w.id) AS last, min(w.place) AS place
        FROM (SELECT inbox, id, row_number() OVER (ORDER BY id) AS place FROM written) AS w
        GROUP BY w.inbox
    ) AS b;

    IF _refused IS NOT NULL THEN
        _positions := ARRAY(
            SELECT s.position FROM unnest(_refused) WITH ORDINALITY AS s (is_refused, position)
            WHERE NOT s.is_refused ORDER BY s.position);
    END IF;
    FOR _i IN 1 .. coalesce(cardinality(_inboxes), 0) LOOP
        IF _firsts[_i] = _lasts[_i] AND _inboxes[_i] NOT LIKE '%!:%' THEN
            -- From the arguments and not from its row: who only sends need not be allowed to read what others sent.
            _position := coalesce(_positions[_places[_i]], _places[_i]);
            _rung := pg_layer_ring_with(_inboxes[_i], _nonce, _firsts[_i], _now + make_interval(secs => _expiries[_position]),
                _channels[_position], '', '', _payloads[_position]);
        ELSE
            _rung := pg_layer_ring(_inboxes[_i], _nonce, _firsts[_i], _lasts[_i]);
        END IF;
    END LOOP;
    IF _floor_inboxes IS NOT NULL THEN
        -- Not told where somebody's lease is over: he is to be looked at each time.
        waiting := CASE WHEN _lapsed IS NULL THEN waiting + cardinality(_channels) END;
        _first := (SELECT min(f) FROM unnest(_firsts) AS f);
        floor_ids := ARRAY(SELECT coalesce(f.id, _first, 0) FROM unnest(floor_ids) WITH ORDINALITY AS f (id, position)
                           ORDER BY f.position);
    END IF;
END
$$;

-- Send one message to its group; the same rules as pg_layer_group_send_batch.
--   _excluded: a member that is not to get it, or null
--   returns: the normal channels in the group that were full and missed it, or null
CREATE FUNCTION pg_layer_group_send_one(
    _prefix text, _group text, _payload bytea, _expiry float8, _excluded text
) RETURNS text[]
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off AS $$
DECLARE
    _last text := _prefix || '!';
    _end text := _prefix || '"';
    _row_count integer;
    _inbox text;
    _capacity integer;
    _inboxes text[];
    _missed text[];
    _rung text;
BEGIN
    -- A few rows, which are all that most groups have; then on from the last of their inboxes.
    LOOP
        _row_count := 0;
        FOR _inbox, _capacity IN
            SELECT m.inbox, m.capacity FROM pg_layer_membership AS m
            WHERE m.group_name = _group AND m.inbox > _last AND m.inbox < _end AND m.expires_at > clock_timestamp()
            ORDER BY m.inbox LIMIT 16
        LOOP
            _row_count := _row_count + 1;
            CONTINUE WHEN _inbox = _last;
            _last := _inbox;
            IF _capacity IS NOT NULL THEN
                CONTINUE WHEN _inbox = _prefix || '!:' || _excluded;
                IF _capacity <= (
                    SELECT count(*) FROM pg_layer_message AS m WHERE m.inbox = _inbox AND m.expires_at > clock_timestamp()
                ) THEN
                    _missed := _missed || split_part(_inbox, '!:', 2);
                    CONTINUE;
                END IF;
            END IF;
            _inboxes := _inboxes || _inbox;
        END LOOP;
        EXIT WHEN _row_count < 16;
    END LOOP;
    IF _inboxes IS NOT NULL THEN
        FOR _rung IN
            INSERT INTO pg_layer_message AS m (inbox, nonce, channel, group_name, excluded, payload, expires_at)
            SELECT t.inbox, pg_layer_nonce(), CASE WHEN t.inbox LIKE '%!:%' THEN split_part(t.inbox, '!:', 2) END, _group,
                _excluded, _payload, clock_timestamp() + make_interval(secs => _expiry)
            FROM unnest(_inboxes) AS t (inbox)
            -- One that was swept away since its members were found counts as living: its row expires.
            WHERE coalesce((SELECT c.expires_at > now() FROM pg_layer_client AS c WHERE c.inbox = t.inbox), true)
            RETURNING pg_layer_ring_with(m.inbox, m.nonce, m.id, m.expires_at, '', _group, coalesce(_excluded, ''),
                                         CASE WHEN m.channel IS NULL THEN _payload END)
        LOOP END LOOP;
    END IF;
    RETURN _missed;
END
$$;

-- Send each message to its group: one row per inbox that has a live member, found by hopping through the index, so that the
-- cost grows with processes and not with members. A normal channel that is a member and full misses the message.
--   _excluded: for each message a member that is not to get it, or null
--   returns: the positions (from 1) of such messages, and the channels that missed them
CREATE FUNCTION pg_layer_group_send_batch(
    _prefix text, _groups text[], _payloads bytea[], _expiries float8[], _excluded text[],
    OUT missed_positions bigint[], OUT missed_channels text[]
)
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE
    _now timestamptz := clock_timestamp();
    _nonce bigint := pg_layer_nonce();
    _inboxes text[];
    _firsts bigint[];
    _lasts bigint[];
    _rung text;
    _missed text[];
BEGIN
    -- A few that are small are quicker one by one: each rides along with its doorbell, so that nobody has to read. Larger ones
    -- cost all who listen to this database more than that saves.
    IF cardinality(_groups) <= 4 AND pg_column_size(_payloads) <= 8000 THEN
        FOR _i IN 1 .. cardinality(_groups) LOOP
            _missed := pg_layer_group_send_one(_prefix, _groups[_i], _payloads[_i], _expiries[_i], _excluded[_i]);
            CONTINUE WHEN _missed IS NULL;
            missed_channels := missed_channels || _missed;
            missed_positions := missed_positions || array_fill(_i::bigint, ARRAY[cardinality(_missed)]);
        END LOOP;
        RETURN;
    END IF;
    WITH RECURSIVE sent AS MATERIALIZED (
        SELECT s.*
        FROM unnest(_groups, _payloads, _expiries, _excluded)
            WITH ORDINALITY AS s (group_name, payload, expiry, excluded, position)
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
            CASE WHEN h.inbox LIKE '%!:%' THEN split_part(h.inbox, '!:', 2) END AS channel, l.capacity
        FROM hop AS h
        CROSS JOIN LATERAL (
            SELECT m.capacity FROM pg_layer_membership AS m
            WHERE m.group_name = h.group_name AND m.inbox = h.inbox AND m.expires_at > _now LIMIT 1
        ) AS l
        WHERE h.inbox IS NOT NULL
            AND coalesce((SELECT c.expires_at > now() FROM pg_layer_client AS c WHERE c.inbox = h.inbox), true)
    ), waiting AS MATERIALIZED (
        SELECT t.inbox, (SELECT count(*) FROM pg_layer_message AS m
                         WHERE m.inbox = t.inbox AND m.expires_at > _now) AS count
        FROM (SELECT DISTINCT inbox FROM target WHERE channel IS NOT NULL) AS t
    ), placed AS MATERIALIZED (
        SELECT t.inbox, t.channel, s.*, t.channel IS NOT NULL
            AND w.count + row_number() OVER (PARTITION BY t.inbox ORDER BY s.position) > t.capacity AS is_full
        FROM sent AS s
        JOIN target AS t ON t.group_name = s.group_name
        LEFT JOIN waiting AS w ON w.inbox = t.inbox
        WHERE t.channel IS DISTINCT FROM s.excluded OR t.channel IS NULL
    ), written AS (
        INSERT INTO pg_layer_message (inbox, nonce, channel, group_name, excluded, payload, expires_at)
        SELECT p.inbox, _nonce, p.channel, p.group_name, p.excluded, p.payload, _now + make_interval(secs => p.expiry)
        FROM placed AS p WHERE p.is_full IS NOT TRUE
        ORDER BY p.position, p.inbox
        RETURNING inbox, id
    ), batch AS (
        SELECT w.inbox, min(w.id) AS first, max(w.id) AS last FROM written AS w GROUP BY w.inbox
    )
    SELECT b.inboxes, b.firsts, b.lasts, p.positions, p.channels
    INTO _inboxes, _firsts, _lasts, missed_positions, missed_channels
    FROM (SELECT array_agg(inbox) AS inboxes, array_agg(first) AS firsts, array_agg(last) AS lasts FROM batch) AS b,
        (SELECT array_agg(position) AS positions, array_agg(channel) AS channels FROM placed WHERE is_full) AS p;
    FOR _i IN 1 .. coalesce(cardinality(_inboxes), 0) LOOP
        _rung := pg_layer_ring(_inboxes[_i], _nonce, _firsts[_i], _lasts[_i]);
    END LOOP;
END
$$;



-- ---------------------------------------------------------------------------------------------- for SQL

-- Messages from psql, a trigger, another language: as JSON, under the rules above. They leave when the transaction commits.

-- In somebody's own transaction a full NOTIFY queue would fail the commit: better not to ring, so that readers find the rows
-- by looking. Returns its argument, so that it can stand in another call, before which it runs.
CREATE FUNCTION pg_layer_spare_commit(_prefix text) RETURNS text
LANGUAGE sql VOLATILE AS $$
    SELECT CASE WHEN pg_notification_queue_usage() > 0.9 AND set_config('pg_layer.silent', 'on', true) = '' THEN NULL
        ELSE _prefix END
$$;

-- Raise an error about what the caller gave, and say what to do.
CREATE FUNCTION pg_layer_refuse(_what text, _advice text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    RAISE invalid_parameter_value USING MESSAGE = 'pg_layer: ' || _what, HINT = _advice;
END
$$;

CREATE FUNCTION pg_layer_check_channel(_name text, _what text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF _name IS NULL OR _name !~ '^[A-Za-z0-9._-]+(![A-Za-z0-9._-]*)?$' OR length(_name) > 99 THEN
        PERFORM pg_layer_refuse(
            format('%s is no valid %s.', coalesce(quote_literal(left(_name, 120)), 'NULL'), _what),
            'A name has 1 to 99 letters, digits, ".", "-" and "_"; that of a specific channel has one "!" as well.');
    END IF;
END
$$;

CREATE FUNCTION pg_layer_check_group(_name text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF _name IS NULL OR _name !~ '^[A-Za-z0-9._-]{1,99}$' THEN
        PERFORM pg_layer_refuse(
            format('%s is no valid name of a group.', coalesce(quote_literal(left(_name, 120)), 'NULL')),
            'A name has 1 to 99 letters, digits, ".", "-" and "_".');
    END IF;
END
$$;

-- The payload of a message in JSON, if that, its prefix and its expiry are sound: what the layer itself would not send is
-- refused, so that no consumer meets what its own layer cannot hand on.
CREATE FUNCTION pg_layer_payload(_prefix text, _message jsonb, _expiry float8) RETURNS bytea
LANGUAGE plpgsql STABLE AS $$
DECLARE
    _payload bytea;
    _key text;
    _number jsonb;
BEGIN
    IF _prefix IS NULL OR _prefix !~ '^[A-Za-z0-9._-]{1,50}$' THEN
        PERFORM pg_layer_refuse(
            format('%s is no valid prefix.', coalesce(quote_literal(left(_prefix, 120)), 'NULL')),
            'It must be the option "prefix" of the channel layer, which is "asgi" if none was set.');
    ELSIF _message IS NULL OR jsonb_typeof(_message) <> 'object' THEN
        PERFORM pg_layer_refuse(
            format('a message must be a JSON object, not %s.', coalesce(jsonb_typeof(_message), 'NULL')),
            'For example {"type": "chat.message", "text": "hi"}.');
    ELSIF jsonb_typeof(_message -> 'type') IS DISTINCT FROM 'string' OR _message ->> 'type' = '' THEN
        PERFORM pg_layer_refuse(
            'a message must have a "type" that is a string, and not an empty one.',
            'It names the method that handles it: {"type": "chat.message"} goes to chat_message().');
    ELSIF _expiry IS NULL OR NOT (_expiry > 0 AND _expiry <= 1000000000) THEN
        PERFORM pg_layer_refuse(
            format('expiry must be a number of seconds above 0, at most 1000000000, not %s.', coalesce(_expiry::text, 'NULL')),
            'Leave it out for the 60 seconds that are the layer''s own default.');
    END IF;
    SELECT k INTO _key FROM jsonb_object_keys(_message) AS k WHERE starts_with(k, '__asgi_') LIMIT 1;
    IF FOUND THEN
        PERFORM pg_layer_refuse(
            format('the message has a key %s.', quote_literal(left(_key, 120))),
            'Keys that begin with "__asgi_" belong to channel layers: give it another name.');
    END IF;
    _number := jsonb_path_query_first(_message, 'strict $.** ? (@ > 9223372036854775807 || @ < -9223372036854775808)');
    IF _number IS NOT NULL THEN
        PERFORM pg_layer_refuse(
            format('the message has a number that does not fit into 64 bits: %s.', left(_number::text, 40)),
            'Send it as a string.');
    END IF;
    IF jsonb_path_exists(_message, 'strict $.**{200 to last} ? (@.type() == "object" || @.type() == "array")') THEN
        PERFORM pg_layer_refuse('the message is nested too deeply.', 'At most 200 levels of objects and arrays are taken.');
    END IF;
    _payload := convert_to(_message::text, 'UTF8');
    IF octet_length(_payload) > 8388608 THEN
        PERFORM pg_layer_refuse(
            format('the message is %s bytes long; at most 8388608 are taken.', octet_length(_payload)),
            'Send what identifies the data, and let the consumer fetch it.');
    END IF;
    RETURN _payload;
END
$$;

-- The texts are compared bytewise, whatever the collation of the column or the variable they come from.

-- Send a message to a channel.
--   prefix, expiry (seconds), capacity: as in the layer's options
--   returns: whether it was taken; false: the channel is full
CREATE FUNCTION pg_layer_send(
    channel text, message jsonb, prefix text DEFAULT 'asgi', expiry float8 DEFAULT 60, capacity integer DEFAULT 100
) RETURNS boolean
LANGUAGE plpgsql AS $$
DECLARE
    _channel text COLLATE "C" := channel;
    _prefix text COLLATE "C" := prefix;
    _payload bytea;
BEGIN
    PERFORM pg_layer_check_channel(_channel, 'name of a channel');
    _payload := pg_layer_payload(_prefix, message, expiry);
    IF capacity IS NULL OR capacity < 1 THEN
        PERFORM pg_layer_refuse(
            format('capacity must be at least 1, not %s.', coalesce(capacity::text, 'NULL')),
            'Leave it out for the 100 messages that are the layer''s own default.');
    END IF;
    PERFORM pg_layer_spare_commit(_prefix);
    RETURN pg_layer_send_one(_prefix, _channel, _payload, expiry, capacity, 0) IS NOT NULL;
END
$$;

-- Send a message to all members of a group.
--   prefix, expiry (seconds): as in the layer's options
--   exclude: a member that is not to get it
CREATE FUNCTION pg_layer_group_send(
    group_name text, message jsonb, prefix text DEFAULT 'asgi', expiry float8 DEFAULT 60, exclude text DEFAULT NULL
) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    _group text COLLATE "C" := group_name;
    _prefix text COLLATE "C" := prefix;
    _excluded text COLLATE "C" := exclude;
    _payload bytea;
BEGIN
    PERFORM pg_layer_check_group(_group);
    _payload := pg_layer_payload(_prefix, message, expiry);
    IF _excluded IS NOT NULL THEN
        PERFORM pg_layer_check_channel(_excluded, 'channel to exclude');
    END IF;
    PERFORM pg_layer_spare_commit(_prefix);
    PERFORM pg_layer_group_send_one(_prefix, _group, _payload, expiry, _excluded);
END
$$;

-- Whatever search_path a session has, these find the layer's tables and functions, and never something else of that name, such
-- as a temporary table that a caller puts in the way of a SECURITY DEFINER trigger.
DO $$
BEGIN
    EXECUTE format('ALTER FUNCTION pg_layer_send(text, jsonb, text, float8, integer) SET search_path = %I, pg_temp',
                   current_schema());
    EXECUTE format('ALTER FUNCTION pg_layer_group_send(text, jsonb, text, float8, text) SET search_path = %I, pg_temp',
                   current_schema());
END
$$;


-- ---------------------------------------------------------------------------------------------- groups

-- Tell the owners of other clients' channels of a change of membership: a row in their inbox, so that it takes its place in
-- the order.
--   _unseen: inboxes of clients without a lease so far. When they come, they are to see to it that the membership lasts until
--       _expires_at (seconds since 1970, in the payload); the row itself does not wait for ever
CREATE FUNCTION pg_layer_tell(
    _prefix text, _own_inbox text, _kind text, _groups text[], _channels text[], _expires_at timestamptz, _unseen text[]
) RETURNS void
LANGUAGE plpgsql AS $$
DECLARE
    _nonce bigint := pg_layer_nonce();
    _rung bigint;
BEGIN
    -- Who changes memberships of its own alone need not be allowed to write messages.
    PERFORM FROM unnest(_channels) AS c (channel)
    WHERE position('!' IN c.channel) > 0 AND pg_layer_inbox(_prefix, c.channel) IS DISTINCT FROM _own_inbox LIMIT 1;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    WITH written AS (
        INSERT INTO pg_layer_message (inbox, nonce, kind, channel, group_name, payload, expires_at)
        SELECT c.inbox, _nonce, _kind, c.channel, c.group_name,
            CASE WHEN c.is_unseen THEN convert_to(extract(epoch FROM _expires_at)::text, 'UTF8') ELSE '' END,
            CASE WHEN c.is_unseen THEN least(_expires_at, clock_timestamp() + interval '1 day') ELSE _expires_at END
        FROM (
            SELECT c.*, i.inbox, coalesce(i.inbox = ANY (_unseen), false) AS is_unseen
            FROM unnest(_groups, _channels) AS c (group_name, channel), pg_layer_inbox(_prefix, c.channel) AS i (inbox)
        ) AS c
        WHERE position('!' IN c.channel) > 0 AND c.inbox IS DISTINCT FROM _own_inbox
        RETURNING inbox, id
    )
    SELECT count(pg_layer_ring(b.inbox, _nonce, b.first, b.last)) INTO _rung
    FROM (SELECT inbox, min(id) AS first, max(id) AS last FROM written GROUP BY inbox) AS b;
END
$$;

-- Change memberships: some channels join their groups, some leave. No (group, channel) may stand twice.
--   _own_inbox: the caller's own client, which needs no telling of its own channels; null: every owner is told, and what
--       somebody's transaction holds is waited for
--   _expiry: seconds, or null for as long as the client's lease
--   _leave_unless_since: for each that is to leave an id, or null: it stays if it has joined after that
--   returns: messages up to this id were sent before the joining; when the memberships end (seconds since 1970); the positions
--       (from 1) of those that stayed
CREATE FUNCTION pg_layer_regroup(
    _prefix text, _own_inbox text, _lease float8, _expiry float8,
    _join_groups text[], _join_channels text[], _join_capacities integer[],
    _leave_groups text[], _leave_channels text[], _leave_unless_since bigint[] DEFAULT NULL,
    OUT since_id bigint, OUT expires_at float8, OUT stayed bigint[]
)
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_hashjoin = off
    SET enable_mergejoin = off SET jit = off AS $$
DECLARE
    _now timestamptz := clock_timestamp();
    _expires_at timestamptz := CASE WHEN _expiry IS NULL THEN 'infinity' ELSE _now + make_interval(secs => _expiry) END;
    _is_foreign boolean;  -- whether any channel is another client's
    _unseen text[];
    _set text;
    _joined bigint;
BEGIN
    IF _own_inbox IS NOT NULL THEN
        -- The layer's own statement. It carries changes of many, who must not all wait for what one transaction holds.
        _set := set_config('lock_timeout', '100ms', true);
    END IF;
    IF cardinality(_leave_groups) > 0 THEN
        -- Row by row in the order of the keys, as everybody does who writes here: so statements do not deadlock each other,
        -- where each is a transaction. Transactions of several do, if they change the same memberships in different orders.
        DELETE FROM pg_layer_membership AS m USING (
            SELECT l.group_name COLLATE "C", pg_layer_inbox(_prefix, l.channel) COLLATE "C" AS inbox, l.channel COLLATE "C",
                l.unless_since
            FROM unnest(_leave_groups, _leave_channels, _leave_unless_since) AS l (group_name, channel, unless_since)
            ORDER BY 1, 2, 3
        ) AS l
        WHERE m.group_name = l.group_name AND m.inbox = l.inbox AND m.channel = l.channel
            AND (l.unless_since IS NULL OR m.joined <= l.unless_since);
        IF _leave_unless_since IS NOT NULL THEN
            stayed := ARRAY(
                SELECT l.position
                FROM unnest(_leave_groups, _leave_channels, _leave_unless_since) WITH ORDINALITY
                    AS l (group_name, channel, unless_since, position)
                JOIN pg_layer_membership AS m ON m.group_name = l.group_name
                    AND m.inbox = pg_layer_inbox(_prefix, l.channel) AND m.channel = l.channel
                WHERE l.unless_since IS NOT NULL);
        END IF;
        PERFORM pg_layer_tell(_prefix, _own_inbox, 'leave', _leave_groups, _leave_channels, _now + interval '1 day', NULL);
    END IF;
    IF cardinality(_join_groups) > 0 THEN
        -- The caller has a lease from here on, also before its first receive(). Others take theirs themselves: made here, in
        -- somebody's transaction, it would keep them waiting. Of those that have none nobody knows whether they live: they are
        -- members for the length of a lease, and see to the rest when they come.
        IF _own_inbox IS NOT NULL THEN
            INSERT INTO pg_layer_client (inbox, expires_at)
            SELECT _own_inbox, _now + make_interval(secs => _lease) FROM unnest(_join_channels) AS j (channel)
            WHERE position('!' IN j.channel) > 0 AND pg_layer_inbox(_prefix, j.channel) = _own_inbox LIMIT 1
            ON CONFLICT DO NOTHING;
        END IF;
        _is_foreign := EXISTS (
            SELECT FROM unnest(_join_channels) AS j (channel)
            WHERE position('!' IN j.channel) > 0 AND pg_layer_inbox(_prefix, j.channel) IS DISTINCT FROM _own_inbox);
        IF _is_foreign THEN
            SELECT array_agg(DISTINCT i.inbox) INTO _unseen
            FROM unnest(_join_channels) AS j (channel), pg_layer_inbox(_prefix, j.channel) AS i (inbox)
            WHERE position('!' IN j.channel) > 0 AND i.inbox IS DISTINCT FROM _own_inbox
                AND NOT EXISTS (SELECT FROM pg_layer_client AS c WHERE c.inbox = i.inbox);
        END IF;
        _joined := nextval('pg_layer_message_id_seq');
        INSERT INTO pg_layer_membership AS m (group_name, inbox, channel, expires_at, capacity, joined)
        SELECT j.group_name COLLATE "C", pg_layer_inbox(_prefix, j.channel) COLLATE "C", j.channel COLLATE "C",
            CASE WHEN _unseen IS NULL OR pg_layer_inbox(_prefix, j.channel) <> ALL (_unseen) THEN _expires_at
                ELSE least(_expires_at, _now + make_interval(secs => _lease)) END,
            CASE WHEN position('!' IN j.channel) = 0 THEN j.capacity END, _joined
        FROM unnest(_join_groups, _join_channels, _join_capacities) AS j (group_name, channel, capacity)
        ORDER BY 1, 2, 3
        ON CONFLICT (group_name, inbox, channel)
            DO UPDATE SET expires_at = excluded.expires_at, capacity = excluded.capacity, put_back = false,
                joined = greatest(m.joined, excluded.joined);
        IF _is_foreign THEN
            PERFORM pg_layer_tell(_prefix, _own_inbox, 'join', _join_groups, _join_channels, _expires_at, _unseen);
        END IF;
    END IF;
    since_id := nextval('pg_layer_message_id_seq');
    expires_at := extract(epoch FROM _expires_at);
END
$$;

-- Who is in a group: its live members' channels, as pg_layer_group_send knows them: not those of a process whose lease is over.
CREATE FUNCTION pg_layer_group_channels(_prefix text, _group text) RETURNS SETOF text
LANGUAGE sql STABLE SET enable_seqscan = off SET jit = off AS $$
    SELECT m.channel FROM pg_layer_membership AS m
    WHERE m.group_name = _group AND m.inbox > _prefix || '!' AND m.inbox < _prefix || '"'
        AND m.expires_at > clock_timestamp()
        AND coalesce((SELECT c.expires_at > now() FROM pg_layer_client AS c WHERE c.inbox = m.inbox), true)
    ORDER BY m.inbox, m.channel
$$;

-- All groups that have live members, and how many. The key tells groups of different prefixes apart.
CREATE VIEW pg_layer_group AS
    SELECT split_part(m.inbox, '!', 1) || '!' || m.group_name AS key, split_part(m.inbox, '!', 1) AS prefix,
        m.group_name, count(*) AS members, count(DISTINCT m.inbox) AS inboxes
    FROM pg_layer_membership AS m
    LEFT JOIN pg_layer_client AS c ON c.inbox = m.inbox
    WHERE m.expires_at > clock_timestamp() AND coalesce(c.expires_at > now(), true)
    GROUP BY prefix, m.group_name;

-- Put back memberships that a client remembers and the tables may have lost (a crash, a failover, a lapsed lease), or that
-- end too early. What somebody is changing right now is left to him: he tells the client. It is not waited for, but where
-- he joins what is missing here: that fails when it takes long.
--   _ttls: seconds each has left, or null for as long as the client's lease
--   returns: which of them were put back, and stand as that: the client may be about to learn that they had left before, and
--       is to withdraw them then
CREATE FUNCTION pg_layer_reassert(
    _inbox text, _groups text[], _channels text[], _ttls float8[], OUT back_groups text[], OUT back_channels text[]
)
LANGUAGE plpgsql SET lock_timeout = '100ms' SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off AS $$
BEGIN
    WITH wanted AS (
        SELECT r.group_name, r.channel,
            CASE WHEN r.ttl IS NULL THEN 'infinity' ELSE clock_timestamp() + make_interval(secs => r.ttl) END AS expires_at
        FROM unnest(_groups, _channels, _ttls) AS r (group_name, channel, ttl)
    ), early AS MATERIALIZED (
        SELECT m.group_name, m.channel, w.expires_at
        FROM wanted AS w
        JOIN pg_layer_membership AS m ON m.group_name = w.group_name AND m.inbox = _inbox AND m.channel = w.channel
        WHERE m.expires_at < w.expires_at
        FOR UPDATE OF m SKIP LOCKED
    )
    UPDATE pg_layer_membership AS m SET expires_at = e.expires_at
    FROM early AS e WHERE m.group_name = e.group_name AND m.inbox = _inbox AND m.channel = e.channel;
    INSERT INTO pg_layer_membership (group_name, inbox, channel, expires_at, put_back)
    SELECT r.group_name COLLATE "C", _inbox, r.channel COLLATE "C",
        CASE WHEN r.ttl IS NULL THEN 'infinity' ELSE clock_timestamp() + make_interval(secs => r.ttl) END, true
    FROM unnest(_groups, _channels, _ttls) AS r (group_name, channel, ttl)
    WHERE NOT EXISTS (SELECT FROM pg_layer_membership AS m
                      WHERE m.group_name = r.group_name AND m.inbox = _inbox AND m.channel = r.channel)
    ORDER BY 1, 2, 3
    ON CONFLICT DO NOTHING;
    SELECT array_agg(m.group_name), array_agg(m.channel) INTO back_groups, back_channels
    FROM unnest(_groups, _channels) AS r (group_name, channel)
    JOIN pg_layer_membership AS m ON m.group_name = r.group_name AND m.inbox = _inbox AND m.channel = r.channel
    WHERE m.put_back;
END
$$;

-- Remove memberships that a client had put back, and has learnt since that they had left. One that has joined anew stays.
CREATE FUNCTION pg_layer_withdraw(_inbox text, _groups text[], _channels text[]) RETURNS void
LANGUAGE sql SET lock_timeout = '100ms' SET enable_seqscan = off SET enable_hashjoin = off SET enable_mergejoin = off
    SET jit = off AS $$
    DELETE FROM pg_layer_membership AS m USING (
        SELECT w.group_name COLLATE "C", w.channel COLLATE "C"
        FROM unnest(_groups, _channels) AS w (group_name, channel) ORDER BY 1, 2
    ) AS w
    WHERE m.group_name = w.group_name AND m.inbox = _inbox AND m.channel = w.channel AND m.put_back
$$;


-- ---------------------------------------------------------------------------------------------- clients

-- Take or renew a client's lease. With a token, rings the client's own doorbell: a listener that does not hear it is deaf.
--   returns: the database's clock (seconds since 1970), whether there was no lease to renew, so that memberships may be gone,
--       when the server started: another one, as after a failover, may hand ids out again; and from which id on
CREATE FUNCTION pg_layer_renew(
    _inbox text, _host text, _pid integer, _lease float8, _fence bigint, _counters jsonb, _token text,
    OUT clock float8, OUT is_new boolean, OUT server float8, OUT next_id bigint
)
LANGUAGE plpgsql SET enable_seqscan = off AS $$
DECLARE
    _now timestamptz := clock_timestamp();
BEGIN
    -- Locked, so that no sweeper clears this client between the look and the renewal.
    SELECT c.expires_at <= _now INTO is_new FROM pg_layer_client AS c WHERE c.inbox = _inbox FOR UPDATE;
    is_new := coalesce(is_new, true);
    INSERT INTO pg_layer_client AS c (inbox, host, pid, expires_at, fence, counters)
    VALUES (_inbox, _host, _pid, _now + make_interval(secs => _lease), _fence, _counters)
    ON CONFLICT (inbox) DO UPDATE SET host = excluded.host, pid = excluded.pid, expires_at = excluded.expires_at,
        fence = greatest(c.fence, excluded.fence), ended_at = NULL, counters = excluded.counters;
    IF _token IS NOT NULL AND current_setting('pg_layer.silent', true) IS DISTINCT FROM 'on' THEN
        PERFORM pg_notify(pg_layer_doorbell(_inbox), 'P ' || _token);
    END IF;
    clock := extract(epoch FROM clock_timestamp());
    server := extract(epoch FROM pg_postmaster_start_time());
    next_id := nextval('pg_layer_message_id_seq');
END
$$;

-- A client gives up what it began with a smaller number and has had no answer to. A network may deliver that late, when
-- something else was done instead: it takes no effect then.
CREATE FUNCTION pg_layer_raise_fence(_inbox text, _fence bigint) RETURNS void
LANGUAGE sql AS $$
    UPDATE pg_layer_client AS c SET fence = greatest(c.fence, _fence) WHERE c.inbox = _inbox
$$;

-- Competing readers: move up to _limit messages of a normal channel into the own inbox, where nobody else takes them.
-- The caller commits this durably: undone by a crash of the server, the same job would be handed out twice.
CREATE FUNCTION pg_layer_take(_prefix text, _channel text, _inbox text, _fence bigint, _floor bigint, _limit integer)
RETURNS TABLE (
    id bigint, nonce bigint, kind text, channel text, group_name text, payload bytea, expires_at float8, excluded text
)
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
BEGIN
    -- Locked, so that a client that takes leave or gives this up does so before or after. Without a lease there are no jobs.
    PERFORM FROM pg_layer_client AS c
    WHERE c.inbox = _inbox AND c.expires_at > clock_timestamp() AND c.fence <= _fence FOR SHARE;
    IF NOT FOUND THEN
        -- No answer would be taken for an empty channel.
        RAISE object_not_in_prerequisite_state USING MESSAGE = 'The client has no lease, or has given this up.';
    END IF;
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
    RETURNING m.id, m.nonce, m.kind, m.channel, NULL::text, m.payload, extract(epoch FROM m.expires_at)::float8, NULL::text;
END
$$;

-- Give taken messages back to their channel, with their place and their expiry.
--   _fence: as for pg_layer_take; null: the client is at its end
CREATE FUNCTION pg_layer_put_back(_prefix text, _inbox text, _fence bigint, _ids bigint[], _nonces bigint[]) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET jit = off AS $$
DECLARE
    _nonce bigint := pg_layer_nonce();
    _rung bigint;
BEGIN
    IF _fence IS NOT NULL THEN
        PERFORM FROM pg_layer_client AS c WHERE c.inbox = _inbox AND c.fence <= _fence FOR SHARE;
        IF NOT FOUND THEN
            RAISE object_not_in_prerequisite_state USING MESSAGE = 'The client has given this up.';
        END IF;
    END IF;
    WITH moved AS (
        UPDATE pg_layer_message AS m SET inbox = pg_layer_inbox(_prefix, m.channel)
        WHERE m.inbox = _inbox AND m.id = ANY (_ids) AND m.nonce = ANY (_nonces)
        RETURNING m.inbox, m.id
    )
    SELECT count(pg_layer_ring(b.inbox, _nonce, b.first, b.last)) INTO _rung
    FROM (SELECT inbox, min(id) AS first, max(id) AS last FROM moved GROUP BY inbox) AS b;
END
$$;

-- A client's end: the rows it names were handed over, what else it took goes back to its channel, and all else of it goes.
CREATE FUNCTION pg_layer_close(
    _prefix text, _inbox text, _done_ids bigint[], _done_nonces bigint[], _groups text[], _channels text[]
) RETURNS void
LANGUAGE plpgsql SET plan_cache_mode = force_generic_plan SET enable_seqscan = off SET jit = off AS $$
DECLARE
    _ids bigint[];
    _nonces bigint[];
BEGIN
    -- Kept for a day with a lease that is over, so that nothing more is written for it; also where it never had one, as when
    -- a transaction has its channels join.
    INSERT INTO pg_layer_client AS c (inbox, expires_at, ended_at) VALUES (_inbox, clock_timestamp(), clock_timestamp())
    ON CONFLICT (inbox) DO UPDATE SET expires_at = excluded.expires_at, ended_at = excluded.ended_at;
    DELETE FROM pg_layer_message AS m WHERE m.inbox = _inbox AND m.id = ANY (_done_ids) AND m.nonce = ANY (_done_nonces);
    SELECT array_agg(m.id), array_agg(m.nonce) INTO _ids, _nonces
    FROM pg_layer_message AS m WHERE m.inbox = _inbox AND position('!' IN m.channel) = 0;
    PERFORM pg_layer_put_back(_prefix, _inbox, NULL, _ids, _nonces);
    DELETE FROM pg_layer_message AS m WHERE m.inbox = _inbox;
    -- One that somebody's open transaction holds is left to the sweeper: the jobs must not wait for that, and without a lease
    -- it counts for nothing.
    WITH doomed AS MATERIALIZED (
        SELECT m.group_name, m.channel FROM pg_layer_membership AS m, unnest(_groups, _channels) AS g (group_name, channel)
        WHERE m.group_name = g.group_name AND m.inbox = _inbox AND m.channel = g.channel
        FOR UPDATE OF m SKIP LOCKED
    )
    DELETE FROM pg_layer_membership AS m USING doomed AS d
    WHERE m.group_name = d.group_name AND m.inbox = _inbox AND m.channel = d.channel;
END
$$;

-- Back to a blank state: no messages, no memberships, and every client is told so.
--   returns: the id up to which all is gone
CREATE FUNCTION pg_layer_flush(_prefix text) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    _nonce bigint := pg_layer_nonce();
    _id bigint := nextval('pg_layer_message_id_seq');
    _rung bigint;
BEGIN
    DELETE FROM pg_layer_message AS m WHERE m.inbox >= _prefix || '!' AND m.inbox < _prefix || '"';
    DELETE FROM pg_layer_membership AS m WHERE m.inbox >= _prefix || '!' AND m.inbox < _prefix || '"';
    WITH written AS (
        INSERT INTO pg_layer_message (inbox, nonce, kind, expires_at)
        SELECT c.inbox, _nonce, 'flush', clock_timestamp() + interval '1 day' FROM pg_layer_client AS c
        WHERE c.inbox >= _prefix || '!' AND c.inbox < _prefix || '"' AND c.expires_at > clock_timestamp()
        RETURNING inbox, id
    )
    SELECT count(pg_layer_ring(w.inbox, _nonce, w.id, w.id)) INTO _rung FROM written AS w;
    RETURN _id;
END
$$;


-- ---------------------------------------------------------------------------------------------- sweeping

-- Remove up to _limit of each kind of what is over: expired messages and memberships, all that clients without a lease left.
-- A lapsed client itself is remembered for a day, so that nothing is written for the dead. Rows somebody else holds are left
-- for the next time, so that several sweepers do no harm.
--   _alone: only if nobody else sweeps right now; returns nulls if somebody does
--   _after_inbox, _after_id: where the last batch ended, so that this one does not walk what that one deleted; or nulls
--   returns: how many of each, and where this batch ended
CREATE FUNCTION pg_layer_sweep(
    _prefix text, _limit integer, _alone boolean, _after_inbox text, _after_id bigint,
    OUT messages bigint, OUT memberships bigint, OUT clients bigint, OUT last_inbox text, OUT last_id bigint
)
LANGUAGE plpgsql SET enable_seqscan = off SET enable_bitmapscan = off SET jit = off AS $$
DECLARE
    _now timestamptz := clock_timestamp();
    _lapsed text[];
    _set text;
BEGIN
    IF _alone AND NOT pg_try_advisory_xact_lock(hashtextextended('pg_layer_sweep ' || _prefix, 0)) THEN
        RETURN;
    END IF;
    -- Locked, so that a client that comes back renews after this sweep, and puts its memberships back after it.
    _lapsed := ARRAY(SELECT c.inbox FROM pg_layer_client AS c
                     WHERE c.inbox >= _prefix || '!' AND c.inbox < _prefix || '"' AND c.expires_at <= _now
                     FOR UPDATE SKIP LOCKED);
    WITH doomed AS MATERIALIZED (
        SELECT m.inbox, m.id FROM pg_layer_message AS m
        WHERE (m.inbox, m.id) > (coalesce(_after_inbox, _prefix || '!'), coalesce(_after_id, 0)) AND m.inbox < _prefix || '"'
            AND (m.expires_at <= _now OR m.inbox = ANY (_lapsed))
        ORDER BY m.inbox, m.id LIMIT _limit FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM pg_layer_message AS m USING doomed AS d WHERE m.inbox = d.inbox AND m.id = d.id RETURNING m.inbox, m.id
    ), last AS (
        SELECT g.inbox, g.id FROM gone AS g ORDER BY g.inbox COLLATE "C" DESC, g.id DESC LIMIT 1
    )
    SELECT (SELECT count(*) FROM gone), (SELECT l.inbox FROM last AS l), (SELECT l.id FROM last AS l)
    INTO messages, last_inbox, last_id;
    _set := set_config('enable_bitmapscan', 'on', true);  -- all memberships are looked through, in no order
    WITH doomed AS MATERIALIZED (
        SELECT m.group_name, m.inbox, m.channel FROM pg_layer_membership AS m
        WHERE m.inbox >= _prefix || '!' AND m.inbox < _prefix || '"' AND (m.expires_at <= _now OR m.inbox = ANY (_lapsed))
        LIMIT _limit FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM pg_layer_membership AS m USING doomed AS d
        WHERE m.group_name = d.group_name AND m.inbox = d.inbox AND m.channel = d.channel RETURNING 1
    )
    SELECT count(*) INTO memberships FROM gone;
    -- A client that is forgotten counts as living: what it left must have gone before.
    WITH doomed AS MATERIALIZED (
        SELECT c.inbox FROM pg_layer_client AS c
        WHERE c.inbox = ANY (_lapsed) AND c.expires_at <= _now - interval '1 day'
            AND messages < _limit AND memberships < _limit
            AND NOT EXISTS (SELECT FROM pg_layer_membership AS m WHERE m.inbox = c.inbox)
        LIMIT _limit FOR UPDATE SKIP LOCKED
    ), gone AS (
        DELETE FROM pg_layer_client AS c USING doomed AS d WHERE c.inbox = d.inbox RETURNING 1
    )
    SELECT count(*) INTO clients FROM gone;
    IF messages < _limit AND memberships < _limit THEN
        UPDATE pg_layer_client AS c SET ended_at = _now WHERE c.inbox = ANY (_lapsed) AND c.ended_at IS NULL;
        INSERT INTO pg_layer_last_sweep AS l (prefix, swept_at) VALUES (_prefix, _now)
        ON CONFLICT (prefix) DO UPDATE SET swept_at = greatest(l.swept_at, excluded.swept_at);
    END IF;
END
$$;

-- What pg_layer_sweep would remove, without a limit.
CREATE FUNCTION pg_layer_sweepable(_prefix text, OUT messages bigint, OUT memberships bigint, OUT clients bigint)
LANGUAGE sql STABLE AS $$
    WITH client AS (
        SELECT c.inbox, c.expires_at FROM pg_layer_client AS c
        WHERE c.inbox >= _prefix || '!' AND c.inbox < _prefix || '"' AND c.expires_at <= clock_timestamp()
    )
    SELECT
        (SELECT count(*) FROM pg_layer_message AS m
         WHERE m.inbox >= _prefix || '!' AND m.inbox < _prefix || '"'
            AND (m.expires_at <= clock_timestamp() OR m.inbox IN (SELECT c.inbox FROM client AS c))),
        (SELECT count(*) FROM pg_layer_membership AS m
         WHERE m.inbox >= _prefix || '!' AND m.inbox < _prefix || '"'
            AND (m.expires_at <= clock_timestamp() OR m.inbox IN (SELECT c.inbox FROM client AS c))),
        (SELECT count(*) FROM client AS c WHERE c.expires_at <= clock_timestamp() - interval '1 day')
$$;
