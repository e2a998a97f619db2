"""The options of CONFIG in CHANNEL_LAYERS, checked. All but `CHANGEABLE` are constant.

An invalid option raises Django's `ImproperlyConfigured` when the layer is created, with the name of
the option, its value and the allowed values. Passwords and keys are never shown: not in an error,
its causes or a `repr`. Django's settings are read when a connection opens, not before. So a layer
with a `dsn` needs no settings, and a layer with `using` follows test databases.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import functools
import os
import re
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, cast

from django.core.exceptions import ImproperlyConfigured
from django.db import connections
from django.utils.connection import ConnectionDoesNotExist

from pg_layer._config.aliases import name_postgresql_aliases, require_settings
from pg_layer._config.dsn import (
    is_utf8,
    known_parameters,
    looks_secret,
    parsed,
    problem_with,
    without_secrets,
)

MAX_COUNT = 2**31 - 1
# 31 years: longer than any use, and far below the limits of PostgreSQL's intervals.
MAX_SECONDS = 1_000_000_000
MAX_MESSAGE_SIZE = 512 * 1024 * 1024

# Specific channel names are unlimited, so the cache of capacities is bounded.
_MAX_CACHED_CAPACITIES = 4096

# Defaults for a connection, if neither the options nor the environment set them: detect within
# seconds, not hours, that the server does not answer.
_CONNECTION_DEFAULTS: Mapping[str, str | int] = {
    "application_name": "pg_layer",
    "connect_timeout": 5,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15_000,
}
_ENVIRONMENT = {"application_name": "PGAPPNAME", "connect_timeout": "PGCONNECT_TIMEOUT"}

_CONNECT_INSTEAD = (
    "Remove it. The layer uses the database 'default' of DATABASES; 'using' names another alias, "
    "and 'dsn' is a connection string for PostgreSQL"
)
# Options of other channel layers: the package, the names, and what to do instead.
_FOREIGN_OPTIONS = (
    (
        "channels_redis",
        ("hosts", "host", "port", "address", "db", "username", "password", "connection_kwargs"),
        _CONNECT_INSTEAD,
    ),
    ("channels_redis", ("random_prefix_length",), "Remove it: each message has an id of its own"),
    (
        "channels_postgres",
        ("ENGINE", "NAME", "USER", "PASSWORD", "HOST", "PORT", "OPTIONS"),
        _CONNECT_INSTEAD,
    ),
    ("channels_rabbitmq", ("ssl_context",), "Set 'sslmode' in OPTIONS of DATABASES, or in 'dsn'"),
    ("channels_rabbitmq", ("groups_exchange",), "Use 'prefix' to separate layers"),
    (
        "channels_rabbitmq",
        ("local_capacity", "remote_capacity"),
        "Use 'capacity', or 'channel_capacity' for some channels",
    ),
    ("channels_rabbitmq", ("local_expiry",), "Use 'expiry'"),
)

_PREFIX = re.compile(r"[A-Za-z0-9._-]{1,50}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True, eq=False, repr=False)
class Config:
    """The options of a layer. Every instance is valid.

    Times are in seconds (int or float), sizes in bytes. `load` creates an instance from CONFIG; the
    constructor makes the same checks. Raises `ImproperlyConfigured`.

    `devtools/option_texts.py` describes each option.
    """

    dsn: str | None = None
    using: str | None = None
    listen_dsn: str | None = None
    prefix: str = "asgi"
    expiry: float = 60
    group_expiry: float | None = 86400
    capacity: int = 100
    channel_capacity: Mapping[str | re.Pattern[str], int] | None = None
    symmetric_encryption_keys: tuple[str | bytes, ...] | None = None
    allow_unencrypted: bool = False
    serializer_format: Literal["msgpack", "json"] = "msgpack"
    max_message_size: int = 8 * 1024 * 1024
    lease: float = 60
    heartbeat: float = 20
    send_timeout: float = 10
    poll_interval: float | None = None
    pool_max_size: int = 2
    sweep_interval: float = 600
    handle_sigterm: bool = True
    on_disconnect: str | None = None
    on_reconnect: str | None = None
    # Computed from `channel_capacity` and `capacity`: its patterns, compiled; and a function that
    # returns how many messages may wait in a channel. Any thread may call it.
    capacity_patterns: tuple[tuple[re.Pattern[str], int], ...] = dataclasses.field(init=False)
    capacity_of: Callable[[str], int] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self._check_database()
        self._check_times()
        self._check_messages()
        for name in ("allow_unencrypted", "handle_sigterm"):
            if not isinstance(getattr(self, name), bool):
                raise _bad(name, getattr(self, name), "True or False")
        _set(self, "symmetric_encryption_keys", _checked_keys(self.symmetric_encryption_keys))
        _set(self, "capacity_patterns", _compiled_capacities(self.channel_capacity))
        if self.channel_capacity is not None:
            _set(self, "channel_capacity", MappingProxyType(dict(self.channel_capacity)))
        _set(self, "capacity_of", _capacity_function(self.capacity_patterns, self.capacity))

    def _check_times(self) -> None:
        for name in ("expiry", "lease", "heartbeat", "send_timeout"):
            _check_seconds(name, getattr(self, name))
        for name in ("group_expiry", "poll_interval"):
            if getattr(self, name) is not None:
                _check_seconds(name, getattr(self, name), or_else=", or None")
        if not (_is_number(self.sweep_interval) and 0 <= self.sweep_interval <= MAX_SECONDS):
            raise _bad("sweep_interval", self.sweep_interval, "a number of seconds, or 0 for never")
        if self.heartbeat > 0.4 * self.lease:
            raise ImproperlyConfigured(
                f"pg_layer: CONFIG['heartbeat'] must be at most two fifths of 'lease' "
                f"({self.lease!r} seconds), not {self.heartbeat!r}: "
                "one late heartbeat must not end a lease."
            )

    def _check_messages(self) -> None:
        if not isinstance(self.prefix, str) or not _PREFIX.fullmatch(self.prefix):
            raise _bad("prefix", self.prefix, "1 to 50 letters, digits, '-', '_' or '.'")
        for name in ("on_disconnect", "on_reconnect"):
            type_ = getattr(self, name)
            if type_ is not None and (not isinstance(type_, str) or not type_):
                raise _bad(name, type_, "a message's type, such as 'database.lost', or None")
        _check_count("capacity", self.capacity)
        _check_count("pool_max_size", self.pool_max_size)
        _check_count(
            "max_message_size",
            self.max_message_size,
            MAX_MESSAGE_SIZE,
            "a number of bytes, an integer",
        )
        if self.serializer_format not in ("msgpack", "json"):
            raise _bad("serializer_format", self.serializer_format, "'msgpack' or 'json'")

    def _check_database(self) -> None:
        if self.dsn is not None and self.using is not None:
            raise ImproperlyConfigured(
                "pg_layer: CONFIG must not have both 'dsn' and 'using': "
                "give a connection string or an alias in DATABASES."
            )
        for name in ("dsn", "listen_dsn"):
            if getattr(self, name) is not None:
                _check_dsn(name, getattr(self, name))
        if self.using is not None:
            alias = "an alias in DATABASES (a connection string belongs in 'dsn')"
            if (
                not isinstance(self.using, str)
                or not self.using
                or "://" in self.using
                or "=" in self.using
            ):
                # Show no part of the value: most likely it is a connection string.
                raise _bad("using", self.using, alias, shown=f"this {type(self.using).__name__}")
        elif self.dsn is None:
            _set(self, "using", "default")

    def __repr__(self) -> str:
        shown = []
        for name in OPTIONS:
            value = getattr(self, name)
            if value is not None and name in ("dsn", "listen_dsn"):
                value = without_secrets(value)
            elif value is not None and name == "symmetric_encryption_keys":
                shown.append(f"{name}=<{len(value)} keys>")
                continue
            elif value is not None and name == "channel_capacity":
                value = dict(value)
            shown.append(f"{name}={value!r}")
        return f"Config({', '.join(shown)})"

    def change(self, name: str, value: object) -> None:
        """Change one of the options in `CHANGEABLE`. From any thread, one change at a time.

        Raises `ImproperlyConfigured`, and changes nothing, for a value that CONFIG cannot have.
        """
        assert name in CHANGEABLE
        with _changing:  # `capacity_of` is computed from two options
            changed = dataclasses.replace(self, **cast("dict[str, Any]", {name: value}))
            for each in (name, "capacity_patterns", "capacity_of"):
                _set(self, each, getattr(changed, each))

    def connect_kwargs(self, role: Literal["pool", "listen"]) -> dict[str, Any]:
        """Return the current arguments for `psycopg.connect`. Call it for each connection.

        `role`: the purpose of the connection; "listen" uses `listen_dsn` if it is set. The values
        contain the password. Timeouts and keepalives are added unless the options or libpq's
        environment variables set them. Service files are not read: the added values take
        precedence over them.

        Raises `ImproperlyConfigured` if `using` is not the alias of a PostgreSQL database.
        """
        dsn = self.listen_dsn if role == "listen" and self.listen_dsn is not None else self.dsn
        kwargs = _django_parameters(self.using or "default") if dsn is None else parsed(dsn)
        for name, value in _CONNECTION_DEFAULTS.items():
            if _ENVIRONMENT.get(name, "") not in os.environ:
                kwargs.setdefault(name, value)
        # This must not be configurable: with SQL_ASCII psycopg returns texts as bytes.
        kwargs["client_encoding"] = "UTF8"
        return kwargs


_changing = threading.Lock()
if hasattr(
    os, "register_at_fork"
):  # a child would wait for ever for a thread that it does not have
    os.register_at_fork(
        before=_changing.acquire,
        after_in_parent=_changing.release,
        after_in_child=_changing.release,
    )

# What code may change while the layer is used. Channels' base class has these as attributes.
CHANGEABLE = frozenset(("expiry", "group_expiry", "capacity", "channel_capacity"))
OPTIONS: tuple[str, ...] = tuple(field.name for field in dataclasses.fields(Config) if field.init)


def load(options: Mapping[str, object]) -> Config:
    """Return the `Config` for the keyword arguments that Channels passes to the layer.

    Raises `ImproperlyConfigured` for an unknown option, with what to do instead, and for a value
    that `Config` does not accept.
    """
    for name in options:
        if name not in OPTIONS:
            raise _unknown(name)
    return Config(**cast("dict[str, Any]", dict(options)))


def _unknown(name: str) -> ImproperlyConfigured:
    for package, names, advice in _FOREIGN_OPTIONS:
        if name in names:
            return ImproperlyConfigured(
                f"pg_layer: {name!r} in CONFIG is an option of {package}, not of pg_layer. "
                f"{advice}."
            )
    near = difflib.get_close_matches(str(name), OPTIONS, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}?" if near else f"The options are {', '.join(OPTIONS)}."
    return ImproperlyConfigured(f"pg_layer: CONFIG has an unknown option {_shown(name)}. {hint}")


def _bad(
    name: str, value: object, allowed: str, *, shown: str | None = None
) -> ImproperlyConfigured:
    return ImproperlyConfigured(
        f"pg_layer: CONFIG[{name!r}] must be {allowed}, not {shown or _shown(value)}."
    )


def _shown(value: object) -> str:
    """Return a value for an error message, or its type if it is long or may be a secret."""
    try:
        text = repr(value)
    except Exception:
        text = ""
    if not text or len(text) > 100 or looks_secret(text):
        return f"this {type(value).__name__}"
    return text


def _set(config: Config, name: str, value: object) -> None:
    # For `__post_init__` and `change` only: the dataclass is frozen.
    object.__setattr__(config, name, value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_seconds(name: str, value: Any, or_else: str = "") -> None:
    # NaN fails every comparison and therefore this check.
    if not (_is_number(value) and 0 < value <= MAX_SECONDS):
        raise _bad(name, value, f"a number of seconds above 0, at most {MAX_SECONDS}{or_else}")


def _check_count(name: str, value: Any, most: int = MAX_COUNT, what: str = "an integer") -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise _bad(name, value, f"{what} from 1 to {most}")


def _checked_keys(keys: object) -> tuple[str | bytes, ...] | None:
    name = "symmetric_encryption_keys"
    if keys is None:
        return None
    # Show only the type of these values.
    if not isinstance(keys, (list, tuple)):
        raise _bad(
            name, keys, "a list of keys (str or bytes)", shown=f"a single {type(keys).__name__}"
        )
    if not keys:
        raise _bad(
            name,
            keys,
            "a list with at least one key, or None for no encryption",
            shown="an empty list",
        )
    for index, key in enumerate(keys):
        if not isinstance(key, (str, bytes)):
            raise _bad(
                f"{name}[{index}]", key, "a str or bytes", shown=f"this {type(key).__name__}"
            )
        if not key:
            raise _bad(f"{name}[{index}]", key, "a non-empty str or bytes", shown="empty")
        if isinstance(key, str) and not is_utf8(key):
            raise _bad(f"{name}[{index}]", key, "text that UTF-8 can encode", shown="this str")
    try:
        import cryptography.fernet  # noqa: F401
    except ImportError as error:
        raise ImproperlyConfigured(
            f"pg_layer: CONFIG[{name!r}] needs the package cryptography: "
            "pip install pg-layer[encryption]"
        ) from error
    return tuple(keys)


def _compiled_capacities(capacities: object) -> tuple[tuple[re.Pattern[str], int], ...]:
    name = "channel_capacity"
    if capacities is None:
        return ()
    if not isinstance(capacities, Mapping):
        raise _bad(name, capacities, "a dict of globs or compiled patterns to integers, or None")
    patterns = []
    for pattern, capacity in capacities.items():
        if isinstance(pattern, str) and pattern:
            compiled = re.compile(fnmatch.translate(pattern))
        elif isinstance(pattern, re.Pattern) and isinstance(pattern.pattern, str):
            compiled = pattern
        else:
            raise ImproperlyConfigured(
                f"pg_layer: the keys of CONFIG[{name!r}] must be globs (str) or compiled patterns "
                f"of str, not {_shown(pattern)}."
            )
        if (
            not isinstance(capacity, int)
            or isinstance(capacity, bool)
            or not 1 <= capacity <= MAX_COUNT
        ):
            raise ImproperlyConfigured(
                f"pg_layer: CONFIG[{name!r}][{_shown(pattern)}] must be an integer "
                f"from 1 to {MAX_COUNT}, not {_shown(capacity)}."
            )
        patterns.append((compiled, capacity))
    return tuple(patterns)


def _capacity_function(
    patterns: tuple[tuple[re.Pattern[str], int], ...], default: int
) -> Callable[[str], int]:
    """Return a function that returns the capacity of a channel.

    Patterns are tried in their order and match from the beginning of the name, as in
    `BaseChannelLayer.get_capacity`.
    """

    def capacity_of(channel: str) -> int:
        for pattern, capacity in patterns:
            if pattern.match(channel):
                return capacity
        return default

    return functools.lru_cache(_MAX_CACHED_CAPACITIES)(capacity_of) if patterns else capacity_of


def _check_dsn(name: str, dsn: object) -> None:
    allowed = "a connection string: 'postgresql://user:password@host/name' or 'host=... dbname=...'"
    if not isinstance(dsn, str):
        raise _bad(name, dsn, allowed, shown=f"this {type(dsn).__name__}")
    problem = problem_with(dsn)
    if problem is not None:
        raise ImproperlyConfigured(f"pg_layer: CONFIG[{name!r}] must be {allowed}; {problem}.")


def _django_parameters(alias: str) -> dict[str, Any]:
    require_settings(alias)
    try:
        connection = connections[alias]
    except ConnectionDoesNotExist as error:
        raise ImproperlyConfigured(
            f"pg_layer: CONFIG['using'] must be an alias in DATABASES, not {alias!r}. "
            f"{name_postgresql_aliases()}"
        ) from error
    if connection.vendor != "postgresql":
        raise ImproperlyConfigured(
            f"pg_layer: CONFIG['using'] must be an alias of a PostgreSQL database; {alias!r} has "
            f"the ENGINE {connection.settings_dict['ENGINE']!r}. {name_postgresql_aliases()} "
            "Set 'using' to the alias of one, or set 'dsn'."
        )
    # The other parameters are for psycopg or for the backend. A backend that pools connections has
    # its own keys in OPTIONS and removes them when it connects. Django's own connection refuses a
    # misspelt one.
    known = known_parameters()
    parameters = {
        name: value for name, value in connection.get_connection_params().items() if name in known
    }
    role = connection.settings_dict["OPTIONS"].get("assume_role")
    if role:  # Django sets the role after it has connected
        escaped = re.sub(r"([\\\s])", r"\\\1", str(role))
        given = parameters.get("options") or os.environ.get("PGOPTIONS", "")
        parameters["options"] = f"{given} -c role={escaped}".strip()
    return parameters
