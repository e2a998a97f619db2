"""Components that tests can do without: a browser, a Redis server, granian.

A test that needs one is marked with the component's name and asks for it here. Where the component is missing
the test is skipped, unless the environment's PG_LAYER_REQUIRE names it ("browser,redis"): then it fails, so
that continuous integration notices when it tests less than it should.
"""

from __future__ import annotations

import importlib
import os
import shutil
from types import ModuleType
from typing import NoReturn

import pytest

REQUIRE_VARIABLE = "PG_LAYER_REQUIRE"


def required_components() -> frozenset[str]:
    """The components that must not be missing."""
    names = os.environ.get(REQUIRE_VARIABLE, "").split(",")
    return frozenset(name.strip() for name in names if name.strip())


def missing(component: str, reason: str) -> NoReturn:
    """Skip the test for `reason`, or fail it if `component` must not be missing."""
    if component in required_components():
        pytest.fail(f"{reason} ({REQUIRE_VARIABLE} asks for {component})")
    pytest.skip(reason)


def require(component: str, available: object, reason: str) -> None:
    """As `missing`, unless `available` is true."""
    if not available:
        missing(component, reason)


def require_executable(*names: str, component: str) -> str:
    """The path of the first program of `names` that is installed; any of them will do."""
    for name in names:
        path = shutil.which(name)
        if path:
            return path
    missing(component, f"{' or '.join(names)} is not installed")


def require_module(name: str, component: str) -> ModuleType:
    """The module `name`, imported."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing(component, f"Python's module {name} is not installed: {error}")
