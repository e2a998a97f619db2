import gc
from collections.abc import Iterator

import pytest
from django.conf import settings


def pytest_configure() -> None:
    settings.configure(
        SECRET_KEY="only-for-tests",
        INSTALLED_APPS=[
            "django.contrib.auth",
            "django.contrib.contenttypes",
            "django.contrib.sessions",
            "channels",
            "tests",
        ],
        CHANNEL_LAYERS={"default": {"BACKEND": "channels.layers.InMemoryChannelLayer"}},
    )


@pytest.fixture(autouse=True)
def without_earlier_observers() -> Iterator[None]:
    """Collect each test's consumer classes: their observers send until then."""
    yield
    gc.collect()
