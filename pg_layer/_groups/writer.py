"""Writes the client's own rows of memberships: the table follows the memory of the owner.

Bound to the owner loop. See ``docs/protocols.md``, section 4.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from itertools import islice
from typing import Any

from pg_layer._db.pool import Connections
from pg_layer._db.queries import groups as queries
from pg_layer._db.queries import receive
from pg_layer._db.session import Session
from pg_layer._process.tasks import Spawn
from pg_layer._state.client import Client
from pg_layer._state.memberships import Pair
from pg_layer._state.snapshot import Moment
from pg_layer.exceptions import LayerUnavailable, OutcomeUnknown, PgLayerError

PART = 2000  # memberships in a statement
RETRY = 0.5  # seconds
READ_TIMEOUT = 60.0  # seconds


class MembershipWriter:
    """Writes rows one statement after the other, in the background and for callers."""

    def __init__(
        self,
        client: Client,
        connections: Connections,
        spawn: Spawn,
    ) -> None:
        self._client = client
        self._connections = connections
        self._spawn = spawn
        self._lock = asyncio.Lock()  # one statement at a time: they take effect in this order
        self._due: dict[
            Pair, int
        ] = {}  # pairs whose row may differ, with the claim that was applied
        self._may_have_old_rows = False
        self._is_writing = False

    @property
    def due(self) -> int:
        """How many memberships must be written."""
        return len(self._due)

    def write_soon(self, group: str, channel: str, claim: int = 0) -> None:
        """The row of a membership may differ from memory: write it in the background."""
        pair = (group, channel)
        self._due[pair] = max(self._due.get(pair, 0), claim)
        self._start()

    def write_all_soon(self, *, may_have_old_rows: bool) -> None:
        """The table may have lost rows: write all memberships again in the background.

        ``may_have_old_rows``: it may also have rows of memberships that have ended. A crash undoes deletions.
        """
        for pair in self._client.memberships.pairs():
            self._due.setdefault(pair, 0)
        self._may_have_old_rows |= may_have_old_rows
        self._start()

    async def write(self, present: Sequence[Pair], gone: Sequence[Pair], timeout: float) -> Moment:
        """Write that these memberships are about to begin, and that those have ended.

        Returns the moment in which the new ones begin. If it raises, the rows follow memory later.
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
        """Write rows; again with a higher fence if the outcome is unknown, so that none comes late."""
        client, fence = self._client, 0

        async def work(session: Session) -> Moment:
            nonlocal fence
            fence = client.fence
            if not client.is_fence_raised:
                await receive.raise_fence(session, client.address, fence)
                client.fence_raised(fence)
            return await queries.write(session, client.address, fence, rows)

        unknown: OutcomeUnknown | None = None  # of an attempt before
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
                # Refused: another statement was given up meanwhile, and has raised the fence.
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
            self._spawn("The writing of memberships", self._write_due)

    async def _write_due(self) -> None:
        while (step := self._next_step()) is not None:
            try:
                await step()
            except PgLayerError:
                pause = RETRY
            else:
                pause = 0.0  # callers come first
            await asyncio.sleep(pause)
        self._is_writing = False

    def _next_step(self) -> Callable[[], Coroutine[Any, Any, None]] | None:
        if self._due:
            return self._write_part
        return self._find_old if self._may_have_old_rows else None

    async def _write_part(self) -> None:
        async with self._lock:
            # A change during the statement makes a pair due again.
            part = {pair: self._due.pop(pair) for pair in list(islice(self._due, PART))}
            try:
                await self._write(
                    self._rows(part), time.monotonic() + self._client.config.send_timeout
                )
            except BaseException:
                for pair, claim in part.items():
                    self._due[pair] = max(self._due.get(pair, 0), claim)
                raise

    async def _find_old(self) -> None:
        """Find rows of memberships that have ended. Those that are just beginning are written once more."""
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
        claims = [(*pair, claim) for pair, claim in part.items() if claim]
        return queries.OwnRows(present, gone, claims)
