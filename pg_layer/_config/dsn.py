"""Connection strings: their errors, and their text without secrets."""

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
# libpq's messages about a connection string quote parts of it. These texts replace them.
_PROBLEMS = {
    'missing "="': "a part has no '='; a value that contains a space needs quotes: password='a b'",
    "invalid connection option": (
        "it has an unknown option{}; a value that contains a space needs quotes"
    ),
    "invalid URI query parameter": "it has an unknown option{}",
    "invalid percent-encoded token": "it has a '%' without a code after it; write '%25'",
    "unterminated quoted string": "it has an opening quote without a closing quote",
}
_LOOKS_SECRET = re.compile(r"passw|secret|://|\bpwd", re.IGNORECASE)
_PORTS = re.compile(r"[0-9]{0,5}(,[0-9]{0,5})*")
_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,30}://")
_DJANGO_SCHEMES = ("pgsql://", "postgis://", "psql://")  # of a DATABASE_URL
_URL = re.compile(r"postgres(?:ql)?://")


def is_utf8(text: str) -> bool:
    """Return whether UTF-8 can encode the text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def looks_secret(text: str) -> bool:
    """Return whether the text may be or contain a password."""
    return _LOOKS_SECRET.search(text) is not None


def problem_with(dsn: str) -> str | None:
    """Return what is wrong with a connection string, without quoting a part of it; None if valid.

    It is stricter than libpq. libpq cuts a password that is not percent-encoded at an `@` or `/`,
    and takes the rest for the host, the port or the database. Connecting would fail later, and the
    error would show that rest.
    """
    if not dsn.strip():
        return "it is empty (is its environment variable set?)"
    if "\0" in dsn or not is_utf8(dsn):
        return "it contains a NUL or a lone surrogate"
    scheme = _SCHEME.match(dsn)
    if scheme is not None and _URL.match(dsn) is None:
        advice = "; write 'postgresql://'" if scheme[0] in _DJANGO_SCHEMES else ""
        return f"it is a URL of another kind: {scheme[0]!r}{advice}"
    try:
        parameters = parsed(dsn)
    except (psycopg.Error, UnicodeError) as error:
        return _translated(str(error))
    if _has_unencoded_password(dsn):
        return (
            "special characters in user, password and options must be percent-encoded "
            "('@' as '%40')"
        )
    if not _PORTS.fullmatch(str(parameters.get("port", ""))):
        return (
            "its port is not a number "
            "(in a URL, special characters must be percent-encoded: '/' as '%2F')"
        )
    return None


def _has_unencoded_password(dsn: str) -> bool:
    """Return whether libpq would take a part of a URL's password for something else."""
    url = _URL.match(dsn)
    if url is None:
        return False
    # libpq ends user and password at the first "@", unless a "/" comes before it.
    before, at, rest = dsn[url.end() :].partition("@")
    return "@" in rest or bool(at and "/" in before)


def _translated(error: str) -> str:
    """Return a text for libpq's message about a connection string, without its quotes."""
    for beginning, problem in _PROBLEMS.items():
        if error.startswith(beginning):
            return problem.format(_nearest(error))
    return "libpq does not understand it"


def _nearest(text: str) -> str:
    """Return the unknown option of libpq's message, for the problem's text.

    It is shown only if it resembles a known option. Otherwise it may be a part of a password.
    """
    _, _, wrong = text.strip().rstrip('"').partition('"')
    near = difflib.get_close_matches(wrong, known_parameters(), n=1, cutoff=0.75)
    if not near or looks_secret(wrong):
        return ", not shown here because it may be a part of a password"
    return f" {wrong!r} (did you mean {near[0]!r}?)"


@functools.cache
def known_parameters() -> frozenset[str]:
    """Return the names of the parameters that libpq knows."""
    return frozenset(option.keyword.decode() for option in pq.Conninfo.get_defaults())


def parsed(dsn: str) -> dict[str, Any]:
    """Return the parameters of a connection string."""
    return dict(conninfo_to_dict(dsn))


def without_secrets(dsn: str) -> str:
    """Return the connection string in the form `key=value`, with `***` for secret values.

    A value that may be or contain a password counts as secret.
    """
    parts = []
    for name, value in parsed(dsn).items():
        if name in _SECRET_PARAMETERS or looks_secret(value):
            value = "***"
        elif not value or re.search(r"[\s'\\]", value):
            escaped = value.replace("\\", "\\\\").replace("'", "\\'")
            value = f"'{escaped}'"
        parts.append(f"{name}={value}")
    return " ".join(parts)
