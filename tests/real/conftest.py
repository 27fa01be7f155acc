"""Figures of the walks with real models, shown when the tests are over."""

from __future__ import annotations

import pytest

FIGURES: dict[str, str] = {}


@pytest.fixture(scope="session")
def figures() -> dict[str, str]:
    """Return what to note figures in: what was measured, and the figure with its unit."""
    return FIGURES


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the figures."""
    for name, figure in FIGURES.items():
        terminalreporter.write_line(f"  {name}: {figure}")
