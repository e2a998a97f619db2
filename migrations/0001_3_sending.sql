-- Sending: the write path of messages, and their announcements.
--
-- Words that this and the next files use:
--   own      A parameter. True: the statement is the layer's own and alone in its transaction. It
--            takes an advisory lock before it draws ids, so that ids are in the order of the
--            commits. It begins a boot if there is none. False: the statement is part of a
--            transaction of the application. It does neither, because the application may keep
--            the transaction open, and other statements would wait.
--   quiet    A parameter. True: the statement marks its rows and does not announce them. It returns
--            what the caller needs to announce them later: xid, boot, and the ids of the rows.
--
-- Settings of functions that run once or more per message, and why:
--   plan_cache_mode = force_generic_plan   A plan is made once per session.
--   enable_seqscan = off                   A plan outlives the state of the tables. One that was
--                                          made for a small table would scan it when it has grown
--                                          or is full of dead rows.
--   enable_bitmapscan = off                A bitmap sorts all rows for the first few in order. It
--                                          also marks no dead index entries, so that the next scan
--                                          walks them again.
--   jit = off                              A plan that must scan a table counts as so expensive
--                                          that PostgreSQL would compile it at each call.
--   search_path FROM CURRENT               The function finds the layer's tables with any path of
--                                          the caller: see 0001_1_tables.sql.
--
-- The functions that run once per message do not set search_path: pg_layer_send_one(),
-- pg_layer_group_send_one(), pg_layer_announce_marked(). PostgreSQL resolves the path again at each
-- call and after it. That costs 20 to 30 us: 139 -> 160 us for pg_layer_send_one(), 195 -> 226 us
-- for pg_layer_group_send_one(), client included. They use the path of their caller: the public
-- functions in 0001_9_public.sql set it, and the layer's connections have one that finds the
-- tables.

-- For SET search_path FROM CURRENT: see 0001_1_tables.sql.
SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

-- ------------------------------------------------------------------------- common parts

-- Begin to write: return the transaction's id and the boot. With _own, take the lock and begin a
-- boot if there is none. Ids must be drawn after this call: see docs/protocols.md, section 1.
--
--   Returns boot 0 if not _own and there is no boot.
--   Raises SQLSTATE 25006 on a standby.
--   Called by the functions that write several messages. Those that write one message do the same
--   within one statement.
CREATE FUNCTION pg_layer_begin_write(_own boolean, OUT xid xid8, OUT boot bigint)
LANGUAGE plpgsql AS $$
BEGIN
    IF _own THEN
        PERFORM pg_advisory_xact_lock(7205759403792794);
        boot := pg_layer_current_boot();
    ELSIF pg_is_in_recovery() THEN
        PERFORM pg_layer_refuse_standby();
    ELSE
        SELECT b.boot INTO boot FROM pg_layer_boot AS b;
        boot := coalesce(boot, 0);
    END IF;
    xid := pg_current_xact_id();
END
$$;

-- Return the low-water id of an address: counts of what waits there begin with it. 0 if it is
-- unknown.
CREATE FUNCTION pg_layer_low_id(_address text) RETURNS bigint
LANGUAGE sql STABLE AS $$
    SELECT coalesce((SELECT l.low_id FROM pg_layer_low_id AS l WHERE l.address = _address), 0)
$$;

-- ------------------------------------------------------------------------- announcements
-- docs/protocols.md, section 2, lists the notifications.

-- Return one message as a notification contains it: name, id, end, excluded member and payload.
--
--   _name: the channel, or '@' and the group
CREATE FUNCTION pg_layer_entry(
    _name text, _id bigint, _expires_at timestamptz, _excluded text, _payload bytea
) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT concat_ws(' ', _name, _id, extract(epoch FROM _expires_at), coalesce(_excluded, '*'),
        encode(_payload, 'base64'))
$$;

-- Return the text of a notification for one message: the message itself if it is small, otherwise
-- the row to read. NOTIFY takes less than 8,000 bytes: a payload of 5,600 bytes has 7,566 bytes in
-- base64, and at most 7,860 with names and numbers.
--
--   _channel, _group: one of them is null
CREATE FUNCTION pg_layer_single_notification(
    _marked boolean, _boot bigint, _xid xid8, _channel text, _group text, _id bigint,
    _expires_at timestamptz, _excluded text, _payload bytea
) RETURNS text
LANGUAGE sql STABLE AS $$
    SELECT CASE
        WHEN octet_length(_payload) <= 5600 THEN
            concat_ws(' ', CASE WHEN _marked THEN 'm' ELSE 'M' END, _boot, _xid,
                pg_layer_entry(
                    coalesce(_channel, '@' || _group), _id, _expires_at, _excluded, _payload))
        ELSE
            concat_ws(' ', CASE WHEN _marked THEN 'r' ELSE 'R' END, _boot, _xid,
                coalesce('@' || _group, '.'), _id, _id)
    END
$$;

-- Return the text of a notification for several messages: the messages themselves, or the rows to
-- read at an address.
--
--   _messages, _to_read: the first letter of the one and of the other kind of notification
--   _head: boot and transaction
--   _entries: the messages; null: the rows from the id _first to the id _last must be read
CREATE FUNCTION pg_layer_notification(
    _messages text, _to_read text, _head text, _address text, _entries text[],
    _first bigint, _last bigint
) RETURNS text
LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE
        WHEN _entries IS NOT NULL THEN
            concat_ws(' ', _messages, _head, array_to_string(_entries, ' '))
        ELSE
            concat_ws(' ', _to_read, _head, CASE
                WHEN position('!@' IN _address) > 0 THEN '@' || split_part(_address, '@', 2)
                ELSE '.'
            END, _first, _last)
    END
$$;

-- Announce rows in the order of their ids.
--
-- A notification contains small messages themselves, as many as fit, and otherwise names rows to
-- read. Of several messages, those up to 2,400 bytes count as small: an entry then has at most
-- 3,500 bytes. A notification is filled up to 7,800 bytes, because it costs all listeners of the
-- NOTIFY channel more than a message in it does.
--
--   _marked: whether all these rows are marked
--   the arrays: one element per row, in the order of the ids; each may be null if no element is set
--   Called by the functions that write several messages, and by pg_layer_announce_marked().
CREATE FUNCTION pg_layer_announce(
    _marked boolean, _boots bigint[], _xids text[], _ids bigint[], _addresses text[],
    _channels text[], _kinds text[], _excluded text[], _payloads bytea[],
    _expires_at timestamptz[]
) RETURNS void
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan
SET jit = off
AS $$
DECLARE
    _inline_most integer := CASE WHEN cardinality(_ids) = 1 THEN 5600 ELSE 2400 END;
    _messages text := CASE WHEN _marked THEN 'm' ELSE 'M' END;
    _to_read text := CASE WHEN _marked THEN 'r' ELSE 'R' END;
    _row record;
    -- The notification that is being made:
    _address text;
    _head text;       -- boot and transaction
    _entries text[];  -- messages; null: rows must be read
    _size integer;    -- of the messages
    _first bigint;
    _last bigint;
    _target text;
    _has_jobs boolean := false;
    _count bigint;
BEGIN
    -- Neighbours with the same address are announced together.
    FOR _row IN
        SELECT r.*, octet_length(r.entry) AS size
        FROM (
            SELECT r.address, concat_ws(' ', r.boot, r.xid) AS head, r.id,
                r.kind = 'message' AND position('!:' IN r.address) > 0 AS is_job,
                CASE WHEN r.kind = 'message' AND octet_length(r.payload) <= _inline_most THEN
                    pg_layer_entry(coalesce(r.channel, '@' || split_part(r.address, '@', 2)), r.id,
                        r.expires_at, r.excluded, r.payload)
                END AS entry
            FROM unnest(_boots, _xids, _ids, _addresses, _channels, _kinds, _excluded, _payloads,
                    _expires_at)
                AS r (boot, xid, id, address, channel, kind, excluded, payload, expires_at)
            OFFSET 0
        ) AS r
    LOOP
        IF _row.is_job THEN
            _has_jobs := true;
        ELSIF _row.address = _address AND _row.head = _head
            AND (_entries IS NULL) = (_row.entry IS NULL)
            AND _size + coalesce(_row.size, 0) < 7800
        THEN
            IF _entries IS NOT NULL THEN
                _entries := _entries || _row.entry;
                _size := _size + _row.size + 1;
            END IF;
            _last := _row.id;
        ELSE
            IF _address IS NOT NULL THEN
                PERFORM pg_notify(_target, pg_layer_notification(
                    _messages, _to_read, _head, _address, _entries, _first, _last));
            END IF;
            IF _row.address IS DISTINCT FROM _address THEN
                _address := _row.address;
                _target := pg_layer_notification_channel(_address);
            END IF;
            _head := _row.head;
            _entries := CASE WHEN _row.entry IS NOT NULL THEN ARRAY[_row.entry] END;
            _size := coalesce(_row.size, 0);
            _first := _row.id;
            _last := _row.id;
        END IF;
    END LOOP;
    IF _address IS NOT NULL THEN
        PERFORM pg_notify(_target, pg_layer_notification(
            _messages, _to_read, _head, _address, _entries, _first, _last));
    END IF;
    IF _has_jobs THEN
        -- Jobs have no order relative to other messages. The jobs of a channel are announced once.
        SELECT count(pg_notify(pg_layer_notification_channel(j.address), 'J ' || j.first))
        INTO _count
        FROM (
            SELECT r.address, min(r.id) AS first
            FROM unnest(_ids, _addresses, _kinds) AS r (id, address, kind)
            WHERE r.kind = 'message' AND position('!:' IN r.address) > 0
            GROUP BY r.address
        ) AS j;
    END IF;
END
$$;

-- Announce marked rows after the commit, or when the server takes NOTIFY again. Rows that were
-- undone by a savepoint, or that were received meanwhile, are left out.
--
--   the arrays: one element per row, in the order of the ids
--   Raises SQLSTATE 25006 on a standby.
--   Called by clients (_db/queries/send.py).
CREATE FUNCTION pg_layer_announce_marked(
    _boots bigint[], _xids bigint[], _ids bigint[], _addresses text[], _channels text[],
    _kinds text[], _excluded text[], _payloads bytea[]
) RETURNS void
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
SET jit = off
AS $$
BEGIN
    -- On a standby the rows may be missing: they would count as announced.
    IF pg_is_in_recovery() THEN
        PERFORM pg_layer_refuse_standby();
    END IF;
    IF cardinality(_ids) = 1 AND _kinds[1] = 'message' THEN
        -- Most transactions send one message.
        PERFORM pg_notify(pg_layer_notification_channel(m.address), CASE
            WHEN position('!:' IN m.address) > 0 THEN 'J ' || m.id
            ELSE pg_layer_single_notification(true, m.boot, m.xid, _channels[1],
                CASE WHEN _channels[1] IS NULL THEN split_part(m.address, '@', 2) END,
                m.id, m.expires_at, _excluded[1], _payloads[1])
        END)
        FROM pg_layer_message AS m
        WHERE m.address = _addresses[1] AND m.id = _ids[1] AND m.xid = _xids[1]::text::xid8
            AND m.boot = _boots[1];
        RETURN;
    END IF;
    PERFORM pg_layer_announce(true, r.boots, r.xids, r.ids, r.addresses, r.channels, r.kinds,
        r.excluded, r.payloads, r.expires_at)
    FROM (
        SELECT array_agg(r.boot) AS boots, array_agg(r.xid::text) AS xids, array_agg(r.id) AS ids,
            array_agg(r.address) AS addresses, array_agg(r.channel) AS channels,
            array_agg(r.kind) AS kinds, array_agg(r.excluded) AS excluded,
            array_agg(r.payload) AS payloads, array_agg(m.expires_at) AS expires_at
        FROM unnest(_boots, _xids, _ids, _addresses, _channels, _kinds, _excluded, _payloads)
            AS r (boot, xid, id, address, channel, kind, excluded, payload)
        CROSS JOIN LATERAL (
            SELECT m.boot, m.xid, m.expires_at FROM pg_layer_message AS m
            WHERE m.address = r.address AND m.id = r.id OFFSET 0
        ) AS m
        WHERE m.xid = r.xid::text::xid8 AND m.boot = r.boot
    ) AS r
    WHERE r.ids IS NOT NULL;
END
$$;

-- ------------------------------------------------------------------------- to channels

-- Send one message to a channel, unless the channel is full. Messages that have expired or were
-- received do not count.
--
--   _expiry: seconds
--   _capacity: of the channel
--   _low_id: the low-water id that the caller knows for the address, so that the count does not
--       walk dead rows; 0: unknown; null: do not count, because the caller has a credit for the
--       channel
--   _own, _quiet: see the top of this file
--   Returns id, transaction and boot of the row. If it counted, also the number of messages that
--   now wait in the channel, and the low-water id for the next call; else nulls. Null instead of
--   the array: the channel is full.
--   Raises SQLSTATE 25006 on a standby.
--   Called by clients (_db/queries/send.py) and by pg_layer_send().
CREATE FUNCTION pg_layer_send_one(
    _prefix text, _channel text, _payload bytea, _expiry float8, _capacity integer, _low_id bigint,
    _own boolean, _quiet boolean
) RETURNS bigint[]
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
SET jit = off
AS $$
DECLARE
    _waiting bigint;
    _next_low_id bigint;
    _id bigint;
    _xid xid8;
    _boot bigint;
    _notified text;
BEGIN
    IF pg_is_in_recovery() THEN
        PERFORM pg_layer_refuse_standby();
    END IF;
    IF _low_id IS NOT NULL THEN
        IF _low_id = 0 THEN
            _low_id := pg_layer_low_id(pg_layer_address(_prefix, _channel));
        END IF;
        SELECT count(*) FILTER (WHERE m.channel = _channel) + 1, min(m.id)
        INTO _waiting, _next_low_id
        FROM pg_layer_message AS m
        WHERE m.address = pg_layer_address(_prefix, _channel) AND m.id >= _low_id
            AND m.expires_at > clock_timestamp() AND m.kind = 'message';
        IF _waiting > _capacity THEN
            RETURN NULL;
        END IF;
    END IF;
    -- One statement does what pg_layer_begin_write() does, writes and announces: each statement
    -- that PL/pgSQL runs costs as much as the row. It writes nothing if there is no boot and _own
    -- is true. pg_layer_begin_write() then begins the boot, and the second try writes.
    FOR _try IN 1 .. 2 LOOP
        INSERT INTO pg_layer_message AS m
            (address, xid, boot, marked, channel, payload, expires_at)
        SELECT pg_layer_address(_prefix, _channel), pg_current_xact_id(), coalesce(b.boot, 0),
            _quiet OR b.boot IS NULL, _channel, _payload,
            clock_timestamp() + make_interval(secs => _expiry)
        FROM (
            SELECT CASE WHEN _own THEN pg_advisory_xact_lock(7205759403792794)::text END OFFSET 0
        ) AS l
        LEFT JOIN pg_layer_boot AS b ON true
        WHERE b.boot IS NOT NULL OR NOT _own
        RETURNING m.id, m.xid, m.boot, CASE WHEN NOT _quiet THEN
            pg_notify(pg_layer_hashed_channel(m.address), CASE
                WHEN position('!' IN _channel) = 0 THEN 'J ' || m.id
                ELSE pg_layer_single_notification(m.marked, m.boot, m.xid, _channel, NULL, m.id,
                    m.expires_at, NULL, _payload)
            END)::text
        END
        INTO _id, _xid, _boot, _notified;
        EXIT WHEN FOUND;
        PERFORM pg_layer_begin_write(_own);
    END LOOP;
    RETURN ARRAY[_id, _xid::text::bigint, _boot, _waiting,
        CASE WHEN _low_id IS NOT NULL THEN coalesce(_next_low_id, _id) END];
END
$$;

-- Send many messages to their channels, in their order, by the rules of pg_layer_send_one().
--
--   the arrays: one element per message; _expiries in seconds
--   _low_addresses, _low_ids: the low-water ids that the caller knows, by address; null: do not
--       count, because the caller has a credit for each of the channels
--   _own, _quiet: see the top of this file
--   Returns in full_positions the positions (from 1) of messages that were refused because their
--   channel is full; in ids the ids of the rows, in the order of the accepted messages. If it
--   counted, it also returns the low-water ids for the next call, and in waiting the number of
--   messages that now wait at the fullest address.
--   Raises SQLSTATE 25006 on a standby.
--   Called by clients (_db/queries/send.py).
CREATE FUNCTION pg_layer_send_batch(
    _prefix text, _channels text[], _payloads bytea[], _expiries float8[], _capacities integer[],
    _low_addresses text[], _low_ids bigint[], _own boolean, _quiet boolean,
    OUT full_positions bigint[], OUT low_addresses text[], OUT low_ids bigint[],
    OUT waiting bigint, OUT ids bigint[], OUT xid bigint, OUT boot bigint
)
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
SET jit = off
AS $$
DECLARE
    _now timestamptz := clock_timestamp();
    _full boolean[];  -- by position; a list of positions would be walked for each message
    _xid xid8;
    _addresses text[];
    _count bigint;
BEGIN
    IF _low_addresses IS NOT NULL THEN
        SELECT array_agg(t.address), array_agg(w.first), max(w.count)
        INTO low_addresses, low_ids, waiting
        FROM (
            SELECT d.address, coalesce(
                (SELECT l.id FROM unnest(_low_addresses, _low_ids) AS l (address, id)
                 WHERE l.address = d.address),
                pg_layer_low_id(d.address)) AS low
            FROM (
                SELECT DISTINCT pg_layer_address(_prefix, s.channel) AS address
                FROM unnest(_channels) AS s (channel)
            ) AS d
        ) AS t
        CROSS JOIN LATERAL (
            SELECT count(*) AS count, min(m.id) AS first FROM pg_layer_message AS m
            WHERE m.address = t.address AND m.id >= t.low AND m.expires_at > _now
                AND m.kind = 'message'
        ) AS w;
        -- Count by channel only if an address has so many messages that one of its channels could
        -- be full.
        IF waiting + cardinality(_channels) > (SELECT min(c) FROM unnest(_capacities) AS c) THEN
            SELECT array_agg(s.position) FILTER (WHERE s.is_full),
                array_agg(s.is_full ORDER BY s.position)
            INTO full_positions, _full
            FROM (
                SELECT s.position, s.capacity < coalesce(w.count, 0)
                    + row_number() OVER (PARTITION BY s.channel ORDER BY s.position) AS is_full
                FROM unnest(_channels, _capacities)
                    WITH ORDINALITY AS s (channel, capacity, position)
                LEFT JOIN (
                    SELECT m.channel, count(*) AS count
                    FROM unnest(low_addresses, low_ids) AS t (address, first)
                    CROSS JOIN LATERAL (
                        SELECT m.channel, m.expires_at, m.kind FROM pg_layer_message AS m
                        WHERE m.address = t.address AND m.id >= t.first OFFSET 0
                    ) AS m
                    WHERE m.expires_at > _now AND m.kind = 'message'
                    GROUP BY m.channel
                ) AS w ON w.channel = s.channel
            ) AS s;
        END IF;
    END IF;

    SELECT w.xid, w.boot INTO _xid, boot FROM pg_layer_begin_write(_own) AS w;
    xid := _xid::text::bigint;
    WITH written AS (
        INSERT INTO pg_layer_message AS m
            (address, xid, boot, marked, channel, payload, expires_at)
        SELECT pg_layer_address(_prefix, s.channel), _xid, pg_layer_send_batch.boot,
            _quiet OR pg_layer_send_batch.boot = 0, s.channel, s.payload,
            _now + make_interval(secs => s.expiry)
        FROM unnest(_channels, _payloads, _expiries, _full)
            WITH ORDINALITY AS s (channel, payload, expiry, is_full, position)
        WHERE s.is_full IS NOT TRUE
        ORDER BY s.position
        RETURNING m.id, m.address
    )
    SELECT array_agg(w.id), array_agg(w.address) INTO ids, _addresses
    FROM (SELECT * FROM written AS w ORDER BY w.id) AS w;
    IF ids IS NOT NULL AND NOT _quiet THEN
        IF cardinality(ids) <= 4 THEN
            -- The announcement of a few small messages contains them, and saves clients the read.
            PERFORM pg_layer_announce(boot = 0, array_fill(boot, ARRAY[cardinality(ids)]),
                array_fill(_xid::text, ARRAY[cardinality(ids)]), ids, _addresses, s.channels,
                array_fill('message'::text, ARRAY[cardinality(ids)]), NULL, s.payloads,
                s.expires_at)
            FROM (
                SELECT array_agg(s.channel) AS channels, array_agg(s.payload) AS payloads,
                    array_agg(_now + make_interval(secs => s.expiry)) AS expires_at
                FROM unnest(_channels, _payloads, _expiries, _full)
                    AS s (channel, payload, expiry, is_full)
                WHERE s.is_full IS NOT TRUE
            ) AS s;
        ELSE
            -- For a client, one read of many rows costs less than decoding the notifications.
            SELECT count(pg_notify(pg_layer_notification_channel(r.address), CASE
                WHEN r.address LIKE '%!:%' THEN 'J ' || r.first
                ELSE concat_ws(' ', CASE WHEN boot = 0 THEN 'r' ELSE 'R' END, boot, _xid, '.',
                    r.first, r.last)
            END))
            INTO _count
            FROM (
                SELECT r.address, min(r.id) AS first, max(r.id) AS last
                FROM unnest(ids, _addresses) AS r (id, address)
                GROUP BY r.address
            ) AS r;
        END IF;
    END IF;
    IF _low_addresses IS NOT NULL THEN
        waiting := waiting + cardinality(_channels);
        low_ids := ARRAY(SELECT coalesce(l.id, ids[1], 0)
                         FROM unnest(low_ids) WITH ORDINALITY AS l (id, position)
                         ORDER BY l.position);
    END IF;
END
$$;

-- ------------------------------------------------------------------------- to groups

-- Send each message to its group: one row per message, however many members the group has.
--
-- A group without membership rows is skipped while the rows are known to be complete
-- (pg_layer_is_steady). For each normal channel that is a member another row is written; a normal
-- channel that is full misses the message.
--
--   the arrays: one element per message; _expiries in seconds
--   _excluded: a member that does not receive the message, or null
--   _own, _quiet: see the top of this file
--   Returns in missed_positions and missed_channels the positions (from 1) of messages and the full
--   normal channels that missed them. For each row its id, address, channel (null: the row of the
--   group) and the position of its message.
--   Raises SQLSTATE 25006 on a standby.
--   Called by clients (_db/queries/send.py) and by pg_layer_group_send_one().
CREATE FUNCTION pg_layer_group_send_batch(
    _prefix text, _groups text[], _payloads bytea[], _expiries float8[], _excluded text[],
    _own boolean, _quiet boolean,
    OUT missed_positions bigint[], OUT missed_channels text[], OUT ids bigint[],
    OUT addresses text[], OUT channels text[], OUT positions bigint[], OUT xid bigint,
    OUT boot bigint
)
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
SET jit = off
AS $$
DECLARE
    _now timestamptz := clock_timestamp();
    _xid xid8;
    _is_plain boolean;
    _empty text[];
    _job_groups text[];
    _job_channels text[];
    _job_capacities integer[];
    _job_counts bigint[];
    _sent_excluded text[];
    _sent_payloads bytea[];
    _expires_at timestamptz[];
BEGIN
    SELECT w.xid, w.boot INTO _xid, boot FROM pg_layer_begin_write(_own) AS w;
    xid := _xid::text::bigint;
    -- The usual case: all groups have members, and no member is a normal channel. Each message is
    -- then one row.
    SELECT bool_and(
        (SELECT m.address FROM pg_layer_membership AS m
         WHERE m.group_name = g.group_name AND m.address > _prefix || '!'
            AND m.address < _prefix || '"'
         ORDER BY m.address LIMIT 1) IS NOT NULL
        AND (SELECT m.address FROM pg_layer_membership AS m
             WHERE m.group_name = g.group_name AND m.address >= _prefix || '!:'
                AND m.address < _prefix || '!;'
             ORDER BY m.address LIMIT 1) IS NULL)
    INTO _is_plain
    FROM (SELECT DISTINCT group_name FROM unnest(_groups) AS u (group_name)) AS g;
    IF _is_plain THEN
        SELECT array_agg(s.position ORDER BY s.position),
            array_agg(_prefix || '!@' || s.group_name ORDER BY s.position),
            array_fill(NULL::text, ARRAY[cardinality(_groups)]), _excluded, _payloads,
            array_agg(_now + make_interval(secs => s.expiry) ORDER BY s.position)
        INTO positions, addresses, channels, _sent_excluded, _sent_payloads, _expires_at
        FROM unnest(_groups, _expiries) WITH ORDINALITY AS s (group_name, expiry, position);
    ELSE
        -- The groups without a membership row of any client. Client addresses sort before and after
        -- the addresses of normal channels. Scalar subqueries: an anti join may read all rows of a
        -- large group.
        SELECT array_agg(g.group_name) INTO _empty
        FROM (SELECT DISTINCT group_name FROM unnest(_groups) AS u (group_name)) AS g
        WHERE (SELECT true FROM pg_layer_membership AS m
               WHERE m.group_name = g.group_name AND m.address > _prefix || '!'
                    AND m.address < _prefix || '!:' LIMIT 1) IS NULL
            AND (SELECT true FROM pg_layer_membership AS m
                 WHERE m.group_name = g.group_name AND m.address >= _prefix || '!;'
                    AND m.address < _prefix || '"' LIMIT 1) IS NULL;
        IF _empty IS NOT NULL AND NOT pg_layer_is_steady(_prefix, boot) THEN
            _empty := NULL;
        END IF;
        SELECT array_agg(j.group_name), array_agg(j.channel), array_agg(j.capacity),
            array_agg(w.count)
        INTO _job_groups, _job_channels, _job_capacities, _job_counts
        FROM (SELECT DISTINCT group_name FROM unnest(_groups) AS u (group_name)) AS g
        CROSS JOIN LATERAL pg_layer_normal_members(_prefix, g.group_name) AS j
        CROSS JOIN LATERAL (
            SELECT count(*) AS count FROM pg_layer_message AS m
            WHERE m.address = _prefix || '!:' || j.channel
                AND m.id >= pg_layer_low_id(_prefix || '!:' || j.channel)
                AND m.expires_at > _now
        ) AS w;

        WITH sent AS MATERIALIZED (
            SELECT s.*, _now + make_interval(secs => s.expiry) AS expires_at
            FROM unnest(_groups, _payloads, _expiries, _excluded)
                WITH ORDINALITY AS s (group_name, payload, expiry, excluded, position)
        ), placed AS MATERIALIZED (
            SELECT s.*, NULL::text AS channel, false AS is_full FROM sent AS s
            -- NOT IN with a subquery is hashed. <> ALL would compare with each element.
            WHERE _empty IS NULL
                OR s.group_name NOT IN (SELECT e.name FROM unnest(_empty) AS e (name))
            UNION ALL
            SELECT s.*, j.channel, j.capacity
                < j.count + row_number() OVER (PARTITION BY j.channel ORDER BY s.position)
            FROM sent AS s
            JOIN unnest(_job_groups, _job_channels, _job_capacities, _job_counts)
                    AS j (group_name, channel, capacity, count)
                ON j.group_name = s.group_name AND j.channel IS DISTINCT FROM s.excluded
        )
        SELECT r.*, f.positions, f.channels
        INTO positions, addresses, channels, _sent_excluded, _sent_payloads, _expires_at,
            missed_positions, missed_channels
        FROM (
            SELECT array_agg(p.position) AS positions,
                array_agg(_prefix || CASE
                    WHEN p.channel IS NULL THEN '!@' || p.group_name
                    ELSE '!:' || p.channel
                END) AS addresses,
                array_agg(p.channel) AS channels, array_agg(p.excluded) AS excluded,
                array_agg(p.payload) AS payloads, array_agg(p.expires_at) AS expires_at
            FROM (
                SELECT * FROM placed WHERE NOT is_full ORDER BY position, channel NULLS FIRST
            ) AS p
        ) AS r, (
            SELECT array_agg(p.position) AS positions, array_agg(p.channel) AS channels
            FROM placed AS p WHERE p.is_full
        ) AS f;
    END IF;
    IF positions IS NULL THEN
        RETURN;
    END IF;
    WITH written AS (
        INSERT INTO pg_layer_message
            (address, xid, boot, marked, channel, excluded, payload, expires_at)
        SELECT r.address, _xid, pg_layer_group_send_batch.boot,
            _quiet OR pg_layer_group_send_batch.boot = 0, r.channel, r.excluded, r.payload,
            r.expires_at
        FROM unnest(addresses, channels, _sent_excluded, _sent_payloads, _expires_at)
            WITH ORDINALITY AS r (address, channel, excluded, payload, expires_at, place)
        ORDER BY r.place
        RETURNING id
    )
    SELECT array_agg(w.id ORDER BY w.id) INTO ids FROM written AS w;
    IF NOT _quiet THEN
        PERFORM pg_layer_announce(boot = 0, array_fill(boot, ARRAY[cardinality(ids)]),
            array_fill(_xid::text, ARRAY[cardinality(ids)]), ids, addresses, channels,
            array_fill('message'::text, ARRAY[cardinality(ids)]), _sent_excluded, _sent_payloads,
            _expires_at);
    END IF;
END
$$;

-- Send one message to its group, by the rules of pg_layer_group_send_batch().
--
--   _expiry: seconds
--   _excluded: a member that does not receive the message, or null
--   _own, _quiet: see the top of this file
--   Returns the full normal channels that missed the message. If _quiet, also id, address and
--   channel (null: the row of the group) of each row, and the transaction and boot of all.
--   Raises SQLSTATE 25006 on a standby.
--   Called by clients (_db/queries/send.py) and by pg_layer_group_send().
CREATE FUNCTION pg_layer_group_send_one(
    _prefix text, _group text, _payload bytea, _expiry float8, _excluded text, _own boolean,
    _quiet boolean DEFAULT false,
    OUT missed_channels text[], OUT ids bigint[], OUT addresses text[], OUT channels text[],
    OUT xid bigint, OUT boot bigint
)
LANGUAGE plpgsql
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET enable_bitmapscan = off
SET jit = off
AS $$
DECLARE
    _id bigint;
    _xid xid8;
    _notified text;
BEGIN
    IF pg_is_in_recovery() THEN
        PERFORM pg_layer_refuse_standby();
    END IF;
    -- One statement checks the group, does what pg_layer_begin_write() does, writes and announces.
    -- It writes nothing if the group has no members or normal channels are members, or if there is
    -- no boot yet. ORDER BY: a plan for the actual values may otherwise walk the index on addresses
    -- until it meets the group.
    INSERT INTO pg_layer_message AS m (address, xid, boot, marked, excluded, payload, expires_at)
    SELECT pg_layer_group_address(_prefix, _group), pg_current_xact_id(), b.boot, _quiet,
        _excluded, _payload, clock_timestamp() + make_interval(secs => _expiry)
    FROM (
        SELECT CASE WHEN _own THEN pg_advisory_xact_lock(7205759403792794)::text END OFFSET 0
    ) AS l
    CROSS JOIN pg_layer_boot AS b
    WHERE (SELECT m.address FROM pg_layer_membership AS m
           WHERE m.group_name = _group AND m.address > _prefix || '!'
                AND m.address < _prefix || '"'
           ORDER BY m.address LIMIT 1) IS NOT NULL
        AND (SELECT m.address FROM pg_layer_membership AS m
             WHERE m.group_name = _group AND m.address >= _prefix || '!:'
                AND m.address < _prefix || '!;'
             ORDER BY m.address LIMIT 1) IS NULL
    RETURNING m.id, m.xid, m.boot, CASE WHEN NOT _quiet THEN
        pg_notify(pg_layer_hashed_channel(pg_layer_bucket(m.address)),
            pg_layer_single_notification(false, m.boot, m.xid, NULL, _group, m.id, m.expires_at,
                _excluded, _payload))::text
    END
    INTO _id, _xid, boot, _notified;
    IF NOT FOUND THEN
        SELECT b.missed_channels, b.ids, b.addresses, b.channels, b.xid, b.boot
        INTO missed_channels, ids, addresses, channels, xid, boot
        FROM pg_layer_group_send_batch(_prefix, ARRAY[_group], ARRAY[_payload], ARRAY[_expiry],
            ARRAY[_excluded], _own, _quiet) AS b;
    ELSIF _quiet THEN
        ids := ARRAY[_id];
        addresses := ARRAY[pg_layer_group_address(_prefix, _group)];
        channels := ARRAY[NULL::text];
        xid := _xid::text::bigint;
    END IF;
END
$$;
