"""Optional components of tests, such as a browser, a Redis server or PgBouncer.

A test that needs a component is marked with its name and calls a function of this module. If the
component is missing, the test is skipped. If the environment's PG_LAYER_REQUIRE names the component
("browser,redis"), the test fails instead, so that continuous integration does not skip it.
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
    """Return the components that must not be missing."""
    names = os.environ.get(REQUIRE_VARIABLE, "").split(",")
    return frozenset(name.strip() for name in names if name.strip())


def missing(component: str, reason: str) -> NoReturn:
    """Skip the test, or fail it if `component` must not be missing."""
    if component in required_components():
        pytest.fail(f"{reason} ({REQUIRE_VARIABLE} asks for {component})")
    pytest.skip(reason)


def require(component: str, available: object, reason: str) -> None:
    """Skip or fail the test, like `missing`, unless `available` is true."""
    if not available:
        missing(component, reason)


def require_executable(*names: str, component: str) -> str:
    """Return the path of the first installed program of `names`."""
    for name in names:
        path = shutil.which(name)
        if path:
            return path
    missing(component, f"{' or '.join(names)} is not installed")


def require_module(name: str, component: str) -> ModuleType:
    """Import a module and return it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        missing(component, f"Python's module {name} is not installed: {error}")
