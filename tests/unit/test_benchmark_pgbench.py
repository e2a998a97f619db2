"""The benchmarks' reading of pgbench's output, and its end."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import pgbench
from benchmarks.pgbench import Broken, Pgbench, find_pgbench, parse_log, parse_report
from benchmarks.servers import Unavailable
from devtools.postgres import BinariesNotFound

REPORT = """\
pgbench (18.4)
starting vacuum...end.
transaction type: <builtin: TPC-B (sort of)>
scaling factor: 20
query mode: simple
number of clients: 2
number of threads: 1
maximum number of tries: 1
duration: 60 s
number of transactions actually processed: 608
number of failed transactions: 0 (0.000%)
latency average = 1.463 ms
latency stddev = 2.217 ms
rate limit schedule lag: avg 0.181 (max 10.245) ms
initial connection time = 13.839 ms
tps = 203.920711 (without initial connection time)
"""
DSN = "host=127.0.0.1 port=1 user=me password=secret dbname=bench"


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A replacement of pgbench, to fill with a script."""
    file = tmp_path / "pgbench"
    file.touch()
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(pgbench, "find_binaries", lambda: tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield file
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == []


def test_parse_report_returns_transactions_rate_and_latencies() -> None:
    report = parse_report(REPORT, [1.0])
    assert (report.transactions, report.per_second, report.latencies_ms) == (608, 203.920711, [1.0])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "it said nothing"),
        ("starting vacuum...\npgbench: error: no such table\n", "no such table"),
        (REPORT.replace("tps = ", "tps: "), "tps: 203"),
        (
            REPORT + "pgbench: error: Run was aborted; the above results are incomplete.\n",
            "aborted",
        ),
    ],
)
def test_parse_report_of_another_text_raises(text: str, reason: str) -> None:
    with pytest.raises(Broken, match=reason):
        parse_report(text, [])


def test_parse_log_returns_latencies_of_complete_lines() -> None:
    lines = [
        "0 1 2000 0 1795691332 719304 65",
        "1 1 1349 0 1795691332 720732",
        "0 2 skipped 0 1795691332 7 9",
    ]
    assert parse_log([*lines, "0 3 failed 0 1795691332 8", "", "0 4"]) == [2.0, 1.349]


def test_find_pgbench_finds_the_program_of_the_server(program: Path) -> None:
    assert find_pgbench() == str(program)


def test_find_pgbench_without_a_server_searches_the_path(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none() -> Path:
        raise BinariesNotFound

    monkeypatch.setattr(pgbench, "find_binaries", none)
    monkeypatch.setenv("PATH", str(program.parent))
    assert find_pgbench() == str(program)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(Unavailable, match=r"comes with PostgreSQL: pip install"):
        find_pgbench()


def test_pgbench_report_combines_output_and_log_files(program: Path) -> None:
    program.write_text(
        "#!/bin/sh\n"
        'while [ "$1" != --log-prefix ]; do shift; done\n'
        f"echo '0 1 2000 0 1 1' > $2.1; echo '1 1 4000 0 1 1' > $2.1.1; cat <<END\n{REPORT}END\n"
    )
    with Pgbench(DSN, clients=2, seconds=1) as running:
        report = running.report()
    assert report.transactions == 608
    assert sorted(report.latencies_ms) == [2.0, 4.0]


def test_pgbench_password_is_not_on_the_command_line(program: Path) -> None:
    program.write_text('#!/bin/sh\necho "$* $PGPASSWORD"; exit 1\n')
    with Pgbench(DSN, clients=2, seconds=0.5, rate=200) as running, pytest.raises(Broken) as caught:
        running.report()
    words = str(caught.value)
    assert words.startswith("exit code 1: -c 2 -T 1 -l")
    assert words.count("secret") == 1
    assert words.endswith("application_name=pgbench secret")
    assert "-R 200" in words


def test_pgbench_ends_with_the_block(program: Path) -> None:
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    with Pgbench(DSN, clients=2, seconds=600) as running:
        pid = running._process.pid
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
