"""Run processes of the test project to their end, or start them and communicate."""

from __future__ import annotations

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[2]
# Warnings of asyncio in development mode on a busy machine.
SLOW_STEPS = re.compile(r"^Executing .* took \d+\.\d+ seconds(\n|$)", re.MULTILINE)
TIMEOUT = 30.0  # seconds: a limit for short operations that holds on a busy machine


def environment(dsn: str, settings: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Return the environment of a process of the project."""
    return {
        **os.environ,
        "DJANGO_SETTINGS_MODULE": "tests.project.settings",
        "PG_LAYER_TEST_PROJECT_DSN": dsn,
        "PG_LAYER_TEST_PROJECT_SETTINGS": json.dumps(settings or {}),
    }


def run(
    dsn: str, *arguments: str, settings: Mapping[str, Any] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `python` with these arguments in development mode, and allow any exit status.

    The result's standard error does not contain `SLOW_STEPS`.
    """
    result = subprocess.run(
        [sys.executable, "-X", "dev", *arguments],
        cwd=ROOT,
        env=environment(dsn, settings),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT,
    )
    result.stderr = SLOW_STEPS.sub("", result.stderr)
    return result


def manage(
    dsn: str, *arguments: str, settings: Mapping[str, Any] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command of `manage.py`, and allow any exit status."""
    return run(dsn, "-m", "tests.project.manage", *arguments, settings=settings)


def django(dsn: str, code: str, *, settings: Mapping[str, Any] | None = None) -> str:
    """Return what `code` prints after Django's setup. It must succeed without warnings."""
    return succeeded(run(dsn, "-c", f"import django; django.setup()\n{code}", settings=settings))


def succeeded(result: subprocess.CompletedProcess[str]) -> str:
    """Return the stripped output of a process that succeeded without errors or warnings."""
    assert (result.returncode, result.stderr) == (0, ""), f"{result.stdout}\n{result.stderr}"
    return result.stdout.strip()


class Process:
    """A running process that is sent lines of input and whose output lines are awaited."""

    def __init__(self, popen: subprocess.Popen[str]) -> None:
        self._popen = popen
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.output: list[str] = []
        self.errors: list[str] = []
        assert popen.stdout is not None
        assert popen.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=(popen.stdout, self._lines.put)),
            threading.Thread(target=self._read, args=(popen.stderr, self._complain)),
        ]
        for reader in self._readers:
            reader.start()

    @property
    def pid(self) -> int:
        return self._popen.pid

    @staticmethod
    def _read(stream: IO[str], put: Callable[[str | None], None]) -> None:
        for line in stream:
            put(line.rstrip("\n"))
        put(None)

    def _complain(self, line: str | None) -> None:
        if line is not None and not SLOW_STEPS.match(line):
            self.errors.append(line)

    def expect(self, part: str) -> str:
        """Return the next line of output that contains `part`. Fail if the process ends."""
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                line = self._lines.get(timeout=max(deadline - time.monotonic(), 0))
            except queue.Empty:
                line = None
            if line is None:
                self._lines.put(None)
                raise AssertionError(f"no {part!r} in:\n{self.all_output()}")
            self.output.append(line)
            if part in line:
                return line

    def say(self, line: str) -> None:
        """Send a line of input."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(f"{line}\n")
        self._popen.stdin.flush()

    def end(self, number: signal.Signals | None = None) -> int:
        """Send a signal, if given, and wait for the end of the process.

        Return its exit status, which is negative for a signal.
        """
        if number is not None:
            self._popen.send_signal(number)
        status = self._popen.wait(TIMEOUT)
        for reader in self._readers:
            reader.join(TIMEOUT)
        while (line := self._lines.get()) is not None:
            self.output.append(line)
        self._lines.put(None)
        return status

    def all_output(self) -> str:
        """Return the output so far, for the message of a failure."""
        return "\n".join([*self.output, *self.errors])

    def close(self) -> None:
        """Kill the process if it still runs, and close its streams."""
        if self._popen.poll() is None:
            self._popen.kill()
        self._popen.wait(TIMEOUT)
        for reader in self._readers:
            reader.join(TIMEOUT)
        for stream in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            assert stream is not None
            stream.close()


@contextmanager
def started(
    dsn: str, *arguments: str, settings: Mapping[str, Any] | None = None
) -> Iterator[Process]:
    """Run `python` with these arguments in development mode until the block ends."""
    process = Process(
        subprocess.Popen(
            [sys.executable, "-X", "dev", *arguments],
            cwd=ROOT,
            env={**environment(dsn, settings), "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    )
    try:
        yield process
    finally:
        process.close()


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Poll `condition` until it holds, if there is no event to wait for."""
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < deadline, f"still not: {what}"
        time.sleep(0.02)
