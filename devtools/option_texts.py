"""What the documentation says about each option of `Config`.

`python -m devtools.reference` writes these texts, with the defaults of `Config`, to
docs/reference/options.md. Links are relative to that page.
"""

from __future__ import annotations

from typing import NamedTuple

from pg_layer._config.options import MAX_COUNT, MAX_MESSAGE_SIZE, MAX_SECONDS

_SECONDS = f"above 0, at most {MAX_SECONDS:,}"
_COUNT = f"an integer from 1 to {MAX_COUNT:,}"
_DSN = "`postgresql://user:secret@host:5432/name`, or `host=... dbname=...`"


class OptionText(NamedTuple):
    """The texts about an option, in Markdown.

    ``unit``: of the value, or its kind. ``range``: the allowed values. ``effect``: what the option
    does. ``change``: when to set it, as a sentence.
    """

    unit: str
    range: str
    effect: str
    change: str


OPTION_TEXTS: dict[str, OptionText] = {
    "dsn": OptionText(
        "connection string",
        f"{_DSN}; not together with `using`",
        "The database of the layer. libpq's parameters and environment variables apply. A layer "
        "with a `dsn` needs no Django settings for its asynchronous calls. It does not follow "
        "Django's test database. `layer.sync`, the checks and the admin use the alias in "
        "`DATABASES` that leads to the same database.",
        "Set it if the layer must connect in another way than Django does: with another role, "
        "past a pooler, or without Django's settings. Otherwise use `using`.",
    ),
    "using": OptionText(
        "alias",
        "an alias in `DATABASES` of a PostgreSQL database; not together with `dsn`",
        "The database of the layer, as an alias in `DATABASES`. The layer's own connections are "
        "made with the parameters of that alias. [Another "
        "backend](../explanation/sync.md#what-else-runs-on-that-connection) for PostgreSQL is "
        "possible.",
        'Set it if the alias of your PostgreSQL database is not `"default"`, or if the layer has '
        "[a database of its own](../how-to/routers.md).",
    ),
    "listen_dsn": OptionText(
        "connection string",
        _DSN,
        "The database for the listening connection only. All other connections use `dsn` or "
        "`using`.",
        "Set it to a direct connection if the other connections go through [a pooler in "
        "transaction mode](../how-to/pgbouncer.md).",
    ),
    "prefix": OptionText(
        "name",
        "1 to 50 letters, digits, `-`, `_` and `.`",
        "Layers with different prefixes in one database do not see each other's channels and "
        "groups.",
        "Set it if two projects or two layers share a database.",
    ),
    "expiry": OptionText(
        "seconds",
        _SECONDS,
        "How long a message may wait unread. An expired message is never delivered. The time is "
        "the database's. A call may set another one: `send(..., expiry=5)`.",
        "Lower it if the tables grow: a group message stays in its table until it expires, so the "
        "size is the rate of group messages times `expiry`. Raise it if messages must outlive "
        "longer outages or restarts of their readers.",
    ),
    "group_expiry": OptionText(
        "seconds",
        f"{_SECONDS}; or `None`",
        "How long a membership lasts after its last `group_add`. `None`: as long as its process.",
        "Set it to `None` if sockets stay connected for more than a day without a new `group_add`.",
    ),
    "capacity": OptionText(
        "messages",
        _COUNT,
        "How many messages may wait in a channel. `send` to a full channel raises `ChannelFull`; "
        "a member whose channel is full misses a group message. It counts per channel, not per "
        "process.",
        "Raise it if `dropped_full` or `refused_full` increase although consumers keep up on "
        "average. If a consumer is permanently too slow, a larger channel only delays the loss.",
    ),
    "channel_capacity": OptionText(
        "dict of pattern: messages",
        f"globs (`str`) or compiled patterns of `str`; each value {_COUNT}",
        "Other capacities for some channels. The first pattern that matches counts: a glob matches "
        "the whole name, a compiled pattern its beginning. For example "
        '`{"thumbnails": 1000, "specific.*": 200}`.',
        "Set it for a worker's channel in which jobs may pile up.",
    ),
    "symmetric_encryption_keys": OptionText(
        "list of keys",
        "a list with at least one non-empty `str` or `bytes`; or `None` for no encryption",
        "The first key encrypts messages, and every key decrypts. Needs `pip install "
        "pg-layer[encryption]`. See [what encryption "
        "binds](permissions.md#what-encryption-binds).",
        "Set it if roles that you do not trust may connect to the database, or read its tables or "
        "dumps. [Encryption](../how-to/encryption.md) shows how to introduce and to rotate keys.",
    ),
    "allow_unencrypted": OptionText(
        "flag",
        "`True` or `False`",
        "If there are keys, also deliver messages that are not encrypted, such as messages [sent "
        "from SQL](sql.md). Then a role that can write to the table or `NOTIFY` can make "
        "consumers receive any message.",
        "Set it while you introduce keys, and if triggers send.",
    ),
    "serializer_format": OptionText(
        "name",
        '`"msgpack"` or `"json"`',
        'How messages are encoded. `"json"` cannot encode bytes. Both formats are always decoded, '
        "so processes may differ.",
        'Set it to `"json"` to read messages in the table or the admin with other tools.',
    ),
    "max_message_size": OptionText(
        "bytes",
        f"an integer from 1 to {MAX_MESSAGE_SIZE:,} (512 MiB)",
        "A larger message, when serialised, raises `MessageTooLarge` before anything is sent.",
        "Lower it to find code that sends files through the layer. Send the key of a row or an "
        "object instead.",
    ),
    "lease": OptionText(
        "seconds",
        _SECONDS,
        "How long a process counts as alive after it has last renewed its lease, which it does "
        "at each `heartbeat`. When the lease expires, the memberships of the process no longer "
        "count, and a sweep removes them. While the database is unavailable, no lease expires.",
        "Lower it, together with `heartbeat`, if `group_count` must forget killed processes "
        "sooner. Raise it if processes are stopped or blocked for longer.",
    ),
    "heartbeat": OptionText(
        "seconds",
        f"{_SECONDS}, and at most two fifths of `lease`",
        "The interval at which a receiving process renews its lease and checks that notifications "
        "arrive. One statement each time.",
        "Lower it to notice a deaf listener sooner. Raise it, together with `lease`, if a database "
        "with hundreds of processes has better things to do. A longer one does not let [a server "
        "that suspends when "
        "idle](../how-to/managed-postgresql.md#a-server-that-suspends-when-it-is-idle) rest.",
    ),
    "send_timeout": OptionText(
        "seconds",
        _SECONDS,
        "How long a call that writes is tried before it raises `LayerUnavailable`. It does not "
        "apply to `layer.sync` inside a transaction.",
        "Lower it if a request must fail quickly while the database is unavailable. Raise it to "
        "ride out longer failovers.",
    ),
    "poll_interval": OptionText(
        "seconds",
        f"{_SECONDS}; or `None`",
        "Read messages at this interval instead of listening.",
        "Set it only if the server or the pooler does not support `LISTEN` and there is no direct "
        "connection for `listen_dsn`. The layer polls every second by itself if it detects that.",
    ),
    "pool_max_size": OptionText(
        "connections",
        _COUNT,
        "The largest number of connections of a process besides the listening one and the ones of "
        "Django.",
        "Lower it to 1 if connections are scarce. More than 2 rarely helps, because operations "
        "that wait are sent together.",
    ),
    "sweep_interval": OptionText(
        "seconds",
        f"0 for never, or at most {MAX_SECONDS:,}",
        "How often serving processes remove expired rows, one process at a time.",
        "Set it to 0 if `manage.py pg_layer_sweep` runs and serving processes should leave the "
        "work to it.",
    ),
    "handle_sigterm": OptionText(
        "flag",
        "`True` or `False`",
        "A process that receives closes the layer when SIGTERM ends it while its event loop runs "
        "on the main thread. For this the layer installs a handler, unless the application has "
        "set one, and replaces `signal.signal` by a function that installs the handler when a "
        "server restores the default effect. The process tries to connect for two seconds, and to "
        "close for five; then it ends like a killed process.\n\n"
        "If the database is known to be unavailable at SIGTERM, no call waits for it. "
        "`group_discard` of the process's own channels returns, because the memberships end with "
        "the lease. Other calls raise `LayerUnavailable` at once, and Channels ends a consumer "
        "that raises it, without a traceback. If the process still runs five minutes later, it is "
        "not stopping, and calls wait again.",
        "Set it to `False` if your server or your code must be the only one that handles signals, "
        "and call `await layer.close()` there. Otherwise the process keeps its lease until that "
        "expires. Your own handler must not raise an exception, which may interrupt asyncio while "
        "it wakes a task: use `loop.add_signal_handler`.",
    ),
    "on_disconnect": OptionText(
        "type of a message",
        "a non-empty `str`; or `None`",
        "Each consumer of a process receives a message of this type when the connection to the "
        "database is lost.",
        "Set it to tell browsers that messages may be late. Every consumer class then needs the "
        "method, also the class of workers.",
    ),
    "on_reconnect": OptionText(
        "type of a message",
        "a non-empty `str`; or `None`",
        "Each consumer receives a message of this type when the connection is back, after the "
        "messages that it missed. Also sent if the process was stopped for longer than its lease.",
        "Set it to let consumers load their state again. Every consumer class then needs the "
        "method.",
    ),
}
