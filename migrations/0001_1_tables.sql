-- The tables. docs/protocols.md states the rules; docs/architecture.md the way of a message.
--
-- Names compare bytewise (COLLATE "C"), so that all addresses of a prefix lie in one range of an index.
-- Time is the database's. clock_timestamp() and not now(): a message that is sent late in a long transaction must not be expired
-- when it is written.

CREATE TABLE pg_layer_message (
    address    text COLLATE "C" NOT NULL,                   -- a client, a normal channel or a group: see 0001_2_addresses.sql
    -- The transaction that wrote the row, or claimed the job. Before the id, because its value must be drawn first.
    xid        xid8 NOT NULL,
    id         bigint GENERATED ALWAYS AS IDENTITY,         -- order within an address
    boot       bigint NOT NULL,                             -- which run of transaction ids xid belongs to; 0: unknown
    marked     boolean NOT NULL DEFAULT false,              -- not announced in the transaction that wrote it
    kind       text COLLATE "C" NOT NULL DEFAULT 'message', -- message, or a control message: add, discard, flush
    channel    text COLLATE "C",                            -- null for a group message
    excluded   text COLLATE "C",                            -- the member that does not receive a group message
    payload    bytea NOT NULL DEFAULT '',
    sent_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (address, id)
);
CREATE INDEX pg_layer_message_expires_at ON pg_layer_message (expires_at);
CREATE INDEX pg_layer_message_marked ON pg_layer_message (id) WHERE marked;
-- Messages live for seconds: compression costs more than it saves, and dead rows must go before they pile up.
ALTER TABLE pg_layer_message ALTER COLUMN payload SET STORAGE EXTERNAL;
ALTER TABLE pg_layer_message SET (
    autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 20000,
    autovacuum_vacuum_insert_scale_factor = 0.0, autovacuum_vacuum_insert_threshold = 200000,
    autovacuum_vacuum_cost_delay = 0
);

-- Claims about memberships. The owner of a channel writes the row with id 0. All others insert rows with ids of their own, so that
-- nobody waits for a row that an open transaction has locked. Of several claims about one membership the largest id counts.
CREATE TABLE pg_layer_membership (
    group_name text COLLATE "C" NOT NULL,
    address    text COLLATE "C" NOT NULL,                   -- of the channel: a client or a normal channel
    channel    text COLLATE "C" NOT NULL,
    id         bigint NOT NULL DEFAULT 0,
    present    boolean NOT NULL DEFAULT true,               -- false: the channel is not in the group
    expires_at timestamptz NOT NULL,                        -- infinity: as long as the lease of its client
    capacity   integer,                                     -- of a normal channel
    PRIMARY KEY (group_name, address, channel, id)
);
CREATE INDEX pg_layer_membership_address ON pg_layer_membership (address);
CREATE INDEX pg_layer_membership_requests ON pg_layer_membership (expires_at) WHERE id <> 0;
ALTER TABLE pg_layer_membership SET (autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 20000);

CREATE TABLE pg_layer_client (
    address    text COLLATE "C" PRIMARY KEY,
    host       text NOT NULL DEFAULT '',
    pid        integer NOT NULL DEFAULT 0,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz NOT NULL,                        -- the lease
    lease      float8 NOT NULL,                             -- its length in seconds
    fence      bigint NOT NULL DEFAULT 0,                   -- statements of the client with a smaller number are refused
    ended_at   timestamptz,                                 -- the client has closed
    swept_at   timestamptz,                                 -- closed or over, and all memberships are removed
    counters   jsonb NOT NULL DEFAULT '{}'                  -- the client's counters at its last renewal
) WITH (fillfactor = 50);
-- Renewals change neither column, so that they stay HOT. The first index has the clients that may have memberships.
CREATE INDEX pg_layer_client_open ON pg_layer_client (address) WHERE swept_at IS NULL;
CREATE INDEX pg_layer_client_gone ON pg_layer_client (coalesce(ended_at, swept_at))
    WHERE ended_at IS NOT NULL OR swept_at IS NOT NULL;

-- Measures leases in time in which the database was there: since when renewals have come without a gap.
CREATE TABLE pg_layer_lease_clock (
    prefix       text COLLATE "C" PRIMARY KEY,
    boot         bigint NOT NULL,
    lease        float8 NOT NULL,                           -- the longest that was renewed, in seconds
    renewed_at   timestamptz NOT NULL,
    steady_since timestamptz NOT NULL
) WITH (fillfactor = 50);

-- Names an uninterrupted run of transaction ids. Unlogged: a clean restart keeps the row, a crash or the promotion of a standby
-- empties the table, and ids may then be handed out again. A dump copies the row into another cluster: hence the identifier.
CREATE UNLOGGED TABLE pg_layer_boot (
    is_only           boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    boot              bigint NOT NULL,                      -- milliseconds since 1970 when the run was first seen
    system_identifier bigint NOT NULL
);

-- Where a look at what waits may begin: nothing that waits at the address has a smaller id. Without a row that is unknown. Kept by
-- heartbeats, so that nobody walks the rows that have gone, which stay in the index as long as an old snapshot does.
CREATE TABLE pg_layer_low_id (
    address    text COLLATE "C" PRIMARY KEY,                -- a client or a normal channel
    low_id     bigint NOT NULL,
    kept_on    date NOT NULL                                -- a day and not a moment, so that most updates stay HOT
) WITH (fillfactor = 50);
CREATE INDEX pg_layer_low_id_kept_on ON pg_layer_low_id (kept_on);

CREATE TABLE pg_layer_last_sweep (
    prefix     text COLLATE "C" PRIMARY KEY,
    swept_at   timestamptz NOT NULL
) WITH (fillfactor = 50);
