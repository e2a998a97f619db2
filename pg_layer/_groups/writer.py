"""The membership rows of the owner: the table follows the owner's memory.

Bound to the owner loop. See ``docs/protocols.md``, section 4.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from itertools import islice
from typing import Any

from pg_layer._db.fence import raise_fence
from pg_layer._db.pool import Connections
from pg_layer._db.queries import groups as queries
from pg_layer._db.session import Session
from pg_layer._process.tasks import Spawn
from pg_layer._state.client import Client
from pg_layer._state.memberships import Pair
from pg_layer._state.snapshot import Moment
from pg_layer.exceptions import LayerUnavailable, OutcomeUnknown, PgLayerError

PART = 2000  # memberships that one statement writes
RETRY = 0.5  # seconds between attempts
READ_TIMEOUT = 60.0  # seconds to read all rows of the client


class MembershipWriter:
    """The writer of the rows, one statement at a time, in the background and for callers."""

    def __init__(
        self,
        client: Client,
        connections: Connections,
        spawn: Spawn,
    ) -> None:
        self._client = client
        self._connections = connections
        self._spawn = spawn
        self._lock = asyncio.Lock()  # one statement at a time, so that they take effect in order
        # The pairs whose row may differ from memory, with the largest id of the requests that have
        # been applied and can be deleted.
        self._due: dict[Pair, int] = {}
        self._may_have_old_rows = False
        self._is_writing = False
        self._has_written = asyncio.Event()
        self._has_written.set()

    @property
    def due(self) -> int:
        """Return the number of memberships whose row must be written."""
        return len(self._due)

    def write_soon(self, group: str, channel: str, request: int = 0) -> None:
        """Write the row of a membership in the background.

        ``request``: the id of a request that has been applied, or is ignored. It is deleted.
        """
        pair = (group, channel)
        self._due[pair] = max(self._due.get(pair, 0), request)
        self._start()

    def write_all_soon(self, *, may_have_old_rows: bool) -> None:
        """Write all memberships again in the background: the table may have lost rows.

        ``may_have_old_rows``: the table may also have rows of memberships that have ended, because
        a crash of the server undoes deletions. They are deleted.
        """
        for pair in self._client.memberships.pairs():
            self._due.setdefault(pair, 0)
        self._may_have_old_rows |= may_have_old_rows
        self._start()

    async def write(self, present: Sequence[Pair], gone: Sequence[Pair], timeout: float) -> Moment:
        """Write memberships that are about to begin (``present``) and that have ended (``gone``).

        Return the moment in which the new ones begin. If the call raises, the rows are written
        later, from memory.

        Raises `OutcomeUnknown` or another `LayerUnavailable` after ``timeout`` seconds.
        """
        deadline = time.monotonic() + timeout
        expiry = self._client.config.group_expiry
        rows = queries.OwnRows([(*pair, expiry) for pair in present], gone, ())
        try:
            async with self._lock:
                return await self._write(rows, deadline)
        except BaseException:
            for pair in (*present, *gone):
                self.write_soon(*pair)
            raise

    async def _write(self, rows: queries.OwnRows, deadline: float) -> Moment:
        """Write rows. If the outcome is unknown, raise the fence and write them again.

        With the fence raised, the server refuses the first statement if it arrives late.
        """
        client, fence = self._client, 0

        async def work(session: Session) -> Moment:
            nonlocal fence
            fence = client.fence
            await raise_fence(session, client)
            return await queries.write(session, client.address, fence, rows)

        unknown: OutcomeUnknown | None = None  # the outcome of an earlier attempt
        while True:
            fence = client.fence
            left = deadline - time.monotonic()
            if left <= 0:
                raise unknown or LayerUnavailable("The database could not be reached in time.")
            try:
                return await self._connections.run(work, timeout=left)
            except OutcomeUnknown as error:
                unknown = error
                client.advance_fence()
                if time.monotonic() >= deadline:
                    raise
            except LayerUnavailable as error:
                # The fence is larger: another statement was given up meanwhile, and this one was
                # refused. Write again with the larger fence.
                if client.fence == fence:
                    if unknown is not None:
                        raise unknown from error
                    raise
            except asyncio.CancelledError:
                client.advance_fence()
                raise

    def _start(self) -> None:
        if not self._is_writing and self._next_step() is not None:
            self._is_writing = True
            self._has_written.clear()
            self._spawn("The writing of memberships", self._write_due)

    async def _write_due(self) -> None:
        while (step := self._next_step()) is not None:
            try:
                await step()
            except PgLayerError:
                pause = RETRY
            else:
                pause = 0.0  # let callers of write() take the lock
            await asyncio.sleep(pause)
        self._is_writing = False
        self._has_written.set()

    async def written(self) -> None:
        """Wait until the rows that were due have been written in the background."""
        await self._has_written.wait()

    def _next_step(self) -> Callable[[], Coroutine[Any, Any, None]] | None:
        if self._due:
            return self._write_part
        return self._find_old if self._may_have_old_rows else None

    async def _write_part(self) -> None:
        async with self._lock:
            # Take the pairs out before the statement: a change during it makes a pair due again.
            part = {pair: self._due.pop(pair) for pair in list(islice(self._due, PART))}
            try:
                await self._write(
                    self._rows(part), time.monotonic() + self._client.config.send_timeout
                )
            except BaseException:
                for pair, request in part.items():
                    self._due[pair] = max(self._due.get(pair, 0), request)
                raise

    async def _find_old(self) -> None:
        """Find the rows of memberships that have ended, and make them due.

        Memberships that are about to begin are not in memory yet. They are also made due, and are
        written once more.
        """
        memberships = self._client.memberships

        async def work(session: Session) -> None:
            async for part in queries.own_rows(session, self._client.address):
                for pair in part:
                    if memberships.get(*pair) is None:
                        self._due.setdefault(pair, 0)

        self._may_have_old_rows = False
        try:
            await self._connections.run(
                work,
                timeout=READ_TIMEOUT,
                statement_timeout=self._client.config.send_timeout,
                is_idempotent=True,
            )
        except BaseException:
            self._may_have_old_rows = True
            raise

    def _rows(self, part: dict[Pair, int]) -> queries.OwnRows:
        present: list[tuple[str, str, float | None]] = []
        gone: list[Pair] = []
        now = self._client.clock.now()
        for group, channel in part:
            member = self._client.memberships.get(group, channel)
            if member is None:
                gone.append((group, channel))
            else:
                left = None if member.expires_at == math.inf else member.expires_at - now
                present.append((group, channel, left))
        requests = [(*pair, request) for pair, request in part.items() if request]
        return queries.OwnRows(present, gone, requests)
