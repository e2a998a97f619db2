"""The page of the tutorial in a real browser: its script, its form and its two servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.components import require_executable, require_module
from tests.integration.test_tutorial import reading, until_it_runs

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(600)]


def test_tutorial_page_shows_what_both_servers_send(tmp_path: Path) -> None:
    playwright = require_module("playwright.sync_api", component="browser")
    chromium = require_executable(
        "chromium", "chromium-browser", "google-chrome", component="browser"
    )
    errors: list[str] = []
    with reading(tmp_path) as reader, playwright.sync_playwright() as running:
        reader.follow(until_it_runs()[0])
        browser = running.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        pages = []
        for port in reader.ports.values():
            reader.wait_for(f"--port {port}", "Uvicorn running on")
            page = browser.new_page()
            page.on("pageerror", lambda error: errors.append(str(error)))
            page.goto(f"http://127.0.0.1:{port}/")
            page.wait_for_function("socket.readyState === WebSocket.OPEN")
            pages.append(page)
        first, second = pages
        first.fill("#text", "Hello")
        first.keyboard.press("Enter")
        for page in pages:
            page.wait_for_selector("#messages >> text=Hello")
        second.fill("#announcement input[name=text]", "Never")
        second.click("text=Save, send and roll back")
        second.wait_for_function("document.querySelector('#announcement [name=text]').value === ''")
        second.fill("#announcement input[name=text]", "Dinner is ready")
        second.click("#announcement button >> nth=0")
        for page in pages:
            page.wait_for_selector("#messages >> text=That was announcement number 1.")
            shown = page.inner_text("#messages").splitlines()
            texts = [line.partition(" (shown by")[0] for line in shown]
            assert texts == ["Hello", "Dinner is ready", "That was announcement number 1."]
        second.reload()
        assert second.inner_text("h2 + ul") == "Dinner is ready"
        browser.close()
    assert errors == []
