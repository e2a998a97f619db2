"""The cursor: which rows are new. See ``docs/protocols.md``, section 3."""

from __future__ import annotations

from collections.abc import Sequence

from pg_layer._messages.rows import Key, Row, Span
from pg_layer._state.snapshot import Moment, Position

UNKNOWN_BOOT = -1  # of a cursor that has no snapshot yet: every boot is later


class Cursor:
    """A snapshot ``S``, and the keys of what was admitted and is not visible in ``S``.

    Used by the owner loop only.
    """

    def __init__(self) -> None:
        self.moment: Moment | None = None
        self._done: dict[tuple[int, int], set[int]] = {}  # (boot, xid) -> ids
        self._done_marked: dict[Key, float] = {}  # -> when the message expires
        self._pending: dict[str, Moment] = {}  # S' by the token of its ping
        self._delayed: tuple[Moment, set[int]] | None = None  # S', and claims that it may see
        self._claims: set[int] = set()  # in flight
        self._claims_begun = 0
        self._early_ping: str | None = None
        self.is_suspended = True  # what is heard is not admitted now, until a catch-up has ended
        self._renewals: list[Moment] = []  # the last two
        self._searched: Moment | None = None  # marked rows that it sees have been looked for
        self._positions: list[Position] = []  # in order, all of one boot
        self.latest_boot = UNKNOWN_BOOT

    # ------------------------------------------------------------------ the rule

    def admit(self, key: Key, marked: bool, expires_at: float) -> bool:
        """Whether a row is new; if so, it is remembered, and never new again."""
        if not self.is_new(key, marked):
            return False
        if marked:
            self._done_marked[key] = expires_at
        else:
            self._done.setdefault((key.boot, key.xid), set()).add(key.id)
        return True

    def admit_together(self, rows: Sequence[Row]) -> list[Row]:
        """The rows that are new, of one transaction, all marked or none, as an announcement has them.

        They are judged together, because most of what a process hears is judged here.
        """
        boot, xid, marked = rows[0].boot, rows[0].xid, rows[0].marked
        if marked:
            return [row for row in rows if self.admit(row.key, marked, row.expires_at)]
        if self.has_passed(boot, xid):
            return []
        ids = self._done.setdefault((boot, xid), set())
        fresh = [row for row in rows if row.id not in ids]
        ids.update([row.id for row in fresh])
        return fresh

    def is_new(self, key: Key, marked: bool) -> bool:
        """Whether a row is new."""
        if marked:
            return key not in self._done_marked and not self.has_searched_marked(key.boot, key.xid)
        if self.has_passed(key.boot, key.xid):
            return False
        ids = self._done.get((key.boot, key.xid))
        return ids is None or key.id not in ids

    def has_passed(self, boot: int, xid: int) -> bool:
        """Whether all unmarked rows of a transaction are visible in ``S``."""
        return self.moment is not None and self.moment.sees(boot, xid)

    @property
    def boot(self) -> int:
        """The boot of ``S``; 0 if there is none."""
        return self.moment.boot if self.moment is not None else 0

    def boot_of(self, row: Row | Span) -> int:
        """The boot of a row, for comparisons.

        A row of boot 0 was written when its boot had not begun. It counts as one of the latest boot: then a
        snapshot of an earlier boot does not see it, although it may see a transaction with the same number.
        """
        return row.boot or self.latest_boot

    @property
    def known_boot(self) -> int:
        """The latest boot that the client has met, or 0: the database's is not earlier."""
        return max(self.latest_boot, 0)

    def has_passed_boot(self, boot: int) -> bool:
        """Whether ``S`` is of a later boot. What a catch-up did not find then is not there any more."""
        return 0 < boot < self.boot

    def has_searched_marked(self, boot: int, xid: int) -> bool:
        """Whether the marked rows of a transaction that are of concern were admitted by a look.

        Others were sent before the client was interested in their address. An unknown boot says nothing.
        """
        return boot != 0 and self._searched is not None and self._searched.sees(boot, xid)

    def admit_announced(self, key: Key, marked: bool, expires_at: float) -> bool:
        """The same for a row that was announced when it was new, and is read later."""
        if marked:
            is_done = key in self._done_marked
            self._done_marked[key] = expires_at
            return not is_done
        if self.has_passed(key.boot, key.xid):
            return True
        return self.admit(key, marked, expires_at)

    # ------------------------------------------------------------------ claims in flight

    def begin_claim(self) -> int:
        """A statement is sent that claims jobs: ``S`` must not pass them before its answer is here."""
        self._claims_begun += 1
        self._claims.add(self._claims_begun)
        return self._claims_begun

    def end_claim(self, number: int) -> None:
        """The answer is here, and its rows were admitted; or `missed` was called."""
        self._claims.discard(number)
        if self._delayed is not None:
            moment, claims = self._delayed
            claims.discard(number)
            if not claims:
                self._delayed = None
                self.advance_to(moment)

    # ------------------------------------------------------------------ renewal

    def renew(
        self, moment: Moment, position: Position, token: str | None, *, is_heartbeat: bool = True
    ) -> None:
        """Take note of a snapshot, and of a position from before it.

        With a token it becomes ``S`` when the ping with that token is heard. ``is_heartbeat``: about a
        heartbeat has passed since the last beat; the look for marked rows goes by those.
        """
        if moment.boot < self.latest_boot:
            return  # of a server that has gone
        self.note_position(moment, position)
        if is_heartbeat:
            self._renewals = [*self._renewals[-1:], moment]
        if token is None:
            return
        self._pending[token] = moment
        if token == self._early_ping:
            self.confirm(token)

    def confirm(self, token: str) -> bool:
        """A ping was heard: what its snapshot sees had been heard before. Return whether ``S`` moved."""
        moment = self._pending.pop(token, None)
        if self.is_suspended:
            return False
        if moment is None:
            self._early_ping = token  # before the answer of the statement that rang it
            return False
        if self.moment is None or not moment.is_later(self.moment):
            return False
        if self._claims:
            self._delayed = moment, set(self._claims)
            return False
        self.advance_to(moment)
        return True

    def interrupt(self) -> None:
        """Suspend, and discard the pending snapshots: something may not have been heard."""
        self.suspend()
        self.discard_pending()

    def suspend(self) -> None:
        """Let no snapshot become ``S`` until `resume`: it may see what was not admitted."""
        self.is_suspended = True

    def resume(self) -> None:
        """Let snapshots become ``S`` again: a catch-up has read what was not admitted."""
        self.is_suspended = False

    def discard_pending(self) -> None:
        """Something may not have been heard, or a claim's answer is lost: no snapshot becomes ``S``."""
        self._pending.clear()
        self._early_ping = None
        self._delayed = None

    def advance_to(self, moment: Moment) -> None:
        """Move ``S``: all unmarked rows that it sees were admitted before, or are of no concern."""
        if self.moment is not None and not moment.is_later(self.moment):
            return
        self.moment = moment
        self._done = {
            (boot, xid): ids
            for (boot, xid), ids in self._done.items()
            if not moment.sees(boot, xid)
        }

    # ------------------------------------------------------------------ marked rows

    @property
    def overdue(self) -> Moment | None:
        """The renewal before the last: marked rows that it sees should have been announced by now."""
        return self._renewals[0] if len(self._renewals) == 2 else None

    def marked_searched(self, moment: Moment) -> None:
        """All marked rows that this moment sees have been looked for."""
        if self._searched is None or moment.is_later(self._searched):
            self._searched = moment

    def is_past(self, moment: Moment) -> bool:
        """Whether no row that this moment sees can be new any more, marked or not."""
        return all(
            mine is not None and mine.covers(moment) for mine in (self.moment, self._searched)
        )

    def forget_expired(self, now: float) -> None:
        """Forget the keys of marked rows whose messages have expired."""
        self._done_marked = {key: end for key, end in self._done_marked.items() if end > now}

    # ------------------------------------------------------------------ bounds

    def low_id(self) -> int:
        """No row that is new and not marked has this id or a smaller one."""
        return self.low_id_of(self.moment)

    def marked_low_id(self) -> int:
        """No marked row that has not been looked for has this id or a smaller one."""
        return self.low_id_of(self._searched)

    def note_position(self, moment: Moment, position: Position) -> None:
        """Take note of a position from before a snapshot was taken."""
        if moment.boot < self.latest_boot:
            return  # of a server that has gone
        if self.latest_boot != moment.boot:
            self.latest_boot = moment.boot
            self._positions.clear()
            self._renewals.clear()
            self.discard_pending()
        self._positions.append(position)
        watched = [self.moment, self._searched, *self._renewals]
        oldest = min(
            (
                moment.snapshot.xmin
                for moment in watched
                if moment and moment.boot == self.latest_boot
            ),
            default=0,
        )
        # Keep the last one that is old enough, and all later ones.
        while len(self._positions) > 1 and self._positions[1].next_xid <= oldest:
            del self._positions[0]

    def low_id_of(self, moment: Moment | None) -> int:
        """No row that this moment does not see has this id or a smaller one."""
        if moment is None or moment.boot != self.latest_boot:
            return 0
        xmin = moment.snapshot.xmin
        return max((each.last_id for each in self._positions if each.next_xid <= xmin), default=0)

    @property
    def key_count(self) -> int:
        """How many keys are remembered."""
        return sum(map(len, list(self._done.values()))) + len(self._done_marked)
