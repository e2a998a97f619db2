"""The comparison of other packages' tests, with this layer and with their own."""

from __future__ import annotations

from ecosystem.outcomes import Outcome, Verdict, read_junit, read_remains, report
from ecosystem.suites import SUITES

PASSED, FAILED, SKIPPED = Outcome.PASSED, Outcome.FAILED, Outcome.SKIPPED

XML = """<testsuites><testsuite>
<testcase classname="tests.test_chat" name="test_sent"/>
<testcase classname="tests.test_chat" name="test_full"><failure message="no"/></testcase>
<testcase classname="tests.test_chat" name="test_closed"/>
<testcase classname="tests.test_chat" name="test_closed"><error message="fixture"/></testcase>
<testcase classname="tests.test_chat" name="test_celery"><skipped/></testcase>
<testcase classname="" name="tests.test_broken"><error message="collection failure"/></testcase>
</testsuite></testsuites>"""


def test_read_junit_returns_each_outcome_by_name() -> None:
    assert read_junit(XML) == {
        "tests.test_chat::test_sent": PASSED,
        "tests.test_chat::test_full": FAILED,
        "tests.test_chat::test_closed": FAILED,
        "tests.test_chat::test_celery": SKIPPED,
        "tests.test_broken": FAILED,
    }


def test_verdict_without_difference_from_the_table_has_no_complaints() -> None:
    verdict = Verdict(
        outcomes={"sent": PASSED, "pools": FAILED, "broken": FAILED, "celery": SKIPPED},
        own={"sent": PASSED, "pools": PASSED, "broken": FAILED, "celery": SKIPPED},
        expected={"pools": "Redis' pools"},
    )

    assert verdict.fails_itself == ["broken"]
    assert verdict.complaints == []


def test_verdict_with_an_unexpected_failure_complains() -> None:
    verdict = Verdict({"sent": FAILED}, {"sent": PASSED}, {})

    assert verdict.complaints == ["failed: sent"]


def test_verdict_with_an_expected_failure_that_does_not_fail_complains() -> None:
    verdict = Verdict(
        outcomes={"sent": PASSED, "broken": FAILED},
        own={"sent": PASSED, "broken": FAILED},
        expected={"sent": "reason", "broken": "reason", "gone": "reason"},
    )

    assert verdict.complaints == [
        "expected to fail, but fails with the package's own layer too: broken",
        "expected to fail, but does not exist: gone",
        "expected to fail, but has passed: sent",
    ]


def test_verdict_without_all_tests_of_the_own_run_complains() -> None:
    assert Verdict({"sent": PASSED}, {"sent": PASSED, "full": PASSED}, {}).complaints == [
        "not run: full"
    ]
    assert Verdict({}, {}, {}).complaints == ["no test passes with the package's own layer"]


def test_read_remains_names_tasks_of_the_layer_and_kept_connections() -> None:
    log = """
PytestWarning: ... OperationalError('database "test_suite" is being accessed by other users
Task was destroyed but it is pending!
task: <Task pending name='Task-8' coro=<Tasks.succeed() running at /pg_layer/tasks.py:69> wait_for=
task: <Task pending name='Task-9' coro=<Tasks.succeed() done, defined at /pg_layer/tasks.py:59>
task: <Task pending coro=<PostgresChannelLayer.receive() running at /pg_layer/layer.py:9>
task: <Task pending name='Task-1' coro=<Queue.get() running at /python/asyncio/queues.py:158>
"""
    remains = read_remains(log, "/pg_layer")

    assert remains == [
        "a pending task: Tasks.succeed()",
        "connections to the test database, which cannot be dropped",
    ]
    assert read_remains("1 passed in 0.1s", "/pg_layer") == []


def test_verdict_with_remains_complains() -> None:
    verdict = Verdict({"sent": PASSED}, {"sent": PASSED}, {}, ["a pending task: Tasks.succeed()"])

    assert verdict.complaints == ["left a pending task: Tasks.succeed()"]


def test_report_counts_and_lists_complaints() -> None:
    verdict = Verdict(
        {"sent": PASSED, "full": FAILED, "pools": FAILED},
        {"sent": PASSED, "full": PASSED, "pools": PASSED},
        {"pools": "Redis' pools"},
    )

    *_, row, complaint = report({"chat": verdict}).splitlines()

    assert row.split() == ["chat", "1", "2", "1", "3", "0"]
    assert complaint == "chat: failed: full"


def test_suites_have_a_reason_for_each_expected_failure() -> None:
    assert all(reason for suite in SUITES for reason in suite.expected.values())
    assert len({suite.package for suite in SUITES}) == len(SUITES)
