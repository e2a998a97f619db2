"""The backend's `DatabaseWrapper`, in the module that Django imports."""

from __future__ import annotations

from typing import Any

from django.db.backends.postgresql import base

OWN_KEYS = ("MAX_CONNS", "recycle_after")


class DatabaseWrapper(base.DatabaseWrapper):
    """A wrapper with additional connection parameters, which it removes when it connects.

    The token represents a password that such a backend fetches.
    """

    def get_connection_params(self) -> dict[str, Any]:
        parameters: dict[str, Any] = super().get_connection_params()
        return {**parameters, "password": self.settings_dict["TOKEN"]}

    def get_new_connection(self, conn_params: dict[str, Any]) -> Any:
        own = [conn_params.pop(name) for name in OWN_KEYS]
        assert None not in own
        return super().get_new_connection(conn_params)
