"""A test may be skipped only for a reason in skips.yml. UNLISTED_SKIPS=fail, as CI sets it, fails for any other."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

SKIPS: dict[str, str] = yaml.safe_load(Path(__file__).with_name("skips.yml").read_text(encoding="utf-8"))
unlisted: list[str] = []

# A shell that starts this in the background lets it ignore Ctrl-C, and so every process that a test starts.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def note(report: Any) -> None:
    """Remember a test that was skipped for a reason that is not on the list."""
    if report.skipped and not hasattr(report, "wasxfail") and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        if not any(re.search(pattern, reason) for pattern in SKIPS):
            unlisted.append(f"{report.nodeid}: {reason}")


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    note(report)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    note(report)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fail the run of the first process, which hears of the others' tests."""
    if unlisted and os.environ.get("UNLISTED_SKIPS") == "fail" and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    for test in unlisted:
        terminalreporter.write_line(f"SKIPPED without being in tests/skips.yml: {test}")
