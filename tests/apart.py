"""Runs the tests that start programs as processes, and some rooms, beside all others in one second process of pytest.

The others use one core: side by side both cores are busy. Where there is only the one kind, or the debugger is asked
for, nothing runs apart. What the second process reports is shown by the first, as if it were its own.
"""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time

import pytest

# Names the file that the second process reports to.
REPORTS = "LM_TESTS_REPORTS"


# Chosen so that both processes take equally long.
ROOMS = ("interop", "scaling", "decoding", "evaluation", "benchmarks", "test_cells.py", "test_presets.py")


def is_apart(item):
    return item.get_closest_marker("system") is not None or not {item.path.parent.name, item.path.name}.isdisjoint(
        ROOMS
    )


class Second:
    """Plugin of the second process: keeps its kind of tests, and writes each report where the first one reads it."""

    def __init__(self, config):
        self.config = config

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if is_apart(item)]

    def pytest_runtest_logreport(self, report):
        data = self.config.hook.pytest_report_to_serializable(config=self.config, report=report)
        with open(os.environ[REPORTS], "a", encoding="utf-8") as file:
            file.write(json.dumps(data) + "\n")


class First:
    """Plugin of the first process: starts the second one, and shows what it reports."""

    def __init__(self):
        self.nodes = frozenset()
        self.process = None
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="lm-tests-"))

    def pytest_collection_finish(self, session):
        nodes = [item.nodeid for item in session.items if is_apart(item)]
        options = session.config.option
        if options.collectonly or options.usepdb or len(nodes) in (0, len(session.items)):
            return
        self.nodes = frozenset(nodes)
        # The same arguments and not the names of tests, which may hold what a command line takes apart.
        command = [sys.executable, "-m", "pytest", *session.config.invocation_params.args]
        environment = os.environ | {REPORTS: str(self.folder / "reports.jsonl")}
        with (self.folder / "output.txt").open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=session.config.invocation_params.dir,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def pytest_runtest_protocol(self, item):
        if item.nodeid not in self.nodes:
            return None
        hook, where = item.ihook, {"nodeid": item.nodeid, "location": item.location}
        hook.pytest_runtest_logstart(**where)
        reports = self._wait_for(item.nodeid)
        for data in reports:
            hook.pytest_runtest_logreport(report=hook.pytest_report_from_serializable(config=item.config, data=data))
        if not any(data["when"] == "teardown" for data in reports):
            hook.pytest_runtest_logreport(report=self._lost(item))
        hook.pytest_runtest_logfinish(**where)
        return True

    def _wait_for(self, node):
        """Returns the reports of a test once it is over; fewer than there should be if the process is gone."""
        file = self.folder / "reports.jsonl"
        while True:
            gone = self.process.poll() is not None
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
            found = [json.loads(line) for line in lines if line.endswith("\n")]
            found = [report for report in found if report["nodeid"] == node]
            if gone or any(report["when"] == "teardown" for report in found):
                return found
            time.sleep(0.1)

    def _lost(self, item):
        end = (self.folder / "output.txt").read_text(errors="replace")[-3000:]
        message = f"the process that runs it ended with status {self.process.returncode}:\n{end}"
        return pytest.TestReport(item.nodeid, item.location, {}, "failed", message, "call")

    def pytest_unconfigure(self):
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def pytest_configure(config):
    config.pluginmanager.register(Second(config) if REPORTS in os.environ else First(), "lm-apart")
