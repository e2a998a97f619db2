"""The commands of the demo, written once for everything that runs them."""

from __future__ import annotations

MIGRATE = ["python", "-m", "example.manage", "migrate"]
SWEEP = ["python", "-m", "example.manage", "pg_layer_sweep"]


def serve(host: str, port: int) -> list[str]:
    """The command of one server process."""
    return [
        "python",
        "-m",
        "uvicorn",
        "example.asgi:application",
        "--host",
        host,
        "--port",
        str(port),
    ]
