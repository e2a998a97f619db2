"""The tests' own tools: databases, and the optional components if they are installed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import psycopg
import pytest

from devtools.postgres.server import free_port
from tests.components import require, require_executable, require_module, required_components


def test_fresh_database_is_empty_and_separate(fresh_database: str, postgres_dsn: str) -> None:
    with psycopg.connect(fresh_database) as connection:
        row = connection.execute(
            "SELECT current_database(), count(*) FROM pg_stat_user_tables"
        ).fetchone()
    assert row is not None
    name, tables = row
    assert name.startswith("pg_layer_test_")
    assert tables == 0
    assert psycopg.conninfo.conninfo_to_dict(postgres_dsn).get("dbname") != name


def test_require_missing_component_skips_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PG_LAYER_REQUIRE", "")
    assert required_components() == frozenset()
    with pytest.raises(pytest.skip.Exception, match="no-such-program or neither is not installed"):
        require_executable("no-such-program", "neither", component="browser")
    with pytest.raises(pytest.skip.Exception, match="no_such_module"):
        require_module("no_such_module", component="redis")
    monkeypatch.setenv("PG_LAYER_REQUIRE", "browser, redis")
    with pytest.raises(pytest.fail.Exception, match="no-such-program"):
        require_executable("no-such-program", component="browser")
    with pytest.raises(pytest.fail.Exception, match="no_such_module"):
        require_module("no_such_module", component="redis")
    with pytest.raises(pytest.skip.Exception):
        require("something else", False, "not here")
    require("browser", True, "here")


@pytest.mark.redis
def test_redis_server_answers(tmp_path: Path) -> None:
    program = require_executable("redis-server", component="redis")
    require_module("redis", component="redis")
    from redis import Redis
    from redis.backoff import ConstantBackoff
    from redis.exceptions import ConnectionError
    from redis.retry import Retry

    port = free_port()
    with subprocess.Popen(
        [program, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(tmp_path)],
        stdout=subprocess.DEVNULL,
    ) as server:
        try:
            retry = Retry(ConstantBackoff(0.05), 200)
            with Redis(port=port, retry=retry, retry_on_error=[ConnectionError]) as client:
                assert client.ping()
        finally:
            server.terminate()


@pytest.mark.browser
async def test_browser_runs_scripts() -> None:
    program = require_executable(
        "chromium", "chromium-browser", "google-chrome", component="browser"
    )
    require_module("playwright.async_api", component="browser")
    from playwright.async_api import async_playwright

    async with async_playwright() as playwright:
        # Chromium's sandbox does not work as root.
        browser = await playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = await browser.new_page()
        await page.set_content("<script>document.title = 1 + 1</script>")
        assert await page.title() == "2"
        await browser.close()
