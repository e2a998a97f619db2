"""The development tools: the locked versions, and the checks of make lint and of each commit."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = ("3.10", "3.11", "3.12", "3.13")


def locked() -> list[Requirement]:
    lines = (ROOT / "requirements" / "dev.txt").read_text().splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def wanted() -> list[Requirement]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    found = [Requirement(text) for part in (project["dependencies"], *extras) for text in part]
    return [requirement for requirement in found if requirement.name != project["name"]]


def applicable(found: list[Requirement], environment: dict[str, str]) -> list[Requirement]:
    return [r for r in found if r.marker is None or r.marker.evaluate(environment)]


@pytest.mark.parametrize("python", PYTHONS)
def test_lock_has_one_fitting_version_of_each_dependency(python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.9"}
    versions: dict[str, list[str]] = {}
    for requirement in applicable(locked(), environment):
        (specifier,) = requirement.specifier
        assert specifier.operator == "=="
        versions.setdefault(canonicalize_name(requirement.name), []).append(specifier.version)
    for requirement in applicable(wanted(), environment):
        (version,) = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement


def test_lock_names_no_index_and_no_path() -> None:
    text = (ROOT / "requirements" / "dev.txt").read_text()
    assert not re.search(r"^-|://|@", text, re.MULTILINE)


def test_hooks_run_the_checks_of_the_makefile_without_downloads() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    assert [repository["repo"] for repository in config["repos"]] == ["local"]
    makefile = (ROOT / "Makefile").read_text()
    for hook in config["repos"][0]["hooks"]:
        assert hook["language"] == "system"
        command, tool, *_ = hook["entry"].split()
        assert command == ".ci/tool"
        assert f"$(VENV)/bin/{tool}" in makefile
