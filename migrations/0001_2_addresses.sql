-- Addresses, the NOTIFY channels that belong to them, and boots.
--
-- The functions of the first part use no tables. pg_layer/_messages/addresses.py has the same
-- rules. They set no search_path: PostgreSQL then inlines them into the statements that call them,
-- and the functions that call them set it.

-- For SET search_path FROM CURRENT: see 0001_1_tables.sql.
SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

-- ------------------------------------------------------------------------- addresses

-- Return the address of a channel. A specific channel ('specific.<client>!<local>') has the address
-- of its client, any other channel one of its own.
--
-- Called by most functions of the layer, and by clients as a probe: it needs no privilege on
-- tables.
CREATE FUNCTION pg_layer_address(_prefix text, _channel text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT _prefix || '!' || CASE
        WHEN position('!' IN _channel) = 0 THEN ':' || _channel
        ELSE split_part(split_part(_channel, '!', 1), '.', -1)
    END
$$;

-- Return the address of a group.
CREATE FUNCTION pg_layer_group_address(_prefix text, _group text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$ SELECT _prefix || '!@' || _group $$;

-- Return the NOTIFY channel of an address that is not a group's, or of a bucket. It is a hash,
-- because NOTIFY takes names of at most 63 bytes.
--
-- The functions that send one message call this function, with or without pg_layer_bucket(),
-- instead of pg_layer_notification_channel(): PostgreSQL prepares all parts of an inlined
-- expression at each call, also the branches of a CASE that it does not evaluate.
CREATE FUNCTION pg_layer_hashed_channel(_address text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT 'pg_layer_' || left(encode(sha256(_address::bytea), 'hex'), 40)
$$;

-- Return the bucket of a group's address: one of 1,024, which all groups share. Each channel that a
-- process listens to costs its backend time at each notification.
CREATE FUNCTION pg_layer_bucket(_address text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT split_part(_address, '@', 1) || '@'
        || (get_byte(sha256(_address::bytea), 0) * 4 + get_byte(sha256(_address::bytea), 1) / 64)
$$;

-- Return the NOTIFY channel of any address.
CREATE FUNCTION pg_layer_notification_channel(_address text) RETURNS text
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT pg_layer_hashed_channel(CASE
        WHEN position('!@' IN _address) = 0 THEN _address
        ELSE pg_layer_bucket(_address)
    END)
$$;

-- ------------------------------------------------------------------------- boots

-- Raise the error of a server that takes no writes (SQLSTATE 25006). A standby cannot read unlogged
-- tables, and would raise another error.
CREATE FUNCTION pg_layer_refuse_standby() RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    RAISE read_only_sql_transaction USING MESSAGE = 'pg_layer: the server is a standby.';
END
$$;

-- Return the current boot. Begin one if there is none.
--
-- Only for statements that are alone in their transaction: other statements wait for a new row of
-- pg_layer_boot until the transaction ends.
--
--   Raises SQLSTATE 25006 on a standby.
--   Called by the functions of the files below.
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

-- Return the current boot, as pg_layer_current_boot(). Begin another one if the row was copied from
-- another cluster, or if its boot is earlier than _known. The clock of a promoted standby may be
-- behind.
--
--   _known: the latest boot that the caller knows, or 0
--   Raises SQLSTATE 25006 on a standby.
--   Called by pg_layer_current_boot() and pg_layer_position().
CREATE FUNCTION pg_layer_begin_boot(_known bigint) RETURNS bigint
LANGUAGE plpgsql AS $$
DECLARE
    _boot bigint;
BEGIN
    IF pg_is_in_recovery() THEN
        PERFORM pg_layer_refuse_standby();
    END IF;
    -- Check before the DELETE: a role that only sends has no privilege to delete.
    IF EXISTS (SELECT FROM pg_layer_boot AS b, pg_control_system() AS s
               WHERE b.system_identifier <> s.system_identifier OR b.boot < _known)
    THEN
        DELETE FROM pg_layer_boot AS b USING pg_control_system() AS s
        WHERE b.system_identifier <> s.system_identifier OR b.boot < _known;
    END IF;
    INSERT INTO pg_layer_boot (boot, system_identifier)
    SELECT greatest((extract(epoch FROM clock_timestamp()) * 1000)::bigint, _known + 1),
        s.system_identifier
    FROM pg_control_system() AS s WHERE NOT EXISTS (SELECT FROM pg_layer_boot)
    ON CONFLICT DO NOTHING;
    SELECT b.boot INTO STRICT _boot FROM pg_layer_boot AS b;
    RETURN _boot;
END
$$;

-- Begin the first boot, so that messages in the first transactions of the application have a boot.
SELECT pg_layer_begin_boot(0);
