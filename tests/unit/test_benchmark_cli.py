"""The benchmarks' command line: errors are reported before anything starts."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks import cli
from benchmarks.report import Results


@pytest.fixture(autouse=True)
def _signals_as_before() -> Iterator[None]:
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for signum, handler in before.items():
        signal.signal(signum, handler)


@pytest.fixture(autouse=True)
def _nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def start(options: cli.Options) -> None:
        raise AssertionError("it has started")

    monkeypatch.setattr(cli, "available", start)


def complaint(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("option", ["--json", "--plots", "--profile"])
def test_option_with_a_path_that_is_not_writable_is_refused(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if option == "--plots":
        pytest.importorskip("matplotlib")
    (tmp_path / "file").touch()
    assert "cannot write there: " in complaint(capsys, option, str(tmp_path / "file" / "below"))


def test_json_option_with_a_folder_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "cannot write there: " in complaint(capsys, "--json", str(tmp_path))


def test_check_file_leaves_the_file_unchanged(tmp_path: Path) -> None:
    cli.check_file(tmp_path / "new")
    assert not list(tmp_path.iterdir())
    (tmp_path / "old").write_text("old")
    cli.check_file(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "old"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--rounds", "abc"], "must be a whole number, at least 1, not 'abc'"),
        (["--rounds", "0"], "must be a whole number, at least 1, not '0'"),
        (["--redis", "foo"], "must be a URL such as redis://127.0.0.1:6379/0, not 'foo'"),
        (
            ["--scenarios", "growth-idle/3"],
            "unknown: 'growth-idle/3'; choose from growth-idle/0, growth-idle/100,",
        ),
        (["--scenarios", "nothing"], "unknown: 'nothing'; choose from latency, throughput,"),
        (["--layers", "nothing"], "unknown: 'nothing'; choose from pg, core,"),
    ],
)
def test_option_with_a_wrong_value_names_the_valid_ones(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in complaint(capsys, *arguments)


def test_main_interrupted_reports_what_was_measured(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(options: cli.Options) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "available", start)
    assert cli.main(["--tiny"]) == 130
    assert capsys.readouterr().out.strip() == "Interrupted before anything was measured."
    assert cli.extent(Results([], [], round=2, interrupted=True), 3).startswith(
        "INTERRUPTED in round 2 of 3"
    )
    assert cli.extent(Results([], [], round=3), 3) == "Medians of 3 round(s)"
