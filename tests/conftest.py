# SPDX-License-Identifier: Apache-2.0
"""What holds for every test: a printed seed, no skip that nobody agreed to, and compiled modules.

A run's randomness comes from one seed, printed at the end; COWSHED_TEST_SEED=N repeats it. Under
CI=true a skipped test fails the session unless tests/skips.txt names it, so that a machine which
lacks something cannot turn the suite green by skipping it.
"""

import os
import random
import signal
from collections.abc import Generator
from pathlib import Path

import hypothesis
import pytest

SKIPS_FILE = Path(__file__).parent / "skips.txt"


def read_skips(text: str) -> dict[str, str]:
    """Return the agreed skips, reason by node id; each line is `node id<TAB>reason`.

    Blank lines and lines that start with # mean nothing. Raises ValueError for any other line.
    """
    skips: dict[str, str] = {}
    for line_no, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        node_id, tab, reason = line.partition("\t")
        if not (node_id and tab and reason.strip()):
            raise ValueError(f"skips.txt:{line_no}: {line!r}: write it as node id, tab, reason")
        skips[node_id] = reason.strip()
    return skips


def is_agreed(node_id: str, skips: dict[str, str]) -> bool:
    """Whether skips names this test: itself, all its parameters, or its whole file."""
    return bool({node_id, node_id.partition("[")[0], node_id.partition("::")[0]} & set(skips))


class SkipWatch:
    """Collects what was skipped, and fails the session at its end if CI did not agree to it."""

    def __init__(self) -> None:
        self.skipped: dict[str, str] = {}

    def note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        """Remember a skip, of a test or of a whole file; an expected failure is none."""
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else "?"
            self.skipped[report.nodeid] = reason

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self.note(report)

    def unagreed(self) -> dict[str, str]:
        """Return the skips under CI that skips.txt does not name, reason by node id."""
        if os.environ.get("CI") != "true":
            return {}
        skips = read_skips(SKIPS_FILE.read_text())
        return {name: why for name, why in self.skipped.items() if not is_agreed(name, skips)}

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unagreed() and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        unagreed = self.unagreed()
        if not unagreed:
            return
        terminalreporter.section("skipped without agreement", red=True)
        for name, why in unagreed.items():
            terminalreporter.line(f"{name}: {why}")
        terminalreporter.line("give the machine what they need, or list them in tests/skips.txt")


def _chosen_seed() -> int:
    """The seed given, else a new one, in the environment for the processes that share the tests."""
    new = str(random.SystemRandom().randrange(1 << 32))
    return int(os.environ.setdefault("COWSHED_TEST_SEED", new))


SEED = _chosen_seed()

# Container images tend to set it. Each of the suite's daemons, guests and commands would compile
# every module again, which takes longer than all else that a daemon does to start.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(SkipWatch(), "skip-watch")
    # How long an example takes says how busy the machine is.
    hypothesis.settings.register_profile(
        "any-speed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("any-speed")
    # A shell ignores Ctrl-C for what it runs in the background, and children inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if getattr(config.option, "hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(SEED)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what no encoding can carry from one process to another, such as lone surrogates."""
    report = yield
    report.sections = [
        (name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections
    ]
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have files that may take longest begin first, or one of them is waited for at the end.

    Their timeout says how long a test may take. With COWSHED_TEST_ORDER=random, the seed decides
    the order of the files and of the tests in each. A file's tests stay together.
    """
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    if os.environ.get("COWSHED_TEST_ORDER") == "random":
        order = random.Random(SEED)
        paths = order.sample(list(files), len(files))
        items[:] = [item for path in paths for item in order.sample(files[path], len(files[path]))]
    else:
        paths = sorted(files, key=lambda path: max(map(_timeout, files[path])), reverse=True)
        items[:] = [item for path in paths for item in files[path]]


def _timeout(item: pytest.Item) -> float:
    mark = item.get_closest_marker("timeout")
    return float(mark.args[0]) if mark else 0.0


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.line(f"seed: {SEED} (COWSHED_TEST_SEED={SEED} repeats it)")


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """A test's own random numbers: they follow from the seed and the test's name alone."""
    seed = f"{SEED}:{request.node.nodeid}"
    print(f"rng seed {seed}")
    return random.Random(seed)
