"""The cursor decides which rows are new. See ``docs/protocols.md``, section 3."""

from __future__ import annotations

from collections.abc import Sequence

from pg_layer._messages.rows import Key, Row, Span
from pg_layer._state.snapshot import Moment, Position

UNKNOWN_BOOT = -1  # before the first snapshot: every boot is later


class Cursor:
    """A snapshot ``S``, and the keys of admitted rows that are not visible in ``S``.

    This class alone decides whether a client dispatches a row. Every row passes through `admit`,
    `admit_together` or `admit_announced` before it enters the announcement queue. A row is admitted
    at most once: after that its key is in ``done``, or it is visible in ``S``. So a row that
    arrives twice is delivered once. A row can arrive twice after an answer that is lost when the
    server has executed the statement, a read that is repeated, a catch-up that finds rows announced
    before, a restart, a crash, or a failover that undoes a deletion.

    Two rules follow for callers:

    - Admit a row when it is heard or read, not when it is dispatched.
    - Move ``S`` to a snapshot only when all rows that it sees have been admitted, or do not
      concern the client. A catch-up reads these rows itself (`advance_to`). A renewal sends a ping
      with its snapshot. Notifications arrive in the order of the commits, so the ping proves that
      all announcements before the snapshot have been heard (`confirm`). Claims that are in flight
      delay this, because the snapshot may see the claimed rows before their answer is here
      (`begin_claim`).

    Marked rows may be announced long after their commit, when ``S`` has passed them. So ``S`` does
    not cover them. Their keys are kept until they expire, and a search for marked rows finds those
    whose announcement is lost (`overdue`).

    `admit_announced` is the exception to the rule of ``S``: a row that was new when its span was
    announced stays new when ``S`` passes it before it is read. For such a row the announcement
    queue ensures that it comes once: an entry takes each id of its span once, and a catch-up
    leaves the rows of waiting entries to them.

    Only the owner loop uses a cursor.
    """

    def __init__(self) -> None:
        self.moment: Moment | None = None  # S
        self._done: dict[tuple[int, int], set[int]] = {}  # (boot, xid) -> ids, not marked
        self._done_marked: dict[Key, float] = {}  # -> when the message expires
        self._pending: dict[str, Moment] = {}  # S' by the token of its ping
        self._delayed: tuple[Moment, set[int]] | None = None  # S', and claims that it may see
        self._claims: set[int] = set()  # in flight
        self._claims_begun = 0
        self._early_ping: str | None = None  # heard before the answer of its statement
        # While suspended, a ping proves nothing: what was heard before it is not admitted
        # until a catch-up has ended.
        self.is_suspended = True
        self._renewals: list[Moment] = []  # the last two
        self._searched: Moment | None = None  # marked rows that it sees have been searched for
        self._positions: list[Position] = []  # in order, all of one boot
        self.latest_boot = UNKNOWN_BOOT

    # ------------------------------------------------------------------ the rule

    def admit(self, key: Key, marked: bool, expires_at: float) -> bool:
        """Return whether a row is new. If it is, remember it: it is never new again."""
        if not self.is_new(key, marked):
            return False
        if marked:
            self._done_marked[key] = expires_at
        else:
            self._done.setdefault((key.boot, key.xid), set()).add(key.id)
        return True

    def admit_together(self, rows: Sequence[Row]) -> list[Row]:
        """Admit the rows of an announcement, and return those that are new.

        The rows are of one transaction, and all of them are marked or none is. Most rows
        that a process hears pass here, so one look-up decides about all of them.
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

    def admit_announced(self, key: Key, marked: bool, expires_at: float) -> bool:
        """Admit a row that was new when its span was announced, and is read later.

        ``S`` may have passed the row in the meantime, and the last search for marked rows
        may have seen it. Neither makes it old: only its key does.
        """
        if marked:
            is_done = key in self._done_marked
            self._done_marked[key] = expires_at
            return not is_done
        if self.has_passed(key.boot, key.xid):
            return True
        return self.admit(key, marked, expires_at)

    def is_new(self, key: Key, marked: bool) -> bool:
        """Return whether a row is new, without admitting it."""
        if marked:
            return key not in self._done_marked and not self.has_searched_marked(key.boot, key.xid)
        if self.has_passed(key.boot, key.xid):
            return False
        ids = self._done.get((key.boot, key.xid))
        return ids is None or key.id not in ids

    def has_passed(self, boot: int, xid: int) -> bool:
        """Return whether the unmarked rows of a transaction are visible in ``S``."""
        return self.moment is not None and self.moment.sees(boot, xid)

    def has_searched_marked(self, boot: int, xid: int) -> bool:
        """Return whether a search has seen all marked rows of a transaction.

        It has admitted those that concern the client. Others were sent before the client
        was interested in their address. The answer for an unknown boot (0) is no.
        """
        return boot != 0 and self._searched is not None and self._searched.sees(boot, xid)

    # ------------------------------------------------------------------ boots

    @property
    def boot(self) -> int:
        """The boot of ``S``; 0 if there is no ``S``."""
        return self.moment.boot if self.moment is not None else 0

    def boot_of(self, row: Row | Span) -> int:
        """Return the boot of a row, for comparisons.

        A row of boot 0 was written when the new boot had no number yet. It counts as a row
        of the latest boot. Otherwise a snapshot of an earlier boot could seem to see it,
        because that boot had a transaction with the same id.
        """
        return row.boot or self.latest_boot

    @property
    def known_boot(self) -> int:
        """The latest boot that the client has seen, or 0. The database has no earlier."""
        return max(self.latest_boot, 0)

    def has_passed_boot(self, boot: int) -> bool:
        """Return whether ``S`` is of a later boot.

        Rows of that boot which the catch-up did not find do not exist any more.
        """
        return 0 < boot < self.boot

    # ------------------------------------------------------------------ claims in flight

    def begin_claim(self) -> int:
        """Note that a claim of jobs is about to be sent. Return a number for `end_claim`.

        ``S`` must not pass the claimed rows before the answer is here: they would not be new
        then.
        """
        self._claims_begun += 1
        self._claims.add(self._claims_begun)
        return self._claims_begun

    def end_claim(self, number: int) -> None:
        """Note that a claim is not in flight any more.

        Its rows have been admitted; or its answer is lost, and `interrupt` was called.
        """
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
        """Note the snapshot of a renewal of the lease, and a position from before it.

        ``token``: the snapshot becomes ``S`` when the ping with this token is heard. None:
        the renewal sent no ping.
        ``is_heartbeat``: about a heartbeat has passed since the last such renewal. The
        search for marked rows counts these only.
        """
        if moment.boot < self.latest_boot:
            return  # the answer of a server that another one has replaced
        self.note_position(moment, position)
        if is_heartbeat:
            self._renewals = [*self._renewals[-1:], moment]
        if token is None:
            return
        self._pending[token] = moment
        if token == self._early_ping:
            self.confirm(token)

    def confirm(self, token: str) -> bool:
        """Note that a ping was heard. Return whether ``S`` has moved to its snapshot.

        All announcements of rows that the snapshot sees were heard before the ping.
        """
        moment = self._pending.pop(token, None)
        if self.is_suspended:
            return False
        if moment is None:
            # The notification may arrive before the answer of the statement that sent it.
            self._early_ping = token
            return False
        if self.moment is None or not moment.is_later(self.moment):
            return False
        if self._claims:
            self._delayed = moment, set(self._claims)
            return False
        self.advance_to(moment)
        return True

    def suspend(self) -> None:
        """Let no ping move ``S`` until `resume`: announcements are not admitted now."""
        self.is_suspended = True

    def resume(self) -> None:
        """Let pings move ``S`` again: a catch-up has ended."""
        self.is_suspended = False

    def interrupt(self) -> None:
        """Suspend, and discard pending snapshots. A catch-up must follow.

        Call this if an announcement may not have been heard, or if the answer of a claim is lost. A
        pending snapshot may see rows that were not admitted.
        """
        self.suspend()
        self.discard_pending()

    def discard_pending(self) -> None:
        """Discard the snapshots that wait for a ping or for claims."""
        self._pending.clear()
        self._early_ping = None
        self._delayed = None

    def advance_to(self, moment: Moment) -> None:
        """Make a snapshot ``S``, unless it is older, and forget the keys that it sees.

        All rows that it sees and that are not marked have been admitted, or do not concern
        the client.
        """
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
        """The moment of the heartbeat before the last one.

        Marked rows that it sees should have been announced by now.
        """
        return self._renewals[0] if len(self._renewals) == 2 else None

    def marked_searched(self, moment: Moment) -> None:
        """Note that all marked rows that this moment sees have been searched for."""
        if self._searched is None or moment.is_later(self._searched):
            self._searched = moment

    def is_past(self, moment: Moment) -> bool:
        """Return whether the rows that a moment sees, marked or not, can no longer be new."""
        return all(
            mine is not None and mine.covers(moment) for mine in (self.moment, self._searched)
        )

    def forget_expired(self, now: float) -> None:
        """Forget the keys of marked rows whose messages have expired."""
        self._done_marked = {key: end for key, end in self._done_marked.items() if end > now}

    # ------------------------------------------------------------------ low-water ids

    def low_id(self) -> int:
        """Return an id: each row that is new and not marked has a larger one."""
        return self.low_id_of(self.moment)

    def marked_low_id(self) -> int:
        """Return an id: each marked row that was not searched for has a larger one."""
        return self.low_id_of(self._searched)

    def low_id_of(self, moment: Moment | None) -> int:
        """Return an id: each row that this moment does not see has a larger one."""
        if moment is None or moment.boot != self.latest_boot:
            return 0
        xmin = moment.snapshot.xmin
        return max((each.last_id for each in self._positions if each.next_xid <= xmin), default=0)

    def note_position(self, moment: Moment, position: Position) -> None:
        """Note a position that was read before a snapshot was taken.

        A later boot discards positions, renewals and pending snapshots of earlier ones.
        """
        if moment.boot < self.latest_boot:
            return  # the answer of a server that another one has replaced
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
        # Keep the last position that is old enough for all of them, and all later ones.
        while len(self._positions) > 1 and self._positions[1].next_xid <= oldest:
            del self._positions[0]

    @property
    def key_count(self) -> int:
        """How many keys are remembered. May be read on any thread."""
        return sum(map(len, list(self._done.values()))) + len(self._done_marked)
