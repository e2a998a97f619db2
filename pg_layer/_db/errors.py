"""The meaning of the database's errors: which calls are retried, and what they raise."""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import psycopg
from psycopg import errors

from pg_layer._config.databases import not_migrated
from pg_layer._config.options import Config
from pg_layer._process import shutdown as termination
from pg_layer.exceptions import (
    LayerUnavailable,
    NotMigrated,
    OutcomeUnknown,
    Stopping,
    StoppingUnknown,
)

CANCELED = "57014"
READ_ONLY = "25006"
FORBIDDEN = "42501"
# The server cannot NOTIFY: its queue is full, or the server has no NOTIFY. The statement is then
# repeated without NOTIFY.
NOTIFY_REFUSED = ("54000", "0A000")
UNDEFINED = (errors.UndefinedFunction, errors.UndefinedTable, errors.UndefinedColumn)


class Retry(enum.Enum):
    """Whether another attempt may follow an error."""

    ALWAYS = "the statement had no effect, and another attempt may succeed"
    IF_IDEMPOTENT = "the statement may have taken effect"
    NEVER = "another attempt fails in the same way"


class Rule(NamedTuple):
    """The meaning of an error with a SQLSTATE.

    ``sqlstate``: the SQLSTATE, or its first characters. ``is_away``: the database is unavailable,
    or refuses connections. Otherwise the database is available and refuses the statement.
    """

    sqlstate: str
    retry: Retry
    is_away: bool


# Which errors may be retried. An error without a rule may not be retried, and the database counts
# as available.
RULES = (
    Rule("26000", Retry.ALWAYS, True),  # a prepared statement is gone: a pooler changed the server
    Rule("40001", Retry.ALWAYS, True),  # serialization failure
    Rule("40P01", Retry.ALWAYS, True),  # deadlock
    Rule("53", Retry.ALWAYS, True),  # too many connections, out of memory or disk space
    Rule("55P03", Retry.ALWAYS, True),  # lock not available
    Rule("57000", Retry.ALWAYS, True),  # operator intervention
    # The server shuts down, starts, or has terminated the backend. If this error comes after the
    # result of the statement, the commit may be over: `_checked` in _db/session.py, and
    # `DjangoSession.execute`, then raise an error without a SQLSTATE, which counts as "08".
    Rule("57P", Retry.ALWAYS, True),
    Rule(READ_ONLY, Retry.ALWAYS, True),  # a standby; the next connection may find the primary
    # The connection was lost, or could not be made. A pooler also reports it for a statement that
    # was committed and whose answer the pooler has lost.
    Rule("08", Retry.IF_IDEMPOTENT, True),
    Rule("28", Retry.NEVER, True),  # the user is denied
    Rule("3D", Retry.NEVER, True),  # there is no such database
)
_OTHER = Rule("", Retry.NEVER, False)
# The server cancels a statement because of statement_timeout, or because an administrator has
# called pg_cancel_backend(). The SQLSTATE is the same. Only the message differs, and it may be in
# another language.
_BY_REQUEST = "canceling statement due to user request"

TIMED_OUT = (
    "The database cancelled the statement because it took longer than the statement_timeout of the"
    " role. Set a longer one for the role (ALTER ROLE ... SET statement_timeout = ...), or find"
    " what delayed the statement: a lock, or a busy server."
)
AWAY = "The database could not be reached: "
DENIED = "The database refused the connection: "
_PERMANENT = re.compile(
    r"FATAL: +"
    r"(password authentication failed|no pg_hba\.conf entry|(database|role) .+ does not exist)"
    r"|no password supplied"
)
# A line of the list that psycopg makes for several hosts, or for several addresses of one host.
_ATTEMPT = re.compile(r"^- (host: .*?, port: .*?), hostaddr: .*?: ", re.MULTILINE)


class Attempts:
    """The attempts of one call: whether another may follow, and the error if none does.

    ``is_idempotent``: another attempt may follow one that may have taken effect. ``is_read``: no
    attempt has an effect. ``alias``: the alias of the database, if ``config`` names another one.
    ``gives_up``: returns whether the process is stopping and the database is unavailable.
    """

    def __init__(
        self,
        config: Config,
        *,
        is_idempotent: bool = False,
        is_read: bool = False,
        alias: str | None = None,
        gives_up: Callable[[], bool] = lambda: False,
    ) -> None:
        self._config = config
        self._gives_up = gives_up
        self._is_idempotent = is_idempotent or is_read
        self._is_read = is_read
        self._alias = alias
        self.is_outcome_unknown = False  # an attempt may have taken effect
        self._last_error: psycopg.Error | None = None  # after which another attempt could follow

    def check_retry(self, error: psycopg.Error, *, is_late: bool) -> None:
        """Return if another attempt may follow ``error``. Otherwise raise the error of the call.

        ``is_late``: no time is left for another attempt.

        Raises `NotMigrated`, `OutcomeUnknown`, or `LayerUnavailable`.
        """
        if isinstance(error, UNDEFINED):
            raise not_migrated(self._config, self._alias) from error
        retry = _retry(error)
        if retry is Retry.IF_IDEMPOTENT and not self._is_read:
            self.is_outcome_unknown = True
        may_retry = retry is Retry.ALWAYS or (retry is Retry.IF_IDEMPOTENT and self._is_idempotent)
        if is_late or not may_retry:
            raise self.final_error(error) from error
        self._last_error = error

    def final_error(self, reason: BaseException | None) -> LayerUnavailable:
        """Return the error that the caller receives if the call ends for ``reason``.

        `OutcomeUnknown` if an earlier attempt may have taken effect. ``reason`` may be another
        error than that of an attempt. None: no connection became free, for the reason that the
        last attempt gave.
        """
        reason = reason or self._last_error
        error = OutcomeUnknown() if self.is_outcome_unknown else layer_unavailable(reason)
        return as_stopping(error) if self._gives_up() else error


def _rule(error: psycopg.Error) -> Rule:
    sqlstate = error.sqlstate or "08"  # without a SQLSTATE the error is libpq's or psycopg's own
    return next((rule for rule in RULES if sqlstate.startswith(rule.sqlstate)), _OTHER)


def _retry(error: psycopg.Error) -> Retry:
    if error.sqlstate == CANCELED:
        return Retry.ALWAYS if _is_by_request(error) else Retry.NEVER
    retry = _rule(error).retry
    if retry is Retry.IF_IDEMPOTENT and not isinstance(error, psycopg.OperationalError):
        return Retry.NEVER  # a mistake in the use of psycopg, and no lost connection
    return retry


def _is_by_request(error: psycopg.Error) -> bool:
    return error.diag.message_primary == _BY_REQUEST


@contextmanager
def translated(config: Config) -> Iterator[None]:
    """Translate psycopg's errors in the block into `LayerUnavailable` and `NotMigrated`."""
    try:
        yield
    except UNDEFINED as error:
        raise not_migrated(config) from error
    except psycopg.Error as error:
        raise layer_unavailable(error) from error


def as_stopping(error: LayerUnavailable) -> LayerUnavailable:
    """Return the error that replaces ``error`` if the process is stopping.

    Channels ends a consumer that raises `Stopping` or `StoppingUnknown`, without a traceback.
    """
    if termination.is_stopping():
        if type(error) is LayerUnavailable:
            return Stopping(f"The process is stopping. {error}")
        if type(error) is OutcomeUnknown:
            return StoppingUnknown(f"The process is stopping. {error}")
    return error


def layer_unavailable(reason: BaseException | None) -> LayerUnavailable:
    """Return a `LayerUnavailable` whose text gives the reason. None: no connection became free.

    libpq's texts contain hosts and names of users and databases, but never passwords.
    """
    if reason is None:
        return LayerUnavailable(f"{AWAY}no connection became free")
    if isinstance(reason, psycopg.Error):
        if reason.sqlstate == READ_ONLY:
            return LayerUnavailable(
                "The database takes no writes: it is a standby, or read-only by its settings."
            )
        if reason.sqlstate == CANCELED and not _is_by_request(reason):
            return LayerUnavailable(TIMED_OUT)
    beginning = AWAY
    if is_permanent(reason):
        beginning = DENIED
    elif was_refused(reason):
        beginning = "The database refused the call: "
    return LayerUnavailable(f"{beginning}{one_line(reason)}")


def was_refused(error: BaseException) -> bool:
    """Return whether the database was available and refused the statement.

    ``error``: psycopg's, or one of the layer's whose cause is psycopg's.
    """
    reason = error if isinstance(error, psycopg.Error) else error.__cause__
    return isinstance(error, NotMigrated) or (
        isinstance(reason, psycopg.Error) and not _rule(reason).is_away
    )


def is_forbidden(error: BaseException) -> bool:
    """Return whether the cause of ``error`` is that the role lacks a privilege."""
    return getattr(error.__cause__, "sqlstate", None) == FORBIDDEN


def one_line(error: BaseException) -> str:
    """Return the text of an error on one line.

    For an error of the server only the message, without the position in the server's functions.
    """
    message = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    return " ".join((message or str(error)).split())


def outage_reason(error: BaseException) -> str:
    """Return why the database is unavailable: the text of the error that was the cause."""
    if isinstance(error, OutcomeUnknown) and error.__cause__ is not None:
        error = error.__cause__
    return one_line(error).removeprefix(AWAY).removeprefix(DENIED)


def is_permanent(error: BaseException | None) -> bool:
    """Return whether no connection can be made until the configuration changes.

    Examples are a wrong password and a missing database. If there are several hosts, each must
    have reported such an error: an unavailable host may return and accept the connection.

    libpq gives no SQLSTATE for these errors, only an English text. If the server uses another
    language, the result is False and the caller tries again.
    """
    if not isinstance(error, psycopg.OperationalError) or error.sqlstate is not None:
        return False
    _, *attempts = _ATTEMPT.split(str(error))
    if not attempts:
        pgconn = error.pgconn
        return bool(_PERMANENT.search(str(error))) or (
            pgconn is not None and bool(pgconn.needs_password)
        )
    is_denied: dict[str, bool] = {}  # by host; one of its addresses is enough
    for host, text in zip(attempts[::2], attempts[1::2], strict=True):
        is_denied[host] = is_denied.get(host, False) or bool(_PERMANENT.search(text))
    return all(is_denied.values())
