"""CONFIG: defaults, allowed values, and errors, which never contain a secret."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import traceback
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote

import pytest
from django.core.exceptions import ImproperlyConfigured
from django.utils.connection import ConnectionDoesNotExist
from hypothesis import example, given
from hypothesis import strategies as st

from pg_layer._config import aliases as aliases_module
from pg_layer._config import options as config_module
from pg_layer._config.options import OPTIONS, Config, load

DSN = "postgresql://user:pw@db.example/name"


def refusal(**options: object) -> str:
    with pytest.raises(ImproperlyConfigured) as caught:
        load(options)
    return str(caught.value)


# --- Defaults and normal values


def test_config_defaults() -> None:
    config = load({})
    assert {name: getattr(config, name) for name in OPTIONS} == {
        "dsn": None,
        "using": "default",
        "listen_dsn": None,
        "prefix": "asgi",
        "expiry": 60,
        "group_expiry": 86400,
        "capacity": 100,
        "channel_capacity": None,
        "symmetric_encryption_keys": None,
        "allow_unencrypted": False,
        "serializer_format": "msgpack",
        "max_message_size": 8388608,
        "lease": 60,
        "heartbeat": 20,
        "send_timeout": 10,
        "poll_interval": None,
        "pool_max_size": 2,
        "sweep_interval": 600,
        "handle_sigterm": True,
        "on_disconnect": None,
        "on_reconnect": None,
    }


def test_config_accepts_all_options() -> None:
    options: dict[str, Any] = {
        "dsn": DSN,
        "listen_dsn": "host=direct",
        "prefix": "my-App_1.0",
        "expiry": 0.5,
        "group_expiry": None,
        "capacity": 1,
        "channel_capacity": {"a*": 5},
        "symmetric_encryption_keys": ("a", b"b"),
        "allow_unencrypted": True,
        "serializer_format": "json",
        "max_message_size": 1,
        "lease": 2.5,
        "heartbeat": 1,
        "send_timeout": 0.1,
        "poll_interval": 0.25,
        "pool_max_size": 1,
        "sweep_interval": 0,
        "handle_sigterm": False,
    }
    config = load(options)
    assert {name: getattr(config, name) for name in options} == options
    assert config.using is None


def test_config_is_immutable() -> None:
    keys, capacities = ["a"], {"a*": 5}
    config = load({"dsn": DSN, "symmetric_encryption_keys": keys, "channel_capacity": capacities})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.expiry = 1  # type: ignore[misc]
    keys.append("b")
    capacities["a*"] = 6
    assert config.symmetric_encryption_keys == ("a",)
    assert config.channel_capacity == {"a*": 5}
    with pytest.raises(TypeError):
        config.channel_capacity["a*"] = 6  # type: ignore[index]


def test_config_changed_from_two_threads_has_both_changes() -> None:
    """The capacity of a channel is computed from two options."""
    config = load({"dsn": DSN})
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as threads:
            for n in range(1, 500):
                changes = [
                    threads.submit(config.change, "capacity", n),
                    threads.submit(config.change, "channel_capacity", {"a": n}),
                ]
                for change in changes:
                    change.result()
                assert (config.capacity_of("a"), config.capacity_of("b")) == (n, n)
    finally:
        sys.setswitchinterval(interval)


def test_config_created_directly_is_checked() -> None:
    with pytest.raises(ImproperlyConfigured, match="'expiry'"):
        Config(expiry=0)
    with pytest.raises(TypeError):
        Config("dsn")  # type: ignore[call-arg]


# --- Unknown options


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("expirey", "expiry"),
        ("symmetric_encryption_key", "symmetric_encryption_keys"),
        ("DSN", None),
        ("broker_url", None),
        ("_capacity_of", "capacity"),
    ],
)
def test_load_unknown_option_names_the_nearest(wrong: str, right: str | None) -> None:
    text = refusal(**{wrong: 1})
    assert f"unknown option {wrong!r}" in text
    if right:
        assert f"Did you mean {right!r}?" in text
    else:
        assert ", ".join(OPTIONS) in text


@pytest.mark.parametrize(
    ("option", "package", "advice"),
    [
        ("hosts", "channels_redis", "'using' names another alias"),
        ("host", "channels_redis", "'dsn' is a connection string"),
        ("port", "channels_redis", "'dsn' is a connection string"),
        ("db", "channels_redis", "the database 'default' of DATABASES"),
        ("password", "channels_redis", "'dsn' is a connection string"),
        ("connection_kwargs", "channels_redis", "Remove it."),
        ("random_prefix_length", "channels_redis", "Remove it"),
        ("ENGINE", "channels_postgres", "'using' names another alias"),
        ("PASSWORD", "channels_postgres", "'dsn' is a connection string"),
        ("local_capacity", "channels_rabbitmq", "Use 'capacity'"),
        ("local_expiry", "channels_rabbitmq", "Use 'expiry'"),
    ],
)
def test_load_option_of_another_layer_names_its_package_and_what_to_do(
    option: str, package: str, advice: str
) -> None:
    text = refusal(capacity=5, **{option: "Sup3r"})
    assert text.startswith(f"pg_layer: {option!r} in CONFIG is an option of {package}, not of")
    assert advice in text
    assert "Sup3r" not in text


# --- Values that are not allowed

NOT_SECONDS: list[Any] = [
    0,
    -1,
    True,
    False,
    "60",
    float("nan"),
    float("inf"),
    10**400,
    Decimal(1),
    [1],
]
NOT_COUNTS: list[Any] = [0, -1, True, "1", 1.0, 2**31, float("nan"), None]


@pytest.mark.parametrize("value", NOT_SECONDS, ids=lambda value: repr(value)[:10])
@pytest.mark.parametrize(
    "name", ["expiry", "group_expiry", "lease", "heartbeat", "send_timeout", "poll_interval"]
)
def test_config_times_must_be_positive_numbers(name: str, value: Any) -> None:
    text = refusal(**{name: value})
    assert f"CONFIG[{name!r}] must be a number of seconds above 0" in text
    if len(repr(value)) < 100:
        assert text.endswith(f"not {value!r}.")
    assert (", or None, not" in text) == (name in ("group_expiry", "poll_interval"))


def test_config_times_have_a_limit() -> None:
    assert load({"expiry": 1_000_000_000}).expiry == 1_000_000_000
    assert "at most 1000000000, not 1000000000.5" in refusal(expiry=1_000_000_000.5)


@pytest.mark.parametrize("name", ["expiry", "lease", "heartbeat", "send_timeout", "sweep_interval"])
def test_config_only_some_times_may_be_none(name: str) -> None:
    assert refusal(**{name: None}).endswith("not None.")


@pytest.mark.parametrize("value", [-1, True, "0", float("nan"), float("inf")])
def test_config_sweep_interval_must_be_a_number_or_0(value: Any) -> None:
    assert "CONFIG['sweep_interval']" in refusal(sweep_interval=value)


@pytest.mark.parametrize("value", NOT_COUNTS, ids=repr)
@pytest.mark.parametrize("name", ["capacity", "pool_max_size", "max_message_size"])
def test_config_counts_must_be_positive_integers(name: str, value: Any) -> None:
    text = refusal(**{name: value})
    kind = "a number of bytes, an integer" if name == "max_message_size" else "an integer"
    assert f"CONFIG[{name!r}] must be {kind} from 1 to" in text
    assert text.endswith(
        f"from 1 to {2**29 if name == 'max_message_size' else 2**31 - 1}, not {value!r}."
    )


def test_config_max_message_size_has_a_limit() -> None:
    assert load({"max_message_size": 512 * 1024 * 1024}).max_message_size == 2**29
    assert "536870912" in refusal(max_message_size=512 * 1024 * 1024 + 1)


def test_config_heartbeat_must_fit_twice_into_the_lease() -> None:
    assert load({"lease": 30, "heartbeat": 12}).heartbeat == 12
    text = refusal(lease=30, heartbeat=12.1)
    assert "at most two fifths of 'lease' (30 seconds), not 12.1" in text
    assert "'lease' (39 seconds), not 20" in refusal(lease=39)


@pytest.mark.parametrize("value", ["", "a" * 51, "a b", "a!", "é", "a\n", b"a", None, 1])
def test_config_prefix_must_be_a_short_name(value: Any) -> None:
    assert (
        f"CONFIG['prefix'] must be 1 to 50 letters, digits, '-', '_' or '.', not {value!r}."
        in refusal(prefix=value)
    )


def test_config_prefix_may_have_50_characters() -> None:
    assert load({"prefix": "a" * 50}).prefix == "a" * 50


@pytest.mark.parametrize("value", [None, 0, 1, "yes", "False"])
@pytest.mark.parametrize("name", ["allow_unencrypted", "handle_sigterm"])
def test_config_switches_must_be_bool(name: str, value: Any) -> None:
    assert (
        refusal(**{name: value})
        == f"pg_layer: CONFIG[{name!r}] must be True or False, not {value!r}."
    )


@pytest.mark.parametrize("value", ["pickle", "JSON", "", None, 1, ["json"]])
def test_config_serializer_format_must_be_known(value: Any) -> None:
    assert f"must be 'msgpack' or 'json', not {value!r}." in refusal(serializer_format=value)


def test_config_dsn_and_using_exclude_each_other() -> None:
    text = refusal(dsn=DSN, using="default")
    assert "both 'dsn' and 'using'" in text
    assert "pw" not in text


@pytest.mark.parametrize(
    "value", ["", 1, b"default", "postgresql://u:Sup3r@h/d", "host=h password=Sup3r"]
)
def test_config_using_must_be_an_alias(value: Any) -> None:
    text = refusal(using=value)
    assert "CONFIG['using'] must be an alias in DATABASES" in text
    assert "Sup3r" not in text


def test_config_secret_in_another_option_is_not_shown() -> None:
    for name in ("prefix", "capacity", "expiry", "serializer_format"):
        for value in ("postgresql://u:Sup3r@h/d", {"PASSWORD": "Sup3r"}):
            text = refusal(**{name: value})
            assert name in text
            assert "Sup3r" not in text


def test_config_value_without_repr_is_refused() -> None:
    class Unshowable:
        def __repr__(self) -> str:
            raise RuntimeError

    assert refusal(capacity=Unshowable()).endswith("not this Unshowable.")


# --- Capacities


def test_capacity_of_uses_the_first_matching_pattern() -> None:
    config = load(
        {
            "capacity": 7,
            "channel_capacity": {
                "ws.a*": 1,
                re.compile(r"ws\.[ab]"): 2,
                "jobs": 3,
                "specific.*!*": 4,
            },
        }
    )
    for _ in range(2):  # computed, then remembered
        assert config.capacity_of("ws.apple") == 1
        assert config.capacity_of("ws.berry") == 2
        assert config.capacity_of("jobs") == 3
        assert config.capacity_of("jobs2") == 7
        assert config.capacity_of("specific.abc!def") == 4
        assert config.capacity_of("specific.abc") == 7


def test_capacity_of_caches_are_not_shared() -> None:
    one, two = load({"channel_capacity": {"a": 1}}), load({"channel_capacity": {"a": 2}})
    assert (one.capacity_of("a"), two.capacity_of("a"), load({}).capacity_of("a")) == (1, 2, 100)


def test_capacity_of_cache_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "_MAX_CACHED_CAPACITIES", 10)
    function: Any = load({"channel_capacity": {"a*": 1}}).capacity_of
    for n in range(50):
        function(f"specific.{n}!{n}")
    assert function.cache_info().currsize == 10


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([("a*", 5)], "must be a dict of globs"),
        (
            {"": 5},
            "keys of CONFIG['channel_capacity'] must be globs (str) or compiled patterns of str, "
            "not ''.",
        ),
        ({3: 5}, "not 3."),
        ({re.compile(b"a"): 5}, "not re.compile(b'a')."),
        (
            {"a*": 0},
            "CONFIG['channel_capacity']['a*'] must be an integer from 1 to 2147483647, not 0.",
        ),
        ({"a*": True}, "not True."),
        ({"a*": "5"}, "not '5'."),
        ({"a*": None}, "not None."),
        ({re.compile("a"): 2**31}, "CONFIG['channel_capacity'][re.compile('a')]"),
    ],
)
def test_config_invalid_capacities_are_refused(value: Any, says: str) -> None:
    assert says in refusal(channel_capacity=value)


# --- Keys


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("Sup3rS3cret", "must be a list of keys (str or bytes), not a single str."),
        (b"Sup3rS3cret", "must be a list of keys (str or bytes), not a single bytes."),
        ({"Sup3rS3cret": 1}, "must be a list"),
        ([], "at least one key, or None for no encryption, not an empty list"),
        (["Sup3rS3cret", ""], "[1]'] must be a non-empty str or bytes, not empty."),
        ([b""], "must be a non-empty str or bytes, not empty."),
        (["Sup3rS3cret", 5], "must be a str or bytes, not this int."),
        ([["Sup3rS3cret"]], "must be a str or bytes, not this list."),
        (["Sup3rS3cret\ud800"], "must be text that UTF-8 can encode, not this str."),
    ],
)
def test_config_invalid_keys_are_refused_and_not_shown(value: Any, says: str) -> None:
    text = refusal(symmetric_encryption_keys=value)
    assert says in text
    assert "Sup3r" not in text


def test_config_keys_need_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.fernet", None)
    assert "pip install pg-layer[encryption]" in refusal(symmetric_encryption_keys=["a"])
    assert load({}).symmetric_encryption_keys is None


# --- Connection strings


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://",
        "postgres://user:p%40ss%2Fword@host:5432/name?sslmode=require",
        "postgresql://a,b:5433/name",
        "postgresql://[::1]:5432/name",
        "postgresql:///name?host=/var/run/postgresql&user=me%40tenant",
        "host=/tmp user='a b' password='it\\'s' port=5432,5433",
        "host=@abstract dbname=name",
        "user=me@tenant password=p@ss/word",
        "service=mine",
    ],
)
@pytest.mark.parametrize("name", ["dsn", "listen_dsn"])
def test_config_dsn_accepts_what_libpq_accepts(name: str, dsn: str) -> None:
    assert getattr(load({name: dsn}), name) == dsn


@pytest.mark.parametrize(
    ("dsn", "says"),
    [
        ("", "it is empty"),
        (" \n", "it is empty"),
        ("Sup3r", "a part has no '='"),
        ("host=h password=Sup3r S3cret", "a part has no '='"),
        ("host=h password=Sup3r S3cret=1", "unknown option"),
        ("host=h password='Sup3r", "it has an opening quote"),
        ("postgresql://u:Sup3r%zz@h/d", "write '%25'"),
        ("postgresql://u:Sup3r%00@h/d", "libpq does not understand it"),
        ("postgresql://u:Sup3r%ff@h/d", "libpq does not understand it"),
        ("postgresql://u:Sup3r@S3cret@h/d", "'@' as '%40'"),
        ("postgresql://u:Sup3r/S3cret@h/d", "'@' as '%40'"),
        ("postgresql://u:1/S3cret@", "'@' as '%40'"),
        ("postgresql://u:1/x?user=S3cret@h", "'@' as '%40'"),
        ("postgresql://u:Sup3r@h:port/d", "its port is not a number"),
        ("postgresql://u:Sup3r/d", "its port is not a number"),
        ("postgresql://h/d?Sup3r=1", "unknown option"),
        ("postgresql://[S3cret", "libpq does not understand it"),
        ("postgresql+psycopg://u:Sup3r@h/d", "a URL of another kind: 'postgresql+psycopg://'"),
        ("postgis://u:Sup3r@h/d", "another kind: 'postgis://'; write 'postgresql://'"),
        ("redis://:Sup3r@h:6379/0", "a URL of another kind: 'redis://'"),
        ("password=Sup3r\0S3cret", "NUL"),
        ("password=Sup3r\ud800", "lone surrogate"),
        ({"host": "h", "password": "Sup3r"}, "not this dict"),
        (b"password=Sup3r", "not this bytes"),
        (False, "not this bool"),
    ],
)
@pytest.mark.parametrize("name", ["dsn", "listen_dsn"])
def test_config_invalid_dsn_is_refused_and_not_shown(name: str, dsn: Any, says: str) -> None:
    text = refusal(**{name: dsn})
    assert f"CONFIG[{name!r}] must be a connection string" in text
    assert says in text
    assert "Sup3r" not in text
    assert "S3cret" not in text


@pytest.mark.parametrize(
    ("dsn", "says"),
    [
        ("host=h sslmod=require", "it has an unknown option 'sslmod' (did you mean 'sslmode'?)"),
        (
            "postgresql://h/d?conect_timeout=3",
            "unknown option 'conect_timeout' (did you mean 'connect_timeout'?)",
        ),
        (
            "host=h colour=red",
            "it has an unknown option, not shown here because it may be a part of a password",
        ),
        ("host=h password=my passwort=1", "it has an unknown option, not shown here"),
    ],
)
def test_config_unknown_option_in_a_dsn_is_named_unless_secret(dsn: str, says: str) -> None:
    assert says in refusal(dsn=dsn)


# Two marked pieces with something ugly before, between and behind them.
UGLY = st.text(st.sampled_from("@/:?#%&=+'\"\\ \t\n[](),;*é\0\ud800") | st.characters(), max_size=3)


@given(UGLY, UGLY, UGLY)
@example("", "@", "")
@example("", "/", "")
@example("", "%", "")
@example("'", " ", "'")
@example("", "\\", "\\")
@example("", " x=", "")
def test_config_never_shows_a_password(before: str, between: str, behind: str) -> None:
    password = f"{before}Sup3r{between}S3cret{behind}"
    escaped = password.replace("\\", "\\\\").replace("'", "\\'")
    quoted = quote(password.encode("utf-8", "replace"), safe="")
    for dsn in (
        f"postgresql://user:{password}@host/name",
        f"postgresql://user:{quoted}@host/name",
        f"postgresql://host/name?password={quoted}&sslpassword={quoted}",
        f"host=host password={password} dbname=name",
        f"host=host password='{password}' dbname=name",
        f"host=host password='{escaped}' sslpassword='{escaped}'",
    ):
        for name in ("dsn", "listen_dsn"):
            try:
                config = load({name: dsn})
            except ImproperlyConfigured as error:
                shown = "".join(traceback.format_exception(error)) + repr(error.__context__)
            else:
                shown = f"{config!r} {config}"
                assert "***" in shown
            assert not re.search("Sup3r|S3cret", shown)


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1))
def test_connect_kwargs_decode_a_percent_encoded_password(password: str) -> None:
    config = load({"dsn": f"postgresql://user:{quote(password, safe='')}@host/name"})
    assert config.connect_kwargs("pool")["password"] == password


# --- repr


def test_repr_shows_everything_except_secrets() -> None:
    config = load(
        {
            "dsn": "postgresql://me:Sup3r@h:5433/name?sslpassword=S3cret&sslmode=require",
            "listen_dsn": (
                "host=direct password=Sup3r user='a b\\'c' options='-c x.password=S3cret'"
            ),
            "symmetric_encryption_keys": ["Sup3r", b"S3cret"],
            "channel_capacity": {"a*": 5},
        }
    )
    text = repr(config)
    assert str(config) == text
    assert text.startswith("Config(dsn='")
    for part in (
        "user=me",
        "password=***",
        "sslpassword=***",
        "options=***",
        "host=h",
        "port=5433",
        "sslmode=require",
        "host=direct",
        "symmetric_encryption_keys=<2 keys>",
        "channel_capacity={'a*': 5}",
        "expiry=60",
        "using=None",
    ):
        assert part in text
    assert not re.search("Sup3r|S3cret", text)
    for name in OPTIONS:
        assert f"{name}=" in text
    assert "symmetric_encryption_keys=None" in repr(load({}))


# --- Connection parameters

DEFAULTS = {
    "application_name": "pg_layer",
    "connect_timeout": 5,
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 15000,
    "client_encoding": "UTF8",
}


@pytest.fixture(autouse=True)
def _no_libpq_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PGAPPNAME", raising=False)
    monkeypatch.delenv("PGCONNECT_TIMEOUT", raising=False)


def test_connect_kwargs_of_a_dsn_add_defaults() -> None:
    own = {"user": "user", "password": "pw", "host": "db.example", "dbname": "name"}
    assert load({"dsn": DSN}).connect_kwargs("pool") == own | DEFAULTS
    assert load({"dsn": DSN}).connect_kwargs("listen") == own | DEFAULTS


def test_connect_kwargs_to_listen_use_listen_dsn() -> None:
    config = load({"dsn": DSN, "listen_dsn": "host=direct"})
    assert config.connect_kwargs("listen") == {"host": "direct"} | DEFAULTS
    assert config.connect_kwargs("pool")["host"] == "db.example"


def test_connect_kwargs_keep_what_the_user_set(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = dict.fromkeys(DEFAULTS, "0") | {"client_encoding": "UTF8"}
    dsn = " ".join(f"{name}={value}" for name, value in chosen.items())
    assert load({"dsn": dsn}).connect_kwargs("pool") == chosen
    monkeypatch.setenv("PGAPPNAME", "mine")
    monkeypatch.setenv("PGCONNECT_TIMEOUT", "30")
    kwargs = load({"dsn": DSN}).connect_kwargs("pool")
    assert "application_name" not in kwargs
    assert "connect_timeout" not in kwargs
    assert kwargs["keepalives_idle"] == 10


def test_connect_kwargs_are_not_shared() -> None:
    config = load({"dsn": DSN})
    config.connect_kwargs("pool").clear()
    assert config.connect_kwargs("pool")["host"] == "db.example"


class Connections(dict[str, Any]):
    """A replacement of `django.db.connections`, with Django's wrappers."""

    def __missing__(self, alias: str) -> Any:
        raise ConnectionDoesNotExist(alias)


@pytest.fixture
def connections(monkeypatch: pytest.MonkeyPatch) -> Connections:
    stand_in = Connections()
    for module in (config_module, aliases_module):
        monkeypatch.setattr(module, "connections", stand_in)
    monkeypatch.setattr(config_module, "require_settings", lambda alias: None)
    return stand_in


def test_connect_kwargs_of_an_alias_follow_the_settings(connections: Connections) -> None:
    parameters = {
        "dbname": "test_name",
        "password": "pw",
        "sslmode": "require",
        "keepalives_idle": 60,
        "client_encoding": "UTF8",
        "MAX_CONNS": 4,
        "assume_role": "r",
        "context": object(),
        "cursor_factory": object(),
        "isolation_level": 1,
        "pool": True,
        "prepare_threshold": None,
        "row_factory": object(),
        "server_side_binding": True,
    }
    connections["default"] = SimpleNamespace(
        vendor="postgresql",
        settings_dict={"OPTIONS": {}},
        get_connection_params=lambda: dict(parameters),
    )
    expected = DEFAULTS | {
        "dbname": "test_name",
        "password": "pw",
        "sslmode": "require",
        "keepalives_idle": 60,
        "client_encoding": "UTF8",
    }
    config = load({})
    assert config.connect_kwargs("pool") == expected
    assert config.connect_kwargs("listen") == expected
    parameters["password"] = "rotated"
    assert config.connect_kwargs("pool")["password"] == "rotated"
    assert load({"listen_dsn": "host=h"}).connect_kwargs("listen") == {"host": "h"} | DEFAULTS


def test_connect_kwargs_include_the_assumed_role(connections: Connections) -> None:
    options: dict[str, Any] = {"assume_role": "the owner"}
    connections["default"] = SimpleNamespace(
        vendor="postgresql",
        settings_dict={"OPTIONS": options},
        get_connection_params=lambda: {
            name: options[name] for name in options if name != "assume_role"
        },
    )
    assert load({}).connect_kwargs("pool")["options"] == r"-c role=the\ owner"
    options["options"] = "-c statement_timeout=0"
    assert (
        load({}).connect_kwargs("listen")["options"] == r"-c statement_timeout=0 -c role=the\ owner"
    )


def test_connect_kwargs_unknown_alias_raises(connections: Connections) -> None:
    for alias, vendor in (("default", "sqlite"), ("main", "postgresql"), ("old", "postgresql")):
        connections[alias] = SimpleNamespace(vendor=vendor)
    config = load({"using": "other"})
    with pytest.raises(
        ImproperlyConfigured,
        match=r"not 'other'\. The aliases of PostgreSQL databases are: 'main', 'old'\.",
    ):
        config.connect_kwargs("pool")


def test_connect_kwargs_other_database_raises(connections: Connections) -> None:
    connections["files"] = SimpleNamespace(
        vendor="sqlite", settings_dict={"ENGINE": "django.db.backends.sqlite3"}
    )
    with pytest.raises(
        ImproperlyConfigured,
        match=r"'files' has the ENGINE 'django\.db\.backends\.sqlite3'\. DATABASES has no alias of",
    ):
        load({"using": "files"}).connect_kwargs("pool")


def run(code: str) -> str:
    """Return the output of `code` in a separate Python process, without Django settings."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={"PATH": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def test_config_dsn_needs_no_settings() -> None:
    code = (
        "from django.conf import settings; from pg_layer._config.options import load;"
        f"host = load({{'dsn': {DSN!r}}}).connect_kwargs('pool')['host'];"
        "print(host, load({}).using, settings.configured)"
    )
    assert run(code).split() == ["db.example", "default", "False"]


def test_connect_kwargs_are_those_of_django() -> None:
    code = (
        "from django.conf import settings\n"
        "settings.configure(DATABASES={'default': {"
        "'ENGINE': 'django.db.backends.postgresql', 'NAME': 'n',"
        "'USER': 'u', 'PASSWORD': 'p', 'OPTIONS': {'sslmode': 'prefer', 'isolation_level': 4,"
        "'assume_role': 'r', 'server_side_binding': True, 'pool': True}}})\n"
        "from pg_layer._config.options import load\n"
        "config = load({})\n"
        "before = config.connect_kwargs('pool')\n"
        "from django.db import connection\n"
        "connection.settings_dict['NAME'] = 'test_n'\n"
        "print(sorted(before), config.connect_kwargs('pool')['dbname'])"
    )
    expected = [*DEFAULTS, "dbname", "user", "password", "sslmode", "options"]
    assert run(code) == f"{sorted(expected)} test_n\n"
