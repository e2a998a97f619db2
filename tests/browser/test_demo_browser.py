"""The demo in a real browser, with one page on each of two server processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from example import commands
from example.demo import HOST, choose_ports
from tests.components import require_executable, require_module

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = [pytest.mark.browser, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 30.0
DESKTOP = (1100, 760)
PHONE = (390, 844)
CONNECTED = "#status[data-state=open]"

OpenPage = Callable[..., "Page"]


class Server:
    """A server process of the demo that can be stopped and started again."""

    def __init__(self, name: str, port: int, other_port: int, dsn: str) -> None:
        self.name = name
        self.port = port
        self._environment = environment(
            dsn, DEMO_NAME=name, DEMO_OTHER_URL=f"http://{HOST}:{other_port}", PYTHONUNBUFFERED="1"
        )
        self._process: subprocess.Popen[str] | None = None

    def url(self, room: str = "") -> str:
        return f"http://{HOST}:{self.port}/{room}"

    @property
    def pid(self) -> str:
        assert self._process is not None
        return str(self._process.pid)

    def start(self) -> None:
        """Start the process and wait until it listens."""
        self._process = subprocess.Popen(
            [sys.executable, *commands.serve(HOST, self.port)[1:]],
            cwd=ROOT,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert self._process.stdout is not None
        output = ""
        for line in self._process.stdout:
            output += line
            if "running on http" in line:
                return
        pytest.fail(f"{self.name} did not start:\n{output}")

    def kill(self) -> None:
        """Kill the process, which cannot close its layer."""
        assert self._process is not None
        with self._process as process:
            process.kill()
            process.communicate(timeout=TIMEOUT)
        self._process = None

    def stop(self) -> None:
        if self._process is None:
            return
        with self._process as process:
            process.terminate()
            try:
                process.communicate(timeout=TIMEOUT)
            finally:
                process.kill()
        self._process = None


def environment(dsn: str, **more: str) -> dict[str, str]:
    return os.environ | {"PG_LAYER_DSN": dsn, "DJANGO_SETTINGS_MODULE": "example.settings"} | more


@pytest.fixture
def servers(fresh_database: str) -> Iterator[tuple[Server, Server]]:
    """Yield server A and server B on one new database."""
    subprocess.run(
        [sys.executable, *commands.MIGRATE[1:]],
        cwd=ROOT,
        env=environment(fresh_database),
        stdout=subprocess.DEVNULL,
        check=True,
    )
    one, two = choose_ports(0, 2)
    with ExitStack() as stack:
        both = (
            Server("server A", one, two, fresh_database),
            Server("server B", two, one, fresh_database),
        )
        for server in both:
            stack.callback(server.stop)
            server.start()
        yield both


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    playwright = require_module("playwright.sync_api", component="browser")
    chromium = require_executable(
        "chromium", "chromium-browser", "google-chrome", component="browser"
    )
    with playwright.sync_playwright() as running:
        browser: Browser = running.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[OpenPage]:
    """Yield a function that opens a connected page with a new profile.

    A script error in any page fails the test.
    """
    errors: list[str] = []
    with ExitStack() as stack:

        def open_page(url: str, name: str, size: tuple[int, int] = DESKTOP) -> Page:
            is_phone = size == PHONE
            context = browser.new_context(
                viewport={"width": size[0], "height": size[1]},
                device_scale_factor=2 if is_phone else 1,
                is_mobile=is_phone,
                has_touch=is_phone,
                locale="en-GB",
            )
            stack.callback(context.close)
            context.add_init_script(f"sessionStorage.setItem('name', {json.dumps(name)})")
            page = context.new_page()
            page.set_default_timeout(TIMEOUT * 1000)
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(url)
            page.wait_for_selector(CONNECTED)
            return page

        yield open_page
    assert errors == []


@pytest.fixture
def screenshots(tmp_path: Path) -> Path:
    """Return the folder for screenshots."""
    folder = Path(os.environ.get("PG_LAYER_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def announce(page: Page, text: str, button: str = "Announce") -> None:
    page.fill("#announcement", text)
    page.get_by_role("button", name=button, exact=True).click()


def expect_text(page: Page, selector: str, text: str) -> None:
    page.wait_for_function(
        "([selector, text]) => document.querySelector(selector).textContent === text",
        arg=[selector, text],
    )


def say(page: Page, text: str) -> None:
    page.fill("#text", text)
    page.press("#text", "Enter")


def hear(page: Page, author: str, text: str) -> str:
    """Wait for a message and return the path that the page shows for it."""
    message = page.locator(f".message[data-author={author!r}]").filter(has_text=text)
    return str(message.locator(".path").inner_text())


def test_browser_pages_on_two_processes_talk(
    servers: tuple[Server, Server], open_page: OpenPage, screenshots: Path
) -> None:
    a, b = servers
    ann = open_page(a.url(), "Ann")
    bob = open_page(b.url(), "Bob", PHONE)
    assert ann.inner_text("#server") == f"server A process {a.pid}"
    assert bob.inner_text("#server") == f"server B process {b.pid}"
    ann.wait_for_selector(".notice[data-kind=joined]:has-text('Bob joined through server B')")

    say(ann, "Hello from here. Can you hear me over there?")
    assert hear(bob, "Ann", "Hello from here") == "sent through server A · shown by server B"
    say(bob, "Loud and clear, and through nothing but PostgreSQL.")
    assert hear(ann, "Bob", "Loud and clear") == "sent through server B · shown by server A"
    assert hear(bob, "Bob", "Loud and clear") == "sent through server B · shown by server B"

    ann.screenshot(path=screenshots / "chat-desktop.png")
    bob.screenshot(path=screenshots / "chat-phone.png")

    bob.fill("#name", "Robert")
    bob.press("#name", "Enter")
    ann.wait_for_selector(".notice[data-kind=renamed]:has-text('Bob is now Robert')")
    say(bob, "Call me Robert")
    assert hear(ann, "Robert", "Call me Robert") == "sent through server B · shown by server A"


def test_browser_page_reconnects_when_its_server_restarts(
    servers: tuple[Server, Server], open_page: OpenPage, screenshots: Path
) -> None:
    a, b = servers
    ann = open_page(a.url(), "Ann")
    bob = open_page(b.url(), "Bob")
    before = b.pid

    b.stop()
    ann.wait_for_selector(".notice[data-kind=left]:has-text('Bob')")
    bob.wait_for_selector("#status:not([data-state=open])")
    bob.fill("#text", "kept while the server is away")
    assert bob.is_disabled("#send")
    bob.press("#text", "Enter")
    bob.screenshot(path=screenshots / "chat-server-away.png")

    b.start()
    bob.wait_for_selector(CONNECTED)
    bob.wait_for_selector(".notice[data-kind=gap]")
    assert bob.get_attribute("#server", "data-pid") == b.pid != before
    ann.wait_for_selector(".notice[data-kind=joined]:has-text('Bob')")
    bob.click("#send")
    assert (
        hear(ann, "Bob", "kept while the server is away")
        == "sent through server B · shown by server A"
    )
    say(ann, "Welcome back")
    assert hear(bob, "Ann", "Welcome back") == "sent through server A · shown by server B"


def test_browser_text_of_others_is_escaped(
    servers: tuple[Server, Server], open_page: OpenPage
) -> None:
    a, b = servers
    markup = '<img src=x onerror="document.title = 1">'
    ann = open_page(a.url("safe/"), "<b>Ann</b>")
    bob = open_page(b.url("safe/"), "Bob", PHONE)
    say(ann, "   ")
    say(ann, markup)
    say(ann, "wide" * 200)
    hear(bob, "<b>Ann</b>", "wide")
    assert bob.locator(".message").count() == 2
    assert bob.locator(".text").first.inner_text() == markup
    assert bob.locator("img, .author b, .notice b").count() == 0
    assert bob.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_browser_committed_announcement_is_shown_and_rolled_back_is_not(
    servers: tuple[Server, Server], open_page: OpenPage, screenshots: Path
) -> None:
    a, b = servers
    ann = open_page(a.url("square/"), "Ann")
    bob = open_page(b.url("square/"), "Bob", PHONE)
    expect_text(ann, "#saved", "0 saved")

    announce(ann, "never to be seen", "…and roll back")
    ann.wait_for_selector("#outcome:has-text('Rolled back')")
    assert ann.inner_text("#saved") == "0 saved"
    assert ann.input_value("#announcement") == "never to be seen"

    announce(ann, "<b>The bridge is open</b>")
    for page, server in ((ann, "server A"), (bob, "server B")):
        path = page.locator(".announcement", has_text="<b>The bridge is open</b>").locator(".path")
        assert path.inner_text() == f"saved as row 2 · sent through server A · shown by {server}"
        expect_text(page, "#saved", "1 saved")
    ann.wait_for_selector("#outcome:has-text('Committed')")
    assert ann.input_value("#announcement") == ""

    bob.fill("#announcement", "from the other side")
    bob.press("#announcement", "Enter")
    for page in (ann, bob):
        page.wait_for_selector(".announcement:has-text('from the other side')")
        expect_text(page, "#saved", "2 saved")
        assert page.locator(".announcement").count() == 2
        assert page.get_by_text("never to be seen").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ann.screenshot(path=screenshots / "announcements-desktop.png")
    bob.screenshot(path=screenshots / "announcements-phone.png")
    ann.emulate_media(color_scheme="dark")
    ann.screenshot(path=screenshots / "announcements-dark.png")


def test_browser_announcement_works_without_scripts(
    servers: tuple[Server, Server], browser: Browser, open_page: OpenPage, screenshots: Path
) -> None:
    a, b = servers
    bob = open_page(b.url("plain/"), "Bob")
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.set_default_timeout(TIMEOUT * 1000)
    page.goto(a.url("plain/"))
    announce(page, "never to be seen", "…and roll back")
    page.wait_for_selector("#outcome:has-text('Rolled back')")
    assert page.inner_text("#saved") == "0 saved"
    announce(page, "Without a script")
    page.wait_for_selector("#outcome:has-text('Committed')")
    assert page.inner_text("#saved") == "1 saved"
    page.screenshot(path=screenshots / "announcements-no-script.png")
    bob.wait_for_selector(".announcement:has-text('Without a script')")
    assert bob.locator(".announcement").count() == 1
    context.close()


def test_browser_member_count_follows_joins_leaves_and_kills(
    servers: tuple[Server, Server], open_page: OpenPage
) -> None:
    a, b = servers
    ann = open_page(a.url("count/"), "Ann")
    expect_text(ann, "#here", "1 here")
    bob = open_page(b.url("count/"), "Bob", PHONE)
    cid = open_page(b.url("count/"), "Cid")
    for page in (ann, bob, cid):
        expect_text(page, "#here", "3 here")
    cid.close()
    for page in (ann, bob):
        expect_text(page, "#here", "2 here")

    b.kill()
    bob.wait_for_selector("#status:not([data-state=open])")
    expect_text(bob, "#here", "")
    expect_text(ann, "#here", "1 here")
    assert ann.locator(".notice[data-kind=left]").count() == 1

    b.start()
    bob.wait_for_selector(CONNECTED)
    for page in (ann, bob):
        expect_text(page, "#here", "2 here")


def test_browser_empty_room_links_to_the_other_server(
    servers: tuple[Server, Server], open_page: OpenPage, screenshots: Path
) -> None:
    a, b = servers
    ann = open_page(a.url("kitchen/"), "Ann", PHONE)
    ann.screenshot(path=screenshots / "chat-empty.png")
    with ann.expect_popup() as popup:
        ann.click("#other")
    other = popup.value
    assert other.url == b.url("kitchen/")
    other.wait_for_selector(CONNECTED)
    assert other.get_attribute("#server", "data-name") == "server B"
    say(other, "Found it")
    assert (
        hear(ann, other.input_value("#name"), "Found it")
        == "sent through server B · shown by server A"
    )
