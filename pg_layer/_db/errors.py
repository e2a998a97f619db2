"""What the database's errors mean: which may be tried again, and in which words the others are told."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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

# Errors after which the statement surely did not take effect, and another attempt may succeed.
# Not "08": a pooler says that also of a statement that was committed and whose answer it lost.
_TRANSIENT_CLASSES = ("26000", "40001", "40P01", "53", "57000", "57P", "25006", "55P03")
CANCELED = "57014"
# The server cancels a statement because of statement_timeout, or because an administrator has asked for it
# by pg_cancel_backend(). Only the words tell, and they may be in another language.
_BY_REQUEST = "canceling statement due to user request"
TIMED_OUT = (
    "The database cancelled the statement because it took longer than the statement_timeout of the role."
    " Set a longer one for the role (ALTER ROLE ... SET statement_timeout = ...), or find what held the"
    " statement up: a lock, or a busy server."
)
# With those of a connection that could not be made, was lost, or was denied for its user or database.
_AWAY_CLASSES = (*_TRANSIENT_CLASSES, "08", "28", "3D")
# Errors that mean that NOTIFY cannot be had, its queue being full or the server knowing none: the statement
# is tried again without NOTIFY.
REFUSALS = ("54000", "0A000")
READ_ONLY = "25006"
FORBIDDEN = "42501"
AWAY = "The database could not be reached: "
_HOPELESS = re.compile(
    r"FATAL: +(password authentication failed|no pg_hba\.conf entry|(database|role) .+ does not exist)"
    r"|no password supplied"
)
# Psycopg's list of what came of several hosts, and of several addresses of one.
_ATTEMPT = re.compile(r"^- (host: .*?, port: .*?), hostaddr: .*?: ", re.MULTILINE)
UNDEFINED = (errors.UndefinedFunction, errors.UndefinedTable, errors.UndefinedColumn)


class Attempts:
    """The attempts of one call: whether another one may follow, and what the caller is told if none does.

    ``is_idempotent``: another attempt may follow one that has perhaps taken effect. ``is_read``: none has an
    effect. ``alias``: of the database, if not that of ``config``. ``gives_up``: whether the process is
    stopping and the database is known to be away.
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
        self.is_outcome_unknown = False  # an attempt has perhaps taken effect

    def failed(self, error: psycopg.Error, *, is_late: bool) -> None:
        """Return if another attempt may follow this error, else raise what the caller is told.

        ``is_late``: no time is left for another one.
        """
        if isinstance(error, UNDEFINED):
            raise not_migrated(self._config, self._alias) from error
        may_repeat = not is_late
        if not _is_transient(error):
            is_lost = (error.sqlstate or "08").startswith("08") and isinstance(
                error, psycopg.OperationalError
            )
            self.is_outcome_unknown |= is_lost and not self._is_read
            may_repeat &= is_lost and self._is_idempotent
        if not may_repeat:
            raise self.unavailable(error) from error

    def unavailable(self, reason: BaseException | None) -> LayerUnavailable:
        """What the caller is told if the call ends for this reason, which is not of an attempt.

        `OutcomeUnknown` if an attempt before has perhaps taken effect.
        """
        error = OutcomeUnknown() if self.is_outcome_unknown else unavailable(reason)
        return at_the_end(error) if self._gives_up() else error


def _is_transient(error: psycopg.Error) -> bool:
    """Whether the statement surely did not take effect, and another attempt may succeed."""
    if error.sqlstate == CANCELED:
        return _is_by_request(error)
    return (error.sqlstate or "").startswith(_TRANSIENT_CLASSES)


def _is_by_request(error: psycopg.Error) -> bool:
    return error.diag.message_primary == _BY_REQUEST


@contextmanager
def translated(config: Config) -> Iterator[None]:
    """Psycopg's errors become `LayerUnavailable` and `NotMigrated`."""
    try:
        yield
    except UNDEFINED as error:
        raise not_migrated(config) from error
    except psycopg.Error as error:
        raise unavailable(error) from error


def at_the_end(error: LayerUnavailable) -> LayerUnavailable:
    """What a caller is told instead, if the process is stopping, where nothing waits for the database."""
    if termination.is_stopping():
        if type(error) is LayerUnavailable:
            return Stopping(f"The process is stopping. {error}")
        if type(error) is OutcomeUnknown:
            return StoppingUnknown(f"The process is stopping. {error}")
    return error


def unavailable(reason: BaseException | None) -> LayerUnavailable:
    """`LayerUnavailable` that says why. libpq's texts hold hosts and names, never passwords."""
    if reason is None:
        return LayerUnavailable(f"{AWAY}no connection became free")
    if isinstance(reason, psycopg.Error) and reason.sqlstate == READ_ONLY:
        return LayerUnavailable(
            "The database takes no writes: it is a standby, or read-only by its settings."
        )
    if (
        isinstance(reason, psycopg.Error)
        and reason.sqlstate == CANCELED
        and not _is_by_request(reason)
    ):
        return LayerUnavailable(TIMED_OUT)
    beginning = "The database refused the call: " if was_refused(reason) else AWAY
    return LayerUnavailable(f"{beginning}{words_of(reason)}")


def was_refused(error: BaseException) -> bool:
    """Whether the database was there, and had something against the statement itself."""
    reason = error if isinstance(error, psycopg.Error) else error.__cause__
    return isinstance(error, NotMigrated) or (
        isinstance(reason, psycopg.Error)
        and not (reason.sqlstate or "08").startswith(_AWAY_CLASSES)
    )


def is_forbidden(error: BaseException) -> bool:
    """Whether the role lacks a privilege."""
    return getattr(error.__cause__, "sqlstate", None) == FORBIDDEN


def words_of(error: BaseException) -> str:
    """An error on one line; of the server's the message alone, and not where in which function it came up."""
    said = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    return " ".join((said or str(error)).split())


def reason_of(error: BaseException) -> str:
    """Why the database is away, in the words of the error that was the cause."""
    if isinstance(error, OutcomeUnknown) and error.__cause__ is not None:
        error = error.__cause__
    return words_of(error).removeprefix(AWAY)


def is_hopeless(error: BaseException | None) -> bool:
    """Whether no connection can be made for what does not mend itself: a wrong password, a missing database.

    Of several hosts each has to have said so: one that is away may come back, and take what another denies.
    libpq tells no SQLSTATE of it. A server that speaks another language than English is asked again.
    """
    if not isinstance(error, psycopg.OperationalError) or error.sqlstate is not None:
        return False
    _, *attempts = _ATTEMPT.split(str(error))
    if not attempts:
        pgconn = error.pgconn
        return bool(_HOPELESS.search(str(error))) or (
            pgconn is not None and bool(pgconn.needs_password)
        )
    said: dict[str, bool] = {}
    for host, text in zip(attempts[::2], attempts[1::2], strict=True):
        said[host] = said.get(host, False) or bool(_HOPELESS.search(text))
    return all(said.values())
