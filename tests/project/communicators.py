"""The test communicators of Channels.

`channels.testing` imports Daphne for its live server, which these tests do not use. If Daphne is
not installed, empty modules replace it during the import.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

_stand_ins: dict[str, ModuleType] = {}
if importlib.util.find_spec("daphne") is None:
    _stand_ins = {name: ModuleType(name) for name in ("daphne", "daphne.testing")}
    vars(_stand_ins["daphne.testing"])["DaphneProcess"] = None

sys.modules.update(_stand_ins)
try:
    from channels.testing.http import HttpCommunicator
    from channels.testing.websocket import WebsocketCommunicator
finally:
    for _name in _stand_ins:
        del sys.modules[_name]

__all__ = ["HttpCommunicator", "WebsocketCommunicator"]
