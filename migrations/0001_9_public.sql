-- The public functions, for psql, triggers and other languages: messages as JSON, under the rules
-- of the layer. They are sent when the transaction commits. docs/reference/sql.md describes them.
--
-- Arguments are copied into variables with COLLATE "C". So they are compared bytewise, whatever the
-- collation of the column or variable that the caller passes.

-- For SET search_path FROM CURRENT: see 0001_1_tables.sql.
SELECT set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

-- ------------------------------------------------------------------------- checks

-- Return whether the statement must be quiet (see 0001_3_sending.sql). The caller has set
-- pg_layer.silent, because a prepared transaction cannot NOTIFY; or NOTIFY's queue is nearly full,
-- which would fail the commit. Receivers find the rows within two heartbeats.
--
--   Called by the public functions.
CREATE FUNCTION pg_layer_is_quiet() RETURNS boolean
LANGUAGE sql VOLATILE AS $$
    SELECT coalesce(current_setting('pg_layer.silent', true), '') = 'on'
        OR pg_notification_queue_usage() > 0.9
$$;

-- Raise an error about an argument (SQLSTATE 22023), with a hint.
CREATE FUNCTION pg_layer_refuse(_what text, _advice text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    RAISE invalid_parameter_value USING MESSAGE = 'pg_layer: ' || _what, HINT = _advice;
END
$$;

-- Raise an error if _name is not a valid name of a channel.
--
--   _what: what the name is used for, as in 'name of a channel'
CREATE FUNCTION pg_layer_check_channel(_name text, _what text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF _name IS NULL OR _name !~ '^[A-Za-z0-9._-]+(![A-Za-z0-9._-]*)?$' OR length(_name) > 99 THEN
        PERFORM pg_layer_refuse(
            format('%s is no valid %s.', coalesce(quote_literal(left(_name, 120)), 'NULL'), _what),
            'A name has 1 to 99 letters, digits, ".", "-" and "_"; '
                || 'that of a specific channel has one "!" as well.');
    END IF;
END
$$;

-- Raise an error if _name is not a valid name of a group.
CREATE FUNCTION pg_layer_check_group(_name text) RETURNS void
LANGUAGE plpgsql AS $$
BEGIN
    IF _name IS NULL OR _name !~ '^[A-Za-z0-9._-]{1,99}$' THEN
        PERFORM pg_layer_refuse(
            format('%s is no valid name of a group.',
                coalesce(quote_literal(left(_name, 120)), 'NULL')),
            'A name has 1 to 99 letters, digits, ".", "-" and "_".');
    END IF;
END
$$;

-- Return the payload of a message in JSON. Raise an error about a message, a prefix or an expiry
-- that the layer itself would refuse.
--
--   _expiry: seconds
--   Raises SQLSTATE 22023.
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
            'It must be the option "prefix" of the channel layer, which is "asgi" if none was set.'
        );
    ELSIF _message IS NULL OR jsonb_typeof(_message) <> 'object' THEN
        PERFORM pg_layer_refuse(
            format('a message must be a JSON object, not %s.',
                coalesce(jsonb_typeof(_message), 'NULL')),
            'For example {"type": "chat.message", "text": "hi"}.');
    ELSIF jsonb_typeof(_message -> 'type') IS DISTINCT FROM 'string' OR _message ->> 'type' = ''
    THEN
        PERFORM pg_layer_refuse(
            'a message must have a "type" that is a string, and not an empty one.',
            'It names the method that handles it: '
                || '{"type": "chat.message"} goes to chat_message().');
    ELSIF _expiry IS NULL OR NOT (_expiry > 0 AND _expiry <= 1000000000) THEN
        PERFORM pg_layer_refuse(
            format('expiry must be a number of seconds above 0, at most 1000000000, not %s.',
                coalesce(_expiry::text, 'NULL')),
            'Leave it out for the 60 seconds that are the layer''s own default.');
    END IF;
    SELECT k INTO _key FROM jsonb_object_keys(_message) AS k
    WHERE starts_with(k, '__asgi_') LIMIT 1;
    IF FOUND THEN
        PERFORM pg_layer_refuse(
            format('the message has a key %s.', quote_literal(left(_key, 120))),
            'Keys that begin with "__asgi_" belong to channel layers: give it another name.');
    END IF;
    _number := jsonb_path_query_first(_message,
        'strict $.** ? (@ > 18446744073709551615 || @ < -9223372036854775808)');
    IF _number IS NOT NULL THEN
        PERFORM pg_layer_refuse(
            format('the message has a number that does not fit into 64 bits: %s.',
                left(_number::text, 40)),
            'Send it as a string.');
    END IF;
    IF jsonb_path_exists(_message,
        'strict $.**{200 to last} ? (@.type() == "object" || @.type() == "array")')
    THEN
        PERFORM pg_layer_refuse('the message is nested too deeply.',
            'At most 200 levels of objects and arrays are taken.');
    END IF;
    _payload := convert_to(_message::text, 'UTF8');
    IF octet_length(_payload) > 8388608 THEN
        PERFORM pg_layer_refuse(
            format('the message is %s bytes long; at most 8388608 are taken.',
                octet_length(_payload)),
            'Send what identifies the data, and let the consumer fetch it.');
    END IF;
    RETURN _payload;
END
$$;

-- ------------------------------------------------------------------------- public functions

-- Send a message to a channel.
--
-- search_path is set: the function finds the layer's tables and functions with any path of the
-- caller. It never finds another object of that name, such as a temporary table that a caller
-- creates to interfere with a SECURITY DEFINER trigger.
--
--   prefix, expiry (seconds), capacity: as the options of the layer
--   Returns whether the message was accepted; false: the channel is full.
--   Raises SQLSTATE 22023 for an invalid argument, and 25006 on a standby.
CREATE FUNCTION pg_layer_send(
    channel text, message jsonb, prefix text DEFAULT 'asgi', expiry float8 DEFAULT 60,
    capacity integer DEFAULT 100
) RETURNS boolean
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
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
    RETURN pg_layer_send_one(
        _prefix, _channel, _payload, expiry, capacity, 0, false, pg_layer_is_quiet()) IS NOT NULL;
END
$$;

-- Send a message to all members of a group.
--
--   prefix, expiry (seconds): as the options of the layer
--   exclude: a member that does not receive the message
--   Raises SQLSTATE 22023 for an invalid argument, and 25006 on a standby.
CREATE FUNCTION pg_layer_group_send(
    group_name text, message jsonb, prefix text DEFAULT 'asgi', expiry float8 DEFAULT 60,
    exclude text DEFAULT NULL
) RETURNS void
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
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
    PERFORM pg_layer_group_send_one(
        _prefix, _group, _payload, expiry, _excluded, false, pg_layer_is_quiet());
END
$$;

-- Restore the search_path of the migration: see 0001_1_tables.sql.
SELECT set_config('search_path',
    coalesce(nullif(current_setting('pg_layer.search_path', true), ''),
        current_setting('search_path')), true);
