"""The commands of the demo's processes."""

from __future__ import annotations

MIGRATE = ["python", "-m", "example.manage", "migrate"]
SWEEP = ["python", "-m", "example.manage", "pg_layer_sweep"]


def serve(host: str, port: int) -> list[str]:
    """Return the command of a server process."""
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
