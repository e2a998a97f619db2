"""The searches of docs/how-to/channels-redis.md find what must change, and nothing else."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "channels-redis.md"

ONLY_CORE_HAS = """
key = layer._group_key("room")
count = await layer.connection(index).zcard(key)
index = layer.consistent_hash("room")
"""
ONLY_PG_LAYER_HAS = """
layer.sync.group_send("room", message)
send = layer.sync
await layer.send_many(messages)
await layer.group_send_many(messages)
count = await layer.group_count("room")
names = await layer.group_channels("room")
await layer.group_send("room", message, exclude=self.channel_name)
    expiry=5,
counters = layer.stats()
await layer.health()
from pg_layer.testing import captured_messages
pg-layer[encryption]
SELECT pg_layer_send('jobs', '{}');
"""
EVERY_LAYER_HAS = """
from asgiref.sync import async_to_sync
from websockets.sync.client import connect
async_to_sync(layer.group_send)("room", message)
Article.objects.exclude(pk=1)
redis.connection.close()
"""


def commands() -> list[str]:
    """Return the commands of the page that search: before the move, and before the way back."""
    text = PAGE.read_text(encoding="utf-8")
    return [each.strip() for each in re.findall(r"```sh\n(\s*git grep .*?)```", text, re.DOTALL)]


@pytest.mark.parametrize(
    ("number", "wanted"), [(0, ONLY_CORE_HAS), (1, ONLY_PG_LAYER_HAS)], ids=["move", "way back"]
)
def test_search_of_the_page_finds_exactly_what_must_change(
    tmp_path: Path, number: int, wanted: str
) -> None:
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    (tmp_path / "project.txt").write_text(wanted + EVERY_LAYER_HAS)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    found = subprocess.run(
        commands()[number], shell=True, cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    lines = [line.split(":", 2)[2] for line in found.splitlines()]
    assert lines == wanted.strip("\n").splitlines()
