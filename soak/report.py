"""The ledger as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

from soak.ledger import CAUSES, Ledger
from soak.records import KINDS

OFFENCES_MOST = 20


def describe(ledger: Ledger) -> str:
    """Return tables of the messages and of the faults."""
    head = [
        *("stream", "returned", "unannounced", "unknown", "refused", "delivered"),
        *(f"lost: {cause}" for cause in CAUSES),
        *("twice", "disorder", "late", "uninvited", "early", "stayed", "again"),
    ]
    rows = [
        [
            kind,
            *map(str, (tally.returned, tally.unannounced, tally.unknown)),
            *map(str, (tally.refused, tally.delivered)),
            *(str(tally.lost[cause]) for cause in CAUSES),
            *map(str, (tally.twice, tally.disordered if kind != "normal" else "-")),
            *map(str, (tally.late, tally.uninvited, tally.early, tally.stayed, tally.again)),
        ]
        for kind, tally in ((kind, ledger.tallies[kind]) for kind in KINDS)
    ]
    order = ledger.group_order
    parts = [
        _table(head, rows),
        f"order within a group: {order.compared} places compared between two members,"
        f" {len(order.disagreements)} messages in another order;"
        f" {order.left_out} places left out after catch-ups, with {len(order.excused)} messages"
        " in another order",
    ]
    counts = Counter(fault.kind for fault in ledger.faults)
    parts.append(
        _table(
            ["fault", "times", "first message: median", "worst", "every reader: median", "worst"],
            [
                [
                    kind,
                    str(times),
                    *_seconds(ledger.first.get(kind, [])),
                    *_seconds(ledger.all_back.get(kind, [])),
                ]
                for kind, times in sorted(counts.items())
            ],
        )
    )
    parts.append(f"{ledger.cancelled} receive() cancelled, {ledger.joins} joinings of groups")
    if ledger.complaints:
        parts.append("Errors:\n" + "\n".join(ledger.complaints[:OFFENCES_MOST]))
    if ledger.offences:
        parts.append("Not allowed:\n" + "\n".join(ledger.offences[:OFFENCES_MOST]))
    parts.append("All promises kept." if ledger.is_clean else "PROMISES BROKEN.")
    return "\n\n".join(parts)


def _seconds(values: Sequence[float]) -> list[str]:
    return [f"{median(values):.2f} s", f"{max(values):.2f} s"] if values else ["-", "-"]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index == 0 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in (head, *rows)
    )
