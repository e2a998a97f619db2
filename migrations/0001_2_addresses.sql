-- Addresses, notification channels and boots.

-- The address of a channel. 'specific.<client>!<local>' belongs to its client, every other name to all who read it.
CREATE FUNCTION pg_layer_address(_prefix text, _channel text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT _prefix || '!' || CASE
        WHEN position('!' IN _channel) = 0 THEN ':' || _channel
        ELSE split_part(split_part(_channel, '!', 1), '.', -1)
    END
$$;

-- The address of a group.
CREATE FUNCTION pg_layer_group_address(_prefix text, _group text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT _prefix || '!@' || _group $$;

-- The NOTIFY channel of an address that is no group's, or of a bucket. A hash, because names may be longer than the 63 bytes that NOTIFY
-- takes. The functions that send one message use this or the bucket's: PostgreSQL makes the parts of an expression ready at each call, also
-- those that it does not come to.
CREATE FUNCTION pg_layer_hashed_channel(_address text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT 'pg_layer_' || left(encode(sha256(_address::bytea), 'hex'), 40) $$;

-- The bucket of a group's address. Groups share 1,024: a process that listens to many channels costs its backend time at each
-- notification.
CREATE FUNCTION pg_layer_bucket(_address text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT split_part(_address, '@', 1) || '@'
        || (get_byte(sha256(_address::bytea), 0) * 4 + get_byte(sha256(_address::bytea), 1) / 64)
$$;

-- The NOTIFY channel of any address.
CREATE FUNCTION pg_layer_notification_channel(_address text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT pg_layer_hashed_channel(CASE WHEN position('!@' IN _address) = 0 THEN _address ELSE pg_layer_bucket(_address) END)
$$;

-- LISTEN to NOTIFY channels. In effect when the transaction has committed.
CREATE FUNCTION pg_layer_listen(_channels text[]) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    FOR _i IN 1 .. cardinality(_channels) LOOP
        EXECUTE format('LISTEN %I', _channels[_i]);
    END LOOP;
END
$$;

CREATE FUNCTION pg_layer_unlisten(_channels text[]) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    FOR _i IN 1 .. cardinality(_channels) LOOP
        EXECUTE format('UNLISTEN %I', _channels[_i]);
    END LOOP;
END
$$;

-- A standby cannot read unlogged tables: raise the error of a server that takes no writes, instead of another.
CREATE FUNCTION pg_layer_refuse_standby() RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    RAISE read_only_sql_transaction USING MESSAGE = 'pg_layer: the server is a standby.';
END
$$;

-- The present boot. Begins one if there is none: only for statements of the layer's own, because others wait for the new row until
-- the transaction ends.
CREATE FUNCTION pg_layer_current_boot() RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    _boot bigint;
BEGIN
    IF pg_is_in_recovery() THEN
        PERFORM pg_layer_refuse_standby();
    END IF;
    SELECT b.boot INTO _boot FROM pg_layer_boot AS b;
    IF NOT FOUND THEN
        _boot := pg_layer_begin_boot(0);
    END IF;
    RETURN _boot;
END
$$;

-- The present boot, later than _known, which a client has met: another one begins if the row is a copy from another cluster, or if the
-- clock of a promoted standby is behind.
CREATE FUNCTION pg_layer_begin_boot(_known bigint) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    _boot bigint;
BEGIN
    IF pg_is_in_recovery() THEN
        PERFORM pg_layer_refuse_standby();
    END IF;
    -- Looked at first: a role that only sends has no privilege to delete.
    IF EXISTS (SELECT FROM pg_layer_boot AS b, pg_control_system() AS s
               WHERE b.system_identifier <> s.system_identifier OR b.boot < _known)
    THEN
        DELETE FROM pg_layer_boot AS b USING pg_control_system() AS s
        WHERE b.system_identifier <> s.system_identifier OR b.boot < _known;
    END IF;
    INSERT INTO pg_layer_boot (boot, system_identifier)
    SELECT greatest((extract(epoch FROM clock_timestamp()) * 1000)::bigint, _known + 1), s.system_identifier
    FROM pg_control_system() AS s WHERE NOT EXISTS (SELECT FROM pg_layer_boot)
    ON CONFLICT DO NOTHING;
    SELECT b.boot INTO STRICT _boot FROM pg_layer_boot AS b;
    RETURN _boot;
END
$$;

-- The first one: messages of the application's transactions know theirs from the beginning.
SELECT pg_layer_begin_boot(0);
