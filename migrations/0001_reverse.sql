-- Drop the view, the functions and the tables of the layer, in the schema of its message table.
DROP VIEW pg_layer_group;
DO $$
DECLARE
    _function regprocedure;
BEGIN
    FOR _function IN
        SELECT p.oid FROM pg_proc AS p
        WHERE p.proname LIKE 'pg\_layer\_%' AND p.pronamespace = (
            SELECT c.relnamespace FROM pg_class AS c WHERE c.oid = 'pg_layer_message'::regclass)
    LOOP
        EXECUTE format('DROP FUNCTION %s CASCADE', _function);
    END LOOP;
END
$$;
DROP TABLE pg_layer_message, pg_layer_membership, pg_layer_client, pg_layer_lease_clock,
    pg_layer_boot, pg_layer_low_id, pg_layer_last_sweep;
