# SPDX-License-Identifier: Apache-2.0
"""A skip that nobody agreed to fails the session in CI, and there only."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


def run_suite(folder: Path, skips: str, ci: str, suite: str = SUITE) -> tuple[int, str]:
    shutil.copy(CONFTEST, folder)
    (folder / "skips.txt").write_text(skips)
    (folder / "test_suite.py").write_text(suite)
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=."],
        cwd=folder,
        env={**os.environ, "CI": ci},
        capture_output=True,
        text=True,
        check=False,
        timeout=50,
    )
    return result.returncode, result.stdout


def test_unlisted_skip_fails_ci_and_is_named(tmp_path: Path) -> None:
    status, output = run_suite(tmp_path, "", ci="true")
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


def test_file_that_skips_itself_fails_ci(tmp_path: Path) -> None:
    suite = "import pytest\npytest.skip('no herd', allow_module_level=True)\n"
    suite_beside = tmp_path / "test_beside.py"
    suite_beside.write_text("def test_that_passes():\n    pass\n")
    status, output = run_suite(tmp_path, "", ci="true", suite=suite)
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
