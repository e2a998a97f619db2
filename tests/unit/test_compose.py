"""docker-compose.yml is well-formed, runs the demo's commands, and opens no port to the network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from example import commands

ROOT = Path(__file__).resolve().parents[2]
COMPOSE_FILE = ROOT / "docker-compose.yml"
# Built here, or pinned to a release of at least two numbers.
PINNED = re.compile(r"^([a-z0-9./-]+:v?\d+\.\d+[A-Za-z0-9.-]*|pg-layer-demo:local)$")


@pytest.fixture
def services() -> dict[str, dict[str, Any]]:
    document = yaml.safe_load(COMPOSE_FILE.read_text())
    services: dict[str, dict[str, Any]] = document["services"]
    return services


def test_compose_file_meets_the_specification() -> None:
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec"]
    result = subprocess.run(
        [*check, str(COMPOSE_FILE)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout


def test_compose_commands_are_those_of_the_demo(services: dict[str, dict[str, Any]]) -> None:
    expected = {
        "migrate": commands.MIGRATE,
        "sweeper": commands.SWEEP,
        "web1": commands.serve("0.0.0.0", 8001),
        "web2": commands.serve("0.0.0.0", 8002),
    }
    assert {
        name: service["command"] for name, service in services.items() if "build" in service
    } == expected


def test_compose_images_are_pinned(services: dict[str, dict[str, Any]]) -> None:
    dockerfile = (ROOT / "Dockerfile").read_text()
    images = [service["image"] for service in services.values()]
    images += re.findall(r"^FROM (\S+)", dockerfile, re.MULTILINE)
    assert len(images) > len(services)
    assert [image for image in images if not PINNED.match(image)] == []


def test_compose_ports_listen_on_localhost_only(services: dict[str, dict[str, Any]]) -> None:
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert [port for port in ports if not port.startswith("127.0.0.1:")] == []


def test_compose_services_start_after_the_migration(services: dict[str, dict[str, Any]]) -> None:
    assert "healthcheck" in services["postgres"]
    assert services["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    migrate = services["migrate"]
    for name in ("web1", "web2", "sweeper"):
        service = services[name]
        assert service["depends_on"] == {"migrate": {"condition": "service_completed_successfully"}}
        assert service["environment"]["PG_LAYER_DSN"] == migrate["environment"]["PG_LAYER_DSN"]


def test_compose_optional_services_have_a_profile(services: dict[str, dict[str, Any]]) -> None:
    profiles = {
        name: service["profiles"] for name, service in services.items() if "profiles" in service
    }
    assert profiles == {"redis": ["bench"], "pgbouncer": ["pgbouncer"]}


def test_dockerignore_allows_what_the_image_copies() -> None:
    copied = re.findall(r"^COPY (.+) \S+$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    allowed = {
        line[1:]
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    assert {name for names in copied for name in names.split()} == allowed
    assert [name for name in allowed if not (ROOT / name).exists()] == []
