"""The tutorial, followed to the letter: every command and every listing of the page.

A listing is written to the file that the sentence above it names, and a command runs in a shell.
Only two things differ for the reader: the ports, because others may be in use, and `pip`, which
finds the packages of this environment instead of a network.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from http.cookiejar import CookieJar
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, ProxyHandler, build_opener

import pytest
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

from devtools.postgres import PostgresServer
from devtools.postgres.server import free_port

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial" / "chat.md"
TESTING = ROOT / "docs" / "how-to" / "testing.md"
TIMEOUT = 60.0
BACKGROUND = ("uvicorn", "python manage.py runworker", "python manage.py pg_layer_sweep")

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Block(NamedTuple):
    """A fenced block, and the sentence above it."""

    sentence: str
    language: str
    text: str


def blocks() -> list[Block]:
    page = PAGE.read_text(encoding="utf-8")
    fence = r"(?:^|\n\n)([^\n]+(?:\n[^\n]+)*)\n\n```(\w+)\n(.*?)```"
    found = [Block(*each) for each in re.findall(fence, page, re.DOTALL)]
    following = re.findall(r"```\n\n```(\w+)\n(.*?)```", page, re.DOTALL)
    assert len(found) + len(following) == page.count("\n```") // 2
    places = {block.text: page.index(block.text) for block in found}
    found += [Block("", *each) for each in following]
    return sorted(found, key=lambda block: places.get(block.text, page.index(block.text)))


class Reader:
    """Somebody who follows the page in an empty folder."""

    def __init__(self, folder: Path, server: PostgresServer) -> None:
        self.folder = folder
        self.ports = {"8001": str(free_port()), "8002": str(free_port())}
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PG", "DJANGO", "PYTHON", "PIP", "VIRTUAL"))
        }
        path = [folder / ".venv" / "bin", Path(sys.executable).parent, server.binaries]
        self.environment = kept | {
            "PATH": os.pathsep.join([*map(str, path), kept["PATH"]]),
            # The page's server listens on PostgreSQL's port.
            "PGPORT": str(server.port),
            "PGPASSWORD": server.password,
            "PIP_NO_INDEX": "1",
            "PYTHONUNBUFFERED": "1",
        }
        self.running: dict[str, subprocess.Popen[str]] = {}

    def write(self, sentence: str, text: str) -> None:
        """Write a listing to the file that the sentence names."""
        (name,) = re.findall(r"`([\w./]+/[\w./]+\.\w+)`", sentence.rsplit(". ", 1)[-1])
        path = self.folder / name
        if "At the end of" in sentence:
            text = path.read_text() + text
        assert path.exists() or "Create" in sentence, sentence
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(self, command: str) -> str:
        """Run a command in a shell and return its output."""
        result = subprocess.run(
            ["bash", "-c", command],
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=240,
        )
        assert result.returncode == 0, f"{command}\n{result.stdout}"
        if "venv" in command and "activate" not in command:
            self._share_packages()
        return result.stdout

    def start(self, command: str) -> None:
        """Start a command in the background, as in a terminal of its own."""
        for documented, port in self.ports.items():
            command = command.replace(documented, port)
        self.running[command] = subprocess.Popen(
            command.split(),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def wait_for(self, words: str, line: str) -> None:
        """Wait until the background command that contains `words` prints a line."""
        (process,) = (each for command, each in self.running.items() if words in command)
        assert process.stdout is not None
        output = []
        for printed in process.stdout:
            output.append(printed)
            if line in printed:
                return
        pytest.fail("".join(output))

    def stop(self, words: str) -> int:
        """Press Ctrl-C in the terminal of a command, and return its exit status."""
        (command,) = (command for command in self.running if words in command)
        process = self.running.pop(command)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=TIMEOUT)
        return process.returncode

    def follow(self, steps: Iterable[Block]) -> dict[str, str]:
        """Take steps of the page. Return the output of each command that ends by itself."""
        outputs = {}
        for block in steps:
            if block.language == "text":  # what a command prints
                continue
            if block.language != "sh":
                self.write(" ".join(block.sentence.split()), block.text)
                continue
            for command in re.split(r"(?<!\\)\n", block.text.rstrip()):
                if command.startswith(BACKGROUND):
                    self.start(command)
                else:
                    outputs[command] = self.run(command)
        return outputs

    def end(self) -> None:
        for process in self.running.values():
            process.kill()
            process.communicate()

    def _share_packages(self) -> None:
        """Let the new environment find the packages of this one, as pip would install them."""
        (packages,) = (self.folder / ".venv").glob("lib/python*/site-packages")
        ours = sysconfig.get_path("purelib")
        (packages / "ours.pth").write_text(f"import site; site.addsitedir({ours!r})\n")


class Browser:
    """A browser on the page of one server."""

    def __init__(self, port: str, stack: ExitStack) -> None:
        self.url = f"http://127.0.0.1:{port}/"
        self.cookies = CookieJar()
        self.opener = build_opener(ProxyHandler({}), HTTPCookieProcessor(self.cookies))
        self.page = self.opener.open(self.url, timeout=TIMEOUT).read().decode()
        self.socket: ClientConnection = stack.enter_context(
            connect(
                f"ws://127.0.0.1:{port}/ws/",
                origin=Origin(self.url.rstrip("/")),
                open_timeout=TIMEOUT,
                proxy=None,
            )
        )

    def send(self, text: str) -> None:
        self.socket.send(json.dumps({"text": text}))

    def hear(self) -> dict[str, Any]:
        heard: dict[str, Any] = json.loads(self.socket.recv(timeout=TIMEOUT))
        return heard

    def post(self, **fields: str) -> str:
        """Send the form and return the page that follows."""
        (token,) = (cookie.value for cookie in self.cookies if cookie.name == "csrftoken")
        (field,) = re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', self.page)
        assert token
        data = urlencode({"csrfmiddlewaretoken": field, **fields}).encode()
        text: str = self.opener.open(self.url, data, timeout=TIMEOUT).read().decode()
        return text


@contextmanager
def reading(folder: Path) -> Iterator[Reader]:
    """Yield a reader with a new PostgreSQL server."""
    with PostgresServer() as server:
        reader = Reader(folder, server)
        try:
            yield reader
        finally:
            reader.end()


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    with reading(tmp_path) as reader:
        yield reader


def use(reader: Reader) -> None:
    """Do what the page describes under "Run it", with two browsers."""
    for port in reader.ports.values():
        reader.wait_for(f"--port {port}", "Uvicorn running on")
    with ExitStack() as stack:
        first, second = (Browser(port, stack) for port in reader.ports.values())
        processes = {}
        first.send("Hello")
        for browser in (first, second):
            heard = browser.hear()
            assert heard["text"] == "Hello"
            processes[browser] = heard["process"]
        assert processes[first] != processes[second]

        assert "Dinner is ready" in first.post(text="Dinner is ready")
        for browser in (first, second):
            expected = {"Dinner is ready", "That was announcement number 1."}
            assert {browser.hear()["text"] for _ in expected} == expected

        # Nothing arrives for the announcement that is rolled back: the next one comes first.
        assert "Never" not in first.post(text="Never", roll_back="yes")
        assert reader.stop("runworker") == 0
        second.post(text="Lunch")
        second.post(text="Supper")
        for browser in (first, second):
            assert [browser.hear()["text"] for _ in range(2)] == ["Lunch", "Supper"]
        reader.start("python manage.py runworker tasks")
        for browser in (first, second):
            numbers = [f"That was announcement number {number}." for number in (2, 3)]
            assert [browser.hear()["text"] for _ in numbers] == numbers

        (from_sql,) = (block for block in blocks() if "Hello from SQL" in block.text)
        reader.follow([from_sql])
        for browser in (first, second):
            assert browser.hear()["text"] == "Hello from SQL"


def until_it_runs() -> tuple[list[Block], list[Block]]:
    """Return the steps up to the last command that stays in the foreground, and the others."""
    steps = blocks()
    last = max(i for i, block in enumerate(steps) if block.text.startswith(BACKGROUND))
    return steps[: last + 1], steps[last + 1 :]


def test_tutorial_followed_to_the_letter_builds_the_chat(reader: Reader) -> None:
    first, others = until_it_runs()
    outputs = reader.follow(first)
    use(reader)
    outputs |= reader.follow(others)

    assert "no issues" in outputs["python manage.py check --database default"]
    status = outputs["python manage.py pg_layer_status"]
    assert status.startswith("ok\n"), status
    assert re.search(r"Clients: [34] live", status), status
    assert "Ran 2 tests" in outputs["python manage.py test"]
    for command in list(reader.running):
        assert reader.stop(command) == 0, command


def test_examples_of_the_testing_page_pass_in_the_project_of_the_tutorial(reader: Reader) -> None:
    """Each is a file of its own, with its own imports, for Django's runner and for pytest."""
    until_migrated = (block for block in blocks() if not block.text.startswith(BACKGROUND))
    reader.follow(
        itertools.takewhile(lambda block: "Hello from SQL" not in block.text, until_migrated)
    )
    if importlib.util.find_spec("daphne") is None:
        # Imported by channels.testing, for a class that these tests do not need.
        (reader.folder / "daphne").mkdir()
        (reader.folder / "daphne" / "__init__.py").touch()
        (reader.folder / "daphne" / "testing.py").write_text("DaphneProcess = None")
    page = TESTING.read_text(encoding="utf-8")
    (settings,) = re.findall(r"```toml\n(.*?)```", page, re.DOTALL)
    (reader.folder / "pyproject.toml").write_text(settings)
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for number, example in enumerate(examples):
        # A communicator waits for a second, which a busy machine may exceed.
        patient = re.sub(r"\.(connect|receive_json_from)\(\)", rf".\1(timeout={TIMEOUT})", example)
        (reader.folder / "chat" / f"test_{number}.py").write_text(patient)
    assert "Ran 5 tests" in reader.run("python -W error manage.py test")
    output = reader.run("python -m pytest -p no:cacheprovider")
    assert "6 passed" in output, output
