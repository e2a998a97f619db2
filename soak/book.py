"""The records of a process in a file. If the process is killed, at most the last line is torn."""

from __future__ import annotations

import os
import time
from pathlib import Path

from soak.records import Record, decode, encode

SUFFIX = ".book"

now = time.monotonic


class Book:
    """The file of one process. Thread-safe: each record is one appending write."""

    def __init__(self, folder: Path, process: str) -> None:
        path = folder / f"{process}{SUFFIX}"
        self._fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, record: Record) -> None:
        os.write(self._fd, encode(record))

    def close(self) -> None:
        os.close(self._fd)


def read_books(folder: Path) -> dict[str, list[Record]]:
    """Return the records of all books in a folder, by process."""
    return {
        path.stem: list(decode(path.read_bytes())) for path in sorted(folder.glob(f"*{SUFFIX}"))
    }


class Counter:
    """A count of sent and received messages in growing books."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[Path, int] = {}
        self.sent = 0
        self.received = 0

    def update(self) -> int:
        """Count new records and return the number of newly received messages."""
        fresh = 0
        for path in self._folder.glob(f"*{SUFFIX}"):
            with path.open("rb") as book:
                book.seek(self._read.get(path, 0))
                text = book.read()
            self._read[path] = self._read.get(path, 0) + len(text)
            self.sent += text.count(b'["Ended",')
            received = text.count(b'["Got",')
            self.received += received
            fresh += received
        return fresh
