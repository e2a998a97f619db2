-- The tables. docs/protocols.md states the rules, docs/architecture.md shows the path of a message.
--
-- Words that all files use:
--   boot    An uninterrupted run of the server's transaction ids. A crash of the server or the
--           promotion of a standby ends it, and ids may be handed out again after that. A number,
--           in pg_layer_boot. 0 in a message: the writer could not know the boot.
--   marked  A message is marked if the statement that wrote it did not announce it by NOTIFY.
--           It is announced after the commit, or receivers find it by the mark within two
--           heartbeats.
--
-- Names of columns have COLLATE "C" (bytewise comparison): all addresses of a prefix then lie in
-- one range of an index.
--
-- All times are the database's, from clock_timestamp(). now() is the start of the transaction. A
-- message that is sent late in a long transaction would be expired when it is written.

-- The functions in these files find the layer's objects in one schema, the current one of the
-- migration. They store the path that is set here (SET search_path FROM CURRENT), unless that costs
-- too much. A caller then reaches the tables with any search_path, and a temporary table of the
-- same name is never used instead. Each file sets the path again, because a file may be executed in
-- a transaction of its own. The last one restores the path for the rest of the transaction.
SELECT set_config('pg_layer.search_path', current_setting('search_path'), true),
    set_config('search_path', quote_ident(current_schema()) || ', pg_temp', true);

-- Messages, one row each. The sender writes a row once. Only a claim or release of a job updates
-- it.
CREATE TABLE pg_layer_message (
    -- A client, a normal channel or a group: see 0001_2_addresses.sql.
    address    text COLLATE "C" NOT NULL,
    -- The transaction that wrote the row or claimed the job. This column comes before the id:
    -- defaults are evaluated in this order, and the transaction id must be drawn first.
    xid        xid8 NOT NULL,
    -- The order within an address.
    id         bigint GENERATED ALWAYS AS IDENTITY,
    -- The boot of that transaction; 0 if the writer could not know it.
    boot       bigint NOT NULL,
    -- Whether the row was written without an announcement, or its announcement follows the commit.
    marked     boolean NOT NULL DEFAULT false,
    -- 'message', or a control message to a client: 'add', 'discard', 'flush'.
    kind       text COLLATE "C" NOT NULL DEFAULT 'message',
    -- Null for a group message.
    channel    text COLLATE "C",
    -- The member that does not receive a group message.
    excluded   text COLLATE "C",
    -- The encoded message; or the change, in a control message.
    payload    bytea NOT NULL DEFAULT '',
    -- When the row was written. Delivery does not use it.
    sent_at    timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- From then on the message is not delivered, and may be deleted.
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (address, id)
);
CREATE INDEX pg_layer_message_expires_at ON pg_layer_message (expires_at);
CREATE INDEX pg_layer_message_marked ON pg_layer_message (id) WHERE marked;
-- Messages live for seconds. Compression would cost more than it saves, and dead rows must be
-- vacuumed before there are many.
ALTER TABLE pg_layer_message ALTER COLUMN payload SET STORAGE EXTERNAL;
ALTER TABLE pg_layer_message SET (
    autovacuum_vacuum_scale_factor = 0.0, autovacuum_vacuum_threshold = 20000,
    autovacuum_vacuum_insert_scale_factor = 0.0, autovacuum_vacuum_insert_threshold = 200000,
    autovacuum_vacuum_cost_delay = 0
);

-- Memberships and membership requests. The owner of a channel writes the row with the id 0. Any
-- other process writes a request: a row with a new id, above 0, that asks the owner for a change
-- and counts until the owner has written its row. So no statement waits for a row that an open
-- transaction has locked. Of several rows about one membership the one with the largest id counts.
-- A normal channel has no owner: its memberships are requests that stay.
CREATE TABLE pg_layer_membership (
    -- The name of the group. The prefix of the layer is in the address.
    group_name text COLLATE "C" NOT NULL,
    -- The address of the channel: a client or a normal channel.
    address    text COLLATE "C" NOT NULL,
    -- The member.
    channel    text COLLATE "C" NOT NULL,
    -- 0 in the row of the owner; the order of the requests in others.
    id         bigint NOT NULL DEFAULT 0,
    -- False: the channel is not in the group.
    present    boolean NOT NULL DEFAULT true,
    -- Infinity: the row counts as long as the lease of its client lasts.
    expires_at timestamptz NOT NULL,
    -- The capacity of a normal channel. Null for other channels.
    capacity   integer,
    PRIMARY KEY (group_name, address, channel, id)
);
CREATE INDEX pg_layer_membership_address ON pg_layer_membership (address);
CREATE INDEX pg_layer_membership_requests ON pg_layer_membership (expires_at) WHERE id <> 0;
ALTER TABLE pg_layer_membership SET (
    autovacuum_vacuum_scale_factor = 0.05, autovacuum_vacuum_threshold = 20000
);

-- Clients and their leases.
CREATE TABLE pg_layer_client (
    -- The prefix of the layer, and the id of the client.
    address    text COLLATE "C" PRIMARY KEY,
    -- The name of the machine.
    host       text NOT NULL DEFAULT '',
    -- The process id.
    pid        integer NOT NULL DEFAULT 0,
    -- When the client began.
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    -- The end of the lease.
    expires_at timestamptz NOT NULL,
    -- The length of the lease in seconds.
    lease      float8 NOT NULL,
    -- Statements of the client that carry a smaller number are refused.
    fence      bigint NOT NULL DEFAULT 0,
    -- When the client has closed.
    ended_at   timestamptz,
    -- When all memberships of the client were removed, because it has closed or its lease was over.
    swept_at   timestamptz,
    -- The client's counters at its last renewal.
    counters   jsonb NOT NULL DEFAULT '{}'
) WITH (fillfactor = 50);
-- A renewal changes no column of these indexes, so that it stays a HOT update. The first index has
-- the clients that may have memberships.
CREATE INDEX pg_layer_client_open ON pg_layer_client (address) WHERE swept_at IS NULL;
CREATE INDEX pg_layer_client_gone ON pg_layer_client (coalesce(ended_at, swept_at))
    WHERE ended_at IS NOT NULL OR swept_at IS NOT NULL;

-- The lease clock of each prefix: since when leases have been renewed without a gap. A lease is
-- measured in time in which the database was available.
CREATE TABLE pg_layer_lease_clock (
    -- The prefix of the layer.
    prefix       text COLLATE "C" PRIMARY KEY,
    -- The boot in which it measures.
    boot         bigint NOT NULL,
    -- The longest lease that was renewed, in seconds.
    lease        float8 NOT NULL,
    -- When a lease was last renewed.
    renewed_at   timestamptz NOT NULL,
    -- Since when leases have been renewed without a gap.
    steady_since timestamptz NOT NULL
) WITH (fillfactor = 50);

-- The current boot, in at most one row. The table is unlogged: a clean restart keeps the row, and a
-- crash or the promotion of a standby empties the table. A dump copies the row into another
-- cluster, which the system identifier shows.
CREATE UNLOGGED TABLE pg_layer_boot (
    -- Allows one row only.
    is_only           boolean PRIMARY KEY DEFAULT true CHECK (is_only),
    -- Milliseconds from 1970 to when the boot was first seen.
    boot              bigint NOT NULL,
    -- The cluster in which it was seen.
    system_identifier bigint NOT NULL
);

-- Low-water ids: no message that waits at the address has a smaller id. Without a row, no low-water
-- id is known. Counts begin there, and do not walk the index entries of deleted rows, which stay as
-- long as any old snapshot does. Heartbeats keep the table up to date.
CREATE TABLE pg_layer_low_id (
    -- A client or a normal channel.
    address    text COLLATE "C" PRIMARY KEY,
    -- The low-water id.
    low_id     bigint NOT NULL,
    -- When it was last confirmed. A date, not a time: most updates then change no indexed column and stay HOT.
    kept_on    date NOT NULL
) WITH (fillfactor = 50);
CREATE INDEX pg_layer_low_id_kept_on ON pg_layer_low_id (kept_on);

-- When the last sweep of each prefix that left nothing has ended.
CREATE TABLE pg_layer_last_sweep (
    -- The prefix of the layer.
    prefix     text COLLATE "C" PRIMARY KEY,
    -- When that sweep ended.
    swept_at   timestamptz NOT NULL
) WITH (fillfactor = 50);
