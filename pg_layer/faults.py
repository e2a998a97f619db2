"""What the database's errors mean: which may be tried again, and in which words the others are told."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg
from psycopg import errors

from pg_layer.aliases import not_migrated
from pg_layer.config import Config
from pg_layer.exceptions import LayerUnavailable, NotMigrated, OutcomeUnknown

# Errors after which the statement surely did not take effect, and another attempt may succeed.
# Not "08": a pooler says that also of a statement that was committed and whose answer it lost.
_TRANSIENT_CLASSES = ("26000", "40001", "40P01", "53", "57", "25006", "55P03")
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


def judge(
    error: psycopg.Error, is_idempotent: bool, is_late: bool, config: Config, alias: str | None = None
) -> None:
    """Return if a statement may be tried again, else raise: as `Connections.run` says.

    ``alias``: of the database, if not that of ``config``.
    """
    if isinstance(error, UNDEFINED):
        raise not_migrated(config, alias) from error
    if error.sqlstate is not None and error.sqlstate.startswith(_TRANSIENT_CLASSES):
        if is_late:
            raise unavailable(error) from error
        return
    if (error.sqlstate or "08").startswith("08") and isinstance(error, psycopg.OperationalError):
        if is_idempotent and not is_late:
            return
        raise OutcomeUnknown from error
    raise unavailable(error) from error


@contextmanager
def translated(config: Config) -> Iterator[None]:
    """Psycopg's errors become `LayerUnavailable` and `NotMigrated`."""
    try:
        yield
    except UNDEFINED as error:
        raise not_migrated(config) from error
    except psycopg.Error as error:
        raise unavailable(error) from error


def unavailable(reason: BaseException | None) -> LayerUnavailable:
    """`LayerUnavailable` that says why. libpq's texts hold hosts and names, never passwords."""
    if reason is None:
        return LayerUnavailable(f"{AWAY}no connection became free")
    if isinstance(reason, psycopg.Error) and reason.sqlstate == READ_ONLY:
        return LayerUnavailable(
            "The database takes no writes: it is a standby, or read-only by its settings."
        )
    beginning = "The database refused the call: " if was_refused(reason) else AWAY
    return LayerUnavailable(f"{beginning}{words_of(reason)}")


def was_refused(error: BaseException) -> bool:
    """Whether the database was there, and had something against the statement itself."""
    reason = error if isinstance(error, psycopg.Error) else error.__cause__
    return isinstance(error, NotMigrated) or (
        isinstance(reason, psycopg.Error) and not (reason.sqlstate or "08").startswith(_AWAY_CLASSES)
    )


def is_forbidden(error: BaseException) -> bool:
    """Whether the role lacks a privilege."""
    return getattr(error.__cause__, "sqlstate", None) == FORBIDDEN


def words_of(error: BaseException) -> str:
    """An error on one line; of the server's the message alone, and not where in which function it came up."""
    said = error.diag.message_primary if isinstance(error, psycopg.Error) else None
    return " ".join((said or str(error)).split())


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
        return bool(_HOPELESS.search(str(error))) or (pgconn is not None and bool(pgconn.needs_password))
    said: dict[str, bool] = {}
    for host, text in zip(attempts[::2], attempts[1::2], strict=True):
        said[host] = said.get(host, False) or bool(_HOPELESS.search(text))
    return all(said.values())
