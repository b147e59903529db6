# SPDX-License-Identifier: Apache-2.0
"""What conftest.py holds for every test: agreed skips, one seed, the order, output of any kind."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

CONFTEST = Path(__file__).resolve().parents[1] / "conftest.py"
SUITE = """\
import pytest

def test_that_passes():
    pass

@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.skip(reason="needs a cow")
def test_that_skips(n):
    raise AssertionError

@pytest.mark.xfail(reason="known", strict=True)
def test_that_is_expected_to_fail():
    raise AssertionError
"""


def run_suite(
    folder: Path, skips: str, ci: str, suite: str = SUITE, options: Sequence[str] = ()
) -> tuple[int, str]:
    shutil.copy(CONFTEST, folder)
    (folder / "skips.txt").write_text(skips)
    (folder / "test_suite.py").write_text(suite)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=.", *options],
        cwd=folder,
        env={**os.environ, "CI": ci},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return result.returncode, result.stdout


in_processes = pytest.mark.parametrize("options", [(), ("-n", "2")], ids=["one", "several"])


@in_processes
def test_unlisted_skip_fails_ci_and_is_named(tmp_path: Path, options: Sequence[str]) -> None:
    status, output = run_suite(tmp_path, "", ci="true", options=options)
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "test_suite.py::test_that_skips[1]: Skipped: needs a cow" in output
    assert "test_that_is_expected_to_fail" not in output


def test_unlisted_skip_is_allowed_elsewhere(tmp_path: Path) -> None:
    assert run_suite(tmp_path, "", ci="")[0] == pytest.ExitCode.OK


@pytest.mark.parametrize(
    "listed",
    ["test_suite.py", "test_suite.py::test_that_skips", "test_suite.py::test_that_skips[1]"],
)
def test_listed_skip_is_allowed(tmp_path: Path, listed: str) -> None:
    skips = f"# agreed\n{listed}\tno cows here\ntest_suite.py::test_that_skips[2]\tnor here\n"
    assert run_suite(tmp_path, skips, ci="true")[0] == pytest.ExitCode.OK


@in_processes
def test_file_that_skips_itself_fails_ci(tmp_path: Path, options: Sequence[str]) -> None:
    suite = "import pytest\npytest.skip('no herd', allow_module_level=True)\n"
    suite_beside = tmp_path / "test_beside.py"
    suite_beside.write_text("def test_that_passes():\n    pass\n")
    status, output = run_suite(tmp_path, "", ci="true", suite=suite, options=options)
    assert status == pytest.ExitCode.TESTS_FAILED
    assert "test_suite.py: Skipped: no herd" in output


def test_line_without_a_reason_is_refused(tmp_path: Path) -> None:
    assert run_suite(tmp_path, "test_suite.py\n", ci="true")[0] != pytest.ExitCode.OK


def test_seed_repeats_random_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    suite = """\
from hypothesis import given, strategies

def test_numbers(rng):
    print("drew", rng.random())
    raise AssertionError

drawn = []

@given(strategies.integers())
def test_examples(number):
    drawn.append(number)

def test_report():
    print("saw", drawn)
    raise AssertionError
"""
    monkeypatch.setenv("COWSHED_TEST_SEED", "7")
    runs = [run_suite(tmp_path, "", ci="", suite=suite)[1] for _ in range(2)]
    drew, again = (
        [line for line in output.splitlines() if line.startswith(("drew", "saw"))]
        for output in runs
    )
    assert len(drew) == 2
    assert drew == again
    assert "seed: 7" in runs[0]


def test_processes_share_the_seed_and_carry_any_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COWSHED_TEST_SEED")
    suite = """\
import logging
import os
import pytest

@pytest.mark.parametrize("no", range(4))
def test_output(no):
    logging.warning("seed %s \\ud800", os.environ["COWSHED_TEST_SEED"])
    raise AssertionError
"""
    status, output = run_suite(tmp_path, "", ci="", suite=suite, options=("-n", "2"))
    assert status == pytest.ExitCode.TESTS_FAILED
    seeds = re.findall(r"seed (\d+) \\ud800$", output, re.MULTILINE)
    assert len(seeds) == 4
    assert set(seeds) == set(re.findall(r"seed: (\d+)", output))


@in_processes
def test_started_processes_keep_what_they_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: Sequence[str]
) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (tmp_path / "imported.py").touch()
    suite = """\
import subprocess
import sys

def test_start():
    subprocess.run([sys.executable, "-c", "import imported"], check=True)
"""
    assert run_suite(tmp_path, "", ci="", suite=suite, options=options)[0] == pytest.ExitCode.OK
    assert list((tmp_path / "__pycache__").glob("imported.*.pyc"))


def test_files_that_may_take_longest_begin_first_unless_the_seed_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in (("a", 1), ("b", 3), ("c", 2)):
        tests = "".join(f"def test_{name}{no}(): pass\n" for no in range(9))
        mark = f"import pytest\npytestmark = pytest.mark.timeout({seconds})\n"
        (tmp_path / f"test_{name}.py").write_text(mark + tests)

    def order() -> str:
        output = run_suite(tmp_path, "", ci="", suite="", options=("--co",))[1]
        return "".join(re.findall(r"::test_(\w)\d", output))

    assert order() == 9 * "b" + 9 * "c" + 9 * "a"
    monkeypatch.setenv("COWSHED_TEST_ORDER", "random")
    orders = set()
    for seed in range(3):
        monkeypatch.setenv("COWSHED_TEST_SEED", str(seed))
        orders.add(order())
    assert len(orders) > 1
    assert {len(each.replace("aaaaaaaaa", "").replace("b" * 9, "")) for each in orders} == {9}
