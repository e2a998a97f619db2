"""``python -m benchmarks.compared POINT DSN SECONDS ENDURANCE``: print one result as JSON.

`benchmarks.compare` starts it in a process that imports the pg_layer of one tree.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

from benchmarks.compared.base import Setting
from benchmarks.compared.points import POINTS
from benchmarks.resources import raise_file_limit
from benchmarks.servers import postgres_server
from benchmarks.signals import interrupt_on_signals


def main() -> None:
    interrupt_on_signals()
    raise_file_limit()
    point, server, seconds, endurance = sys.argv[1:]
    with postgres_server(server) as dsn:
        result = POINTS[point](Setting(dsn, float(seconds), float(endurance)))
    print(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
