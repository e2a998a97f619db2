-- The tables of the measurements that run without a layer: as pg_layer's, with what a message cannot do without.

CREATE TABLE bare_message (
    inbox      text COLLATE "C" NOT NULL,
    id         bigint GENERATED ALWAYS AS IDENTITY,
    nonce      bigint NOT NULL,
    payload    bytea NOT NULL,
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (inbox, id)
);
ALTER TABLE bare_message ALTER COLUMN payload SET STORAGE EXTERNAL;
ALTER TABLE bare_message SET (
    autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 20000,
    autovacuum_vacuum_insert_scale_factor = 0.0, autovacuum_vacuum_insert_threshold = 200000,
    autovacuum_vacuum_cost_delay = 0
);

CREATE TABLE bare_membership (
    group_name text COLLATE "C" NOT NULL,
    inbox      text COLLATE "C" NOT NULL,
    channel    text COLLATE "C" NOT NULL,
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (group_name, inbox, channel)
);
