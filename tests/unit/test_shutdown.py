"""The registry of the objects that are closed at the end of the process."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator

import pytest

from pg_layer._process import shutdown


class Closable:
    def close_at_exit(self) -> None:
        raise NotImplementedError


@pytest.fixture(autouse=True)
def own_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(shutdown, "_closables", type(shutdown._closables)())
    yield
    sys.setprofile(None)


def test_registered_while_objects_are_registered_returns_the_earlier_ones() -> None:
    """Another thread may register one meanwhile, or a finaliser in any step of this one."""
    earlier = [Closable() for _ in range(10)]
    later: list[Closable] = []
    for each in earlier:
        shutdown.register(each)

    def register_one(*_: object) -> None:
        later.append(Closable())
        shutdown.register(later[-1])

    sys.setprofile(register_one)
    found = shutdown.registered()
    sys.setprofile(None)

    assert later
    assert set(earlier) <= set(found)


def test_registered_omits_objects_that_no_longer_exist() -> None:
    kept = Closable()
    shutdown.register(kept)
    shutdown.register(Closable())
    gc.collect()
    found = [each for each in shutdown.registered() if isinstance(each, Closable)]
    assert found == [kept]
