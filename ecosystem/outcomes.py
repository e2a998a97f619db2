"""Compare what a suite's tests did with this layer and with the package's own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from xml.etree import ElementTree


class Outcome(Enum):
    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


def read_junit(xml: str) -> dict[str, Outcome]:
    """Return the outcome of each test in pytest's JUnit report, by `module::test`.

    A test that fails and whose fixture then fails too is in the report twice. It has failed.
    """
    outcomes: dict[str, Outcome] = {}
    for case in ElementTree.fromstring(xml).iter("testcase"):
        name = "::".join(part for part in (case.get("classname"), case.get("name")) if part)
        tags = {child.tag for child in case}
        if tags & {"failure", "error"}:
            outcomes[name] = Outcome.FAILED
        else:
            outcomes.setdefault(name, Outcome.SKIPPED if "skipped" in tags else Outcome.PASSED)
    return outcomes


def read_remains(log: str, folder: str) -> list[str]:
    """Return what the layer in `folder` leaves behind, by the output of pytest and asyncio."""
    # Methods of the layer itself run in tasks of its callers.
    name = r"(?!PostgresChannelLayer\.)(\S+)"
    place = rf"(?:running at|done, defined at) {re.escape(folder)}/"
    task = rf"^task: <Task .*coro=<{name} {place}"
    remains = {f"a pending task: {name}" for name in re.findall(task, log, re.MULTILINE)}
    if "is being accessed by other users" in log:
        remains.add("connections to the test database, which cannot be dropped")
    return sorted(remains)


@dataclass(frozen=True)
class Verdict:
    """The result of one suite.

    ``outcomes`` and ``remains`` are those with this layer, ``own`` those with the package's own.
    ``expected`` has the reasons for tests that fail with this layer only.
    """

    outcomes: Mapping[str, Outcome]
    own: Mapping[str, Outcome]
    expected: Mapping[str, str]
    remains: Sequence[str] = ()

    @property
    def fails_itself(self) -> list[str]:
        """The tests that fail with the package's own layer too."""
        return [test for test in self._failed if self.own.get(test) is Outcome.FAILED]

    @property
    def complaints(self) -> list[str]:
        """What differs from the table. The suite is as expected if there are none."""
        failed = set(self._failed) - set(self.fails_itself)
        found = [f"failed: {test}" for test in sorted(failed - set(self.expected))]
        for test in sorted(set(self.expected) - failed):
            outcome = self.outcomes.get(test)
            what = f"has {outcome.value}" if outcome else "does not exist"
            if test in self.fails_itself:
                what = "fails with the package's own layer too"
            found.append(f"expected to fail, but {what}: {test}")
        found += [f"not run: {test}" for test in sorted(set(self.own) - set(self.outcomes))]
        found += [f"left {what}" for what in self.remains]
        if Outcome.PASSED not in self.own.values():
            found.append("no test passes with the package's own layer")
        return found

    @property
    def _failed(self) -> list[str]:
        return [test for test, outcome in self.outcomes.items() if outcome is Outcome.FAILED]


def report(verdicts: Mapping[str, Verdict]) -> str:
    """Return a table of the suites, and below it what is not as expected."""
    rows = [
        ("", "with pg_layer", "", "", "own layer", ""),
        ("suite", "passed", "failed", "expected", "passed", "failed"),
    ]
    for suite, verdict in verdicts.items():
        outcomes, own = list(verdict.outcomes.values()), list(verdict.own.values())
        rows.append(
            (
                suite,
                str(outcomes.count(Outcome.PASSED)),
                str(outcomes.count(Outcome.FAILED)),
                str(len(verdict.expected)),
                str(own.count(Outcome.PASSED)),
                str(own.count(Outcome.FAILED)),
            )
        )
    lines = [f"{row[0]:34}" + "".join(f"{cell:>14}" for cell in row[1:]) for row in rows]
    for suite, verdict in verdicts.items():
        lines += [f"{suite}: {complaint}" for complaint in verdict.complaints]
    return "\n".join(lines)
