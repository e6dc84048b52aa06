"""`--module-budget=SECONDS`: which test modules took more processor time than that, printed at the end of a run.

Processor time is this process's and that of the children that it has waited for, user and system. Waiting costs
nothing, and a busy machine changes little. Each report of a test's setup, call or teardown carries its own in
`user_properties`, which pytest-xdist takes from the workers to the process that prints. What a module costs to import
is taken from its collection; under xdist every worker imports every module, and the largest of them counts.
"""

from __future__ import annotations

import os
from collections import defaultdict

import pytest

NAME = "processor_s"
elsewhere: list[float] = []  # seconds of processes that no test waits for, told by those who start them


def add_option(parser: pytest.Parser) -> None:
    parser.addoption(
        "--module-budget", type=float, metavar="SECONDS", help="print the modules above this processor time"
    )


def spent_s() -> float:
    """Processor time of this process and of what it has started so far, in seconds."""
    return sum(os.times()[:4]) + sum(elsewhere)


class ProcessorTime:
    """The plugin: it measures where tests run, and adds up and prints where reports arrive."""

    def __init__(self, budget_s: float | None, worker: bool):
        self.budget_s, self.worker, self.last = budget_s, worker, spent_s()
        self.tests: dict[str, float] = defaultdict(float)
        self.imports: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self, collector):
        begun = spent_s()
        report = yield
        if isinstance(collector, pytest.Module):
            self.imports[collector.nodeid] = round(spent_s() - begun, 3)
        return report

    def pytest_runtestloop(self):
        self.last = spent_s()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self):
        report = yield
        now = spent_s()
        report.user_properties.append((NAME, round(now - self.last, 3)))
        self.last = now
        return report

    def pytest_runtest_logreport(self, report):
        self.tests[report.nodeid.partition("::")[0]] += sum(s for name, s in report.user_properties if name == NAME)

    def pytest_sessionfinish(self, session):
        if self.worker:
            session.config.workeroutput[NAME] = self.imports

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node):
        for module, seconds in getattr(node, "workeroutput", {}).get(NAME, {}).items():
            self.imports[module] = max(seconds, self.imports.get(module, 0.0))

    def pytest_terminal_summary(self, terminalreporter):
        if self.budget_s is None:
            return
        terminalreporter.section(f"modules above {self.budget_s:g} s of processor time")
        total = {module: seconds + self.imports.get(module, 0.0) for module, seconds in self.tests.items()}
        for module, seconds in sorted(total.items(), key=lambda found: -found[1]):
            if seconds > self.budget_s:
                imports = self.imports.get(module, 0.0)
                terminalreporter.line(f"{seconds:7.1f} s  {module}  (its import {imports:.1f} s)")
        terminalreporter.line(f"{sum(total.values()):7.1f} s  all {len(total)} modules")
