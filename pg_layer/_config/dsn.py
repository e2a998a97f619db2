"""Connection strings: what is wrong with them, and how they are shown without what is secret in them."""

from __future__ import annotations

import difflib
import functools
import re
from typing import Any

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict

_SECRET_PARAMETERS = frozenset(
    ("password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key")
)
# libpq's words for what is wrong with a connection string quote it. These replace them.
_DSN_FAULTS = {
    'missing "="': "a part has no '='; a value with a space in it needs quotes, as in password='a b'",
    "invalid connection option": "it has an unknown option{}; a value with a space in it needs quotes",
    "invalid URI query parameter": "it has an unknown option{}",
    "invalid percent-encoded token": "it has a '%' with no code after it; write '%25'",
    "unterminated quoted string": "a quote is opened and not closed",
}
_LOOKS_SECRET = re.compile(r"passw|secret|://|\bpwd", re.IGNORECASE)
_PORTS = re.compile(r"[0-9]{0,5}(,[0-9]{0,5})*")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,30}://")
_URL = re.compile(r"postgres(?:ql)?://")


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can carry it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def looks_secret(text: str) -> bool:
    """Whether it could be a password, or hold one."""
    return _LOOKS_SECRET.search(text) is not None


def fault_of(dsn: str) -> str | None:
    """What is wrong with a connection string, in words that hold no part of it.

    Stricter than libpq where a password that was not percent-encoded is cut at an `@` or `/` and its rest
    taken for the host, the port or the database: that would fail later, and be shown.
    """
    if not dsn.strip():
        return "it is empty (is the environment variable set that it comes from?)"
    if "\0" in dsn or not is_utf8(dsn):
        return "it has a NUL or a lone surrogate in it"
    scheme = _SCHEME.match(dsn)
    if scheme is not None and _URL.match(dsn) is None:
        return f"it is a URL of another kind: {scheme[0]!r}"
    try:
        parameters = parsed(dsn)
    except (psycopg.Error, UnicodeError) as error:
        text = str(error)
    else:
        url = _URL.match(dsn)
        if url is None:
            misplaced = False
        else:
            # As libpq looks for the end of user and password: an "@", unless a "/" comes first.
            before, at, rest = dsn[url.end() :].partition("@")
            misplaced = "@" in rest or bool(at and "/" in before)
        if misplaced:
            return "special characters in user, password and options must be percent-encoded ('@' as '%40')"
        if not _PORTS.fullmatch(str(parameters.get("port", ""))):
            return "its port is no number (in a URL, special characters must be percent-encoded: '/' as '%2F')"
        return None
    for beginning, fault in _DSN_FAULTS.items():
        if text.startswith(beginning):
            return fault.format(_nearest(text))
    return "libpq does not understand it"


def _nearest(text: str) -> str:
    """The option that libpq does not know, if it is like one that it does: another may be of a password."""
    _, _, wrong = text.strip().rstrip('"').partition('"')
    near = difflib.get_close_matches(wrong, known_parameters(), n=1, cutoff=0.75)
    if not near or looks_secret(wrong):
        return ", not shown here as it may be a part of a password"
    return f" {wrong!r} (did you mean {near[0]!r}?)"


@functools.cache
def known_parameters() -> frozenset[str]:
    """The names of the parameters that libpq knows."""
    return frozenset(option.keyword.decode() for option in pq.Conninfo.get_defaults())


def parsed(dsn: str) -> dict[str, Any]:
    """The connection string's parameters."""
    return dict(conninfo_to_dict(dsn))


def without_secrets(dsn: str) -> str:
    """The connection string in libpq's `key=value` form, with `***` for whatever is, or looks, secret."""
    parts = []
    for name, value in parsed(dsn).items():
        if name in _SECRET_PARAMETERS or looks_secret(value):
            value = "***"
        elif not value or re.search(r"[\s'\\]", value):
            escaped = value.replace("\\", "\\\\").replace("'", "\\'")
            value = f"'{escaped}'"
        parts.append(f"{name}={value}")
    return " ".join(parts)
