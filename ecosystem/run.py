"""Install the suites and run them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from psycopg.conninfo import conninfo_to_dict

from ecosystem.outcomes import Outcome, read_junit, read_remains
from ecosystem.suites import SUITES, Suite

HERE = Path(__file__).parent
ROOT = HERE.parent
REQUIREMENTS = HERE / "requirements.txt"
TIMEOUT_OF_A_TEST = 120  # seconds
TIMEOUT_OF_A_SUITE = 1800


class EcosystemError(Exception):
    """A suite could not be installed or run."""


class Workplace:
    """The folder with the virtual environment, the source distributions and the reports."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self._python = self.folder / "venv" / "bin" / "python"

    def prepare(self) -> None:
        """Install everything again if the table or the pinned versions have changed."""
        releases = [f"{suite.package}=={suite.version}" for suite in SUITES]
        contents = "\n".join([sys.version, REQUIREMENTS.read_text(), *releases])
        stamp = self.folder / "installed"
        if stamp.exists() and stamp.read_text() == contents:
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        # Here pytest's search for a configuration ends, before it finds that of this project.
        (self.folder / "pytest.ini").write_text("[pytest]\n")
        _run(sys.executable, "-m", "venv", self.folder / "venv")
        self._pip("install", "--requirement", REQUIREMENTS, "--editable", ROOT)
        for suite, release in zip(SUITES, releases, strict=True):
            print(f"installing {release}", file=sys.stderr, flush=True)
            target = self._folder(suite)
            source = ("--no-deps", "--no-build-isolation", "--no-binary", ":all:")
            self._pip("download", *source, "--dest", target, release)
            self._pip("install", *source, self._archive(suite))
        stamp.write_text(contents)

    def test(
        self, suite: Suite, dsn: str, *, redis: str = "", with_own_layer: bool = False
    ) -> tuple[dict[str, Outcome], list[str]]:
        """Run a suite's tests from a fresh copy of its source.

        Return the outcomes, and what this layer leaves behind. The output and the report remain in
        the folder of the suite.

        ``dsn``: an empty database. ``redis``: the address of a server, for suites that need one.
        """
        source = self._unpack(suite, redis)
        name = "own" if with_own_layer else "pg_layer"
        report = self._folder(suite) / f"{name}.xml"
        report.unlink(missing_ok=True)
        output = self._folder(suite) / f"{name}.log"
        command = [
            *(str(self._python), "-m", "pytest", "-p", "pg_layer_exchange", "-ra"),
            # Without the options of the package's developers, such as coverage.
            *("--override-ini", "addopts=", "--rootdir", str(source)),
            *("--timeout", str(TIMEOUT_OF_A_TEST), "--junitxml", str(report)),
            *suite.tests,
        ]
        with output.open("wb") as log:
            try:
                subprocess.run(
                    command,
                    cwd=source,
                    env=_environment(dsn, () if with_own_layer else suite.layers),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    timeout=TIMEOUT_OF_A_SUITE,
                    check=False,
                )
            except subprocess.TimeoutExpired as error:
                raise EcosystemError(f"{suite.package}: {error}; see {output}") from error
        if not report.exists():
            raise EcosystemError(f"{suite.package}: pytest wrote no report: see {output}")
        remains = read_remains(output.read_text(errors="replace"), str(ROOT / "pg_layer"))
        return read_junit(report.read_text()), remains

    def _unpack(self, suite: Suite, redis: str) -> Path:
        """Unpack the source and add what it lacks. Return the folder with the tests."""
        unpacked = self._folder(suite) / "source"
        shutil.rmtree(unpacked, ignore_errors=True)
        shutil.unpack_archive(self._archive(suite), unpacked, filter="data")
        (source,) = unpacked.iterdir()
        missing = HERE / "missing" / suite.package
        if missing.exists():
            shutil.copytree(missing, source, dirs_exist_ok=True)
        for file, old, new in suite.edits:
            text = (source / file).read_text()
            if old not in text:
                raise EcosystemError(f"{suite.package}: {file} does not contain {old!r}")
            (source / file).write_text(text.replace(old, new.replace("{redis}", redis)))
        return source

    def _folder(self, suite: Suite) -> Path:
        return self.folder / suite.package

    def _archive(self, suite: Suite) -> Path:
        (archive,) = self._folder(suite).glob("*.tar.gz")
        return archive

    def _pip(self, *arguments: str | Path) -> None:
        _run(self._python, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments)


def _environment(dsn: str, replaced: tuple[str, ...]) -> dict[str, str]:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PG", "DJANGO", "PYTEST"))
    }
    parameters = conninfo_to_dict(dsn)
    database = {
        "ENGINE": "django.db.backends.postgresql",
        "NAME": parameters["dbname"],
        "USER": parameters["user"],
        "PASSWORD": parameters["password"],
        "HOST": parameters["host"],
        "PORT": parameters["port"],
    }
    return inherited | {
        "PYTHONPATH": str(HERE / "plugin"),
        "PG_LAYER_ECOSYSTEM_DATABASE": json.dumps(database),
        "PG_LAYER_ECOSYSTEM_REPLACED": json.dumps(replaced),
    }


def _run(*command: str | Path) -> None:
    result = subprocess.run(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if result.returncode != 0:
        words = " ".join(str(part) for part in command)
        raise EcosystemError(f"{words} failed:\n{result.stdout[-2000:]}")
