"""The demo, started like its users do: one command, two servers, one chat."""

from __future__ import annotations

import html
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import HTTPCookieProcessor, ProxyHandler, Request, build_opener

import psutil
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Origin

from devtools.postgres import PostgresServer

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = re.compile(r"^ +(server [AB]): (http://127\.0\.0\.1:\d+)/$")
TIMEOUT = 30.0

pytestmark = pytest.mark.slow


@dataclass
class RunningDemo:
    """A running `python -m example.demo`, and its output until both servers answered."""

    process: subprocess.Popen[str]
    addresses: dict[str, str]
    output: str

    def descendants(self) -> list[psutil.Process]:
        found: list[psutil.Process] = psutil.Process(self.process.pid).children(recursive=True)
        return found

    def child(self, *words: str) -> psutil.Process:
        """Return the one process of the demo whose command line contains all `words`."""
        [found] = (
            process for process in self.descendants() if set(words) <= set(command_line(process))
        )
        return found

    def postgres_folder(self) -> Path:
        """Return the temporary folder of the demo's PostgreSQL server."""
        [postmaster] = (
            process
            for process in psutil.Process(self.process.pid).children()
            if Path(process.cmdline()[0]).name == "postgres"
        )
        command = postmaster.cmdline()
        return Path(command[command.index("-D") + 1]).parent

    def end(self, signum: signal.Signals) -> tuple[int, str]:
        """Send a signal; return the exit status and the rest of the output."""
        self.process.send_signal(signum)
        return self.wait()

    def wait(self) -> tuple[int, str]:
        rest, _ = self.process.communicate(timeout=TIMEOUT)
        return self.process.returncode, rest

    @contextmanager
    def chat(self, server: str, name: str, path: str = "/ws/lobby/") -> Iterator[Chat]:
        """Yield a connection to the chat that has received its welcome."""
        address = self.addresses[server]
        url = f"{address.replace('http', 'ws', 1)}{path}?{urlencode({'name': name})}"
        with connect(url, origin=Origin(address), open_timeout=TIMEOUT) as connection:
            chat = Chat(connection)
            chat.welcome = chat.next("welcome")
            yield chat


def command_line(process: psutil.Process) -> list[str]:
    """Return the command and arguments of a process, or none if it has ended.

    Processes of PostgreSQL end while they are listed.
    """
    try:
        words: list[str] = process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return []
    return words


class Chat:
    """A client of the chat, like a browser."""

    welcome: dict[str, Any]

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    def say(self, text: str) -> None:
        self.connection.send(json.dumps({"type": "say", "text": text}))

    def next(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Return the next event of that kind with those fields; skip earlier events."""
        while True:
            event: dict[str, Any] = json.loads(self.connection.recv(timeout=TIMEOUT))
            if event["type"] == kind and fields.items() <= event.items():
                return event


@contextmanager
def running_demo(*arguments: str, **environment: str) -> Iterator[RunningDemo]:
    """Yield the demo when both servers answer; kill it if the test has not ended it."""
    inherited = {name: value for name, value in os.environ.items() if name != "PG_LAYER_DSN"}
    with subprocess.Popen(
        [sys.executable, "-m", "example.demo", *(arguments or ("--port", "0"))],
        cwd=ROOT,
        env=inherited | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield _wait_for_addresses(process)
        finally:
            process.kill()


def _wait_for_addresses(process: subprocess.Popen[str]) -> RunningDemo:
    assert process.stdout is not None
    addresses: dict[str, str] = {}
    output = ""
    for line in process.stdout:
        output += line
        if match := ADDRESS.match(line):
            addresses[match[1]] = match[2]
        if len(addresses) == 2:
            return RunningDemo(process, addresses, output)
    pytest.fail(f"the demo ended with status {process.wait()}:\n{output}")


@pytest.fixture(scope="module")
def demo() -> Iterator[RunningDemo]:
    """Yield one demo for all tests that do not end it."""
    with running_demo() as running:
        yield running
        running.end(signal.SIGTERM)


class Page:
    """The page of a room in a browser without scripts, which keeps cookies and posts the form."""

    def __init__(self, address: str, path: str = "/") -> None:
        self.url = f"{address}{path}"
        self._open = build_opener(ProxyHandler({}), HTTPCookieProcessor()).open
        self.load()

    def load(self) -> None:
        self._show(Request(self.url))

    def announce(self, text: str, **more: str) -> int:
        """Post the form and return the status of the next page."""
        [token] = re.findall(r'name="csrfmiddlewaretoken" value="(\w+)"', self.text)
        body = urlencode({"csrfmiddlewaretoken": token, "text": text, **more}).encode()
        return self._show(Request(self.url, body))

    def _show(self, request: Request) -> int:
        try:
            response = self._open(request, timeout=TIMEOUT)
        except urllib.error.HTTPError as error:
            response = error
        with response:
            self.text: str = response.read().decode()
            status: int = response.status
            return status

    def says(self, id: str) -> str:
        """Return the text of the element with that id."""
        [text] = re.findall(rf'id="{id}">([^<]*)<', self.text)
        return html.unescape(text)


def get(url: str, **headers: str) -> tuple[int, str]:
    """Return status and text of a page."""
    opener = build_opener(ProxyHandler({}))  # local servers have no proxy
    try:
        with opener.open(Request(url, headers=headers), timeout=TIMEOUT) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def test_demo_message_reaches_clients_of_the_other_server(demo: RunningDemo) -> None:
    with demo.chat("server A", "Ann") as ann, demo.chat("server B", "Bob") as bob:
        assert ann.welcome["by"]["name"] == "server A"
        assert bob.welcome["by"]["name"] == "server B"
        assert ann.welcome["by"]["pid"] != bob.welcome["by"]["pid"]
        ann.next("joined", name="Bob")

        ann.say("  hello <b>there</b>\n")
        heard = bob.next("message")
        assert (heard["text"], heard["name"], heard["mine"]) == ("hello <b>there</b>", "Ann", False)
        assert (heard["via"], heard["by"]) == (ann.welcome["by"], bob.welcome["by"])

        bob.say("hello yourself")
        heard = ann.next("message", name="Bob")
        assert (heard["via"], heard["by"]) == (bob.welcome["by"], ann.welcome["by"])
        assert bob.next("message", name="Bob")["mine"] is True


def test_demo_messages_of_one_author_arrive_once_and_in_order(demo: RunningDemo) -> None:
    with (
        demo.chat("server A", "Ann", "/ws/order/") as ann,
        demo.chat("server B", "Bob", "/ws/order/") as bob,
    ):
        texts = [str(number) for number in range(100)]
        for text in texts:
            ann.say(text)
        for reader in (ann, bob):
            assert [reader.next("message")["text"] for _ in texts] == texts
        bob.say("the end")
        for reader in (ann, bob):
            assert reader.next("message")["text"] == "the end"


def test_demo_joins_leaves_and_renames_are_shown(demo: RunningDemo) -> None:
    with demo.chat("server A", "Ann", "/ws/hall/") as ann:
        with demo.chat("server B", "Bob", "/ws/hall/") as bob:
            assert ann.next("joined", name="Bob")["via"] == bob.welcome["by"]
            bob.connection.send(json.dumps({"type": "rename", "name": "Robert"}))
            assert ann.next("renamed")["before"] == "Bob"
        assert ann.next("left")["name"] == "Robert"


def test_demo_client_that_leaves_during_delivery_is_reported(demo: RunningDemo) -> None:
    with demo.chat("server A", "Ann", "/ws/rush/") as ann:
        for number in range(20):
            with demo.chat("server B", f"Bob {number}", "/ws/rush/") as bob:
                for text in ("one", "two", "three"):
                    bob.say(text)
            ann.next("left", name=f"Bob {number}")


def test_demo_rooms_are_separate(demo: RunningDemo) -> None:
    with (
        demo.chat("server A", "Ann", "/ws/one/") as one,
        demo.chat("server B", "Bob", "/ws/two/") as two,
        demo.chat("server B", "Cid", "/ws/one/") as listener,
    ):
        one.say("in one")
        assert listener.next("message")["text"] == "in one"
        two.say("in two")
        assert two.next("message")["text"] == "in two"


@pytest.mark.parametrize(
    "frame",
    [
        "{",
        "",
        "null",
        "[]",
        '"text"',
        "{}",
        '{"type": "say"}',
        '{"type": "say", "text": 1}',
        '{"type": "rename", "name": []}',
        '{"type": "chat.message", "text": "forged"}',
        "[" * 100_000,
        b"\x00\xff",
    ],
    ids=lambda frame: repr(frame)[:40],
)
def test_demo_invalid_frame_is_answered_and_connection_stays(
    demo: RunningDemo, frame: str | bytes
) -> None:
    with demo.chat("server A", "Ann", "/ws/nonsense/") as ann:
        ann.connection.send(frame)
        ann.next("error")
        ann.say("still here")
        assert ann.next("message")["text"] == "still here"


def test_demo_texts_and_names_are_trimmed(demo: RunningDemo) -> None:
    with demo.chat("server B", " ", "/ws/limits/") as nameless:
        assert nameless.welcome["name"] == "somebody"
        nameless.say(" \n ")
        nameless.say("x" * 5000)
        assert nameless.next("message")["text"] == "x" * 1000
        nameless.connection.send('{"type": "say", "text": "half \\ud800 a pair"}')
        assert nameless.next("message")["text"] == "half ? a pair"
    with demo.chat("server A", "Ann\n the " + "very " * 20, "/ws/limits/") as ann:
        assert ann.welcome["name"] == "Ann the very very very v"


def test_demo_page_names_its_process_and_room(demo: RunningDemo) -> None:
    for server, other in (("server A", "server B"), ("server B", "server A")):
        status, page = get(f"{demo.addresses[server]}/kitchen/")
        assert status == 200
        assert f'data-name="{server}"' in page
        assert f'href="{demo.addresses[other]}/kitchen/"' in page
        assert '<script id="room" type="application/json">"kitchen"</script>' in page
    assert '"lobby"</script>' in get(demo.addresses["server A"])[1]
    assert get(f"{demo.addresses['server A']}/no.such.page")[0] == 404


def test_demo_foreign_origins_are_refused(demo: RunningDemo) -> None:
    address = demo.addresses["server A"]
    assert get(address, Host="evil.example")[0] == 400
    with (
        pytest.raises(InvalidStatus, match="403"),
        connect(
            f"{address.replace('http', 'ws', 1)}/ws/lobby/", origin=Origin("http://evil.example")
        ),
    ):
        pass


def test_demo_announcement_is_saved_and_reaches_both_processes(demo: RunningDemo) -> None:
    page = Page(demo.addresses["server A"], "/square/")
    assert page.says("saved") == "0 saved"
    with (
        demo.chat("server A", "Ann", "/ws/square/") as ann,
        demo.chat("server B", "Bob", "/ws/square/") as bob,
    ):
        assert bob.welcome["saved"] == 0
        assert page.announce(" The bridge is <open>. ") == 200
        for member in (ann, bob):
            heard = member.next("announcement")
            assert (heard["text"], heard["saved"]) == ("The bridge is <open>.", 1)
            assert (heard["via"], heard["by"]) == (ann.welcome["by"], member.welcome["by"])
    assert page.says("saved") == "1 saved"
    assert page.says("outcome").startswith("Committed:")
    assert Page(demo.addresses["server B"], "/square/").says("saved") == "1 saved"
    with demo.chat("server B", "Cid", "/ws/square/") as cid:
        assert cid.welcome["saved"] == 1


def test_demo_rolled_back_announcement_is_neither_saved_nor_sent(demo: RunningDemo) -> None:
    page = Page(demo.addresses["server A"], "/tower/")
    with (
        demo.chat("server A", "Ann", "/ws/tower/") as ann,
        demo.chat("server B", "Bob", "/ws/tower/") as bob,
    ):
        assert page.announce("never", roll_back="yes") == 200
        assert page.says("outcome").startswith("Rolled back")
        assert page.says("saved") == "0 saved"
        assert page.announce("after it") == 200
        for member in (ann, bob):
            heard = member.next("announcement")
            assert (heard["text"], heard["saved"]) == ("after it", 1)


def test_demo_form_requires_a_text_and_its_own_page(demo: RunningDemo) -> None:
    page = Page(demo.addresses["server B"], "/gate/")
    for text in ("", "  ", "x" * 201, "\0"):
        assert page.announce(text) == 400
        assert page.says("saved") == "0 saved"
    page.load()
    assert page.announce("from elsewhere", csrfmiddlewaretoken="x" * 64) == 403
    page.load()
    assert page.says("saved") == "0 saved"


def test_demo_member_count_is_shown_to_all(demo: RunningDemo) -> None:
    with demo.chat("server A", "Ann", "/ws/count/") as ann:
        assert ann.next("joined", name="Ann")["here"] == 1
        with demo.chat("server B", "Bob", "/ws/count/") as bob:
            assert ann.next("joined", name="Bob")["here"] == 2
            assert bob.next("joined", name="Bob")["here"] == 2
            bob.connection.send('{"type": "count"}')
            assert bob.next("here")["count"] == 2
        assert ann.next("left", name="Bob")["here"] == 1


@pytest.mark.parametrize(
    "signum", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda each: each.name
)
def test_demo_ended_leaves_nothing_behind(signum: signal.Signals) -> None:
    with running_demo() as demo:
        folder = demo.postgres_folder()
        left = demo.descendants()
        assert len(left) >= 4
        with demo.chat("server A", "Ann"), demo.chat("server B", "Bob"):
            status, output = demo.end(signum)
        assert status == (-signum if signum == signal.SIGKILL else 0), output
        assert "Traceback" not in output
        _, alive = psutil.wait_procs(left, timeout=TIMEOUT)
        assert alive == []
        assert not folder.exists()


def test_demo_server_process_dies_is_reported_and_ends_the_demo() -> None:
    with running_demo() as demo:
        left = demo.descendants()
        port = demo.addresses["server B"].rpartition(":")[2]
        demo.child("uvicorn", port).kill()
        status, output = demo.wait()
        assert status == 1
        assert "server B ended by SIGKILL. Its last output:" in output
        assert (
            f"Uvicorn running on {demo.addresses['server B']}"
            in output.partition("Its last output:")[2]
        )
        assert psutil.wait_procs(left, timeout=TIMEOUT)[1] == []


def test_demo_postgresql_dies_is_reported_and_ends_the_demo() -> None:
    with running_demo() as demo:
        left = demo.descendants()
        [postmaster] = (
            process
            for process in psutil.Process(demo.process.pid).children()
            if process.name() == "postgres"
        )
        postmaster.kill()
        status, output = demo.wait()
        assert status == 1
        assert "PostgreSQL ended. Its log ends with:" in output
        assert psutil.wait_procs(left, timeout=TIMEOUT)[1] == []


def test_demo_given_database_and_ports_in_use() -> None:
    with (
        PostgresServer(fsync=False) as server,
        socket.create_server(("127.0.0.1", 0)) as taken,
    ):
        port = taken.getsockname()[1]
        with running_demo("--port", str(port), PG_LAYER_DSN=server.create_database("mine")) as demo:
            ports = [int(address.rpartition(":")[2]) for address in demo.addresses.values()]
            assert port < ports[0] < ports[1]
            assert demo.end(signal.SIGINT)[0] == 0
        tables = "SELECT to_regclass('pg_layer_message'), to_regclass('example_announcement')"
        assert server.execute(tables, dbname="mine") == [
            ("pg_layer_message", "example_announcement")
        ]


def test_demo_chat_continues_after_a_restart_of_postgresql() -> None:
    with (
        PostgresServer(fsync=False) as server,
        running_demo(PG_LAYER_DSN=server.create_database("chat")) as demo,
    ):
        with demo.chat("server A", "Ann") as ann, demo.chat("server B", "Bob") as bob:
            ann.say("before")
            assert bob.next("message")["text"] == "before"
            server.restart()
            ann.say("after")
            assert bob.next("message")["text"] == "after"
            bob.say("indeed")
            assert ann.next("message", name="Bob")["text"] == "indeed"
        assert demo.end(signal.SIGINT)[0] == 0


@pytest.mark.parametrize(
    ("dsn", "complaint"),
    [
        ("", "Set PG_LAYER_DSN to a PostgreSQL database"),
        ("no dsn", "PG_LAYER_DSN is no connection string that libpq understands"),
    ],
)
def test_demo_settings_invalid_dsn_is_explained(dsn: str, complaint: str) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "example.manage", "check"],
        cwd=ROOT,
        env=os.environ | {"PG_LAYER_DSN": dsn, "DJANGO_SETTINGS_MODULE": "example.settings"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert complaint in result.stderr
