# SPDX-License-Identifier: Apache-2.0
"""The case restart in its smallest form: it measures all it promises, and leaves nothing behind."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from domains import until

ROOT = Path(__file__).resolve().parents[2]

# The measurements are of the first test that wants them, and take long on a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The JSON of one round, and what was there afterwards."""
    out, temporary = tmp_path_factory.mktemp("bench"), tmp_path_factory.mktemp("t")
    command = [sys.executable, str(ROOT / "bench/run.py"), "--quick", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--only", "restart", "--out", str(out)],
        env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
        check=False,
        timeout=380,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "bench.json").read_text())
    # What it has killed may take a while to be gone.
    with contextlib.suppress(AssertionError):
        until(lambda: not processes_that_name(temporary))
    report["left"] = [*temporary.iterdir(), *processes_that_name(temporary)]
    report["text"] = done.stdout
    return report


def processes_that_name(folder: Path) -> list[str]:
    lines = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line:
            lines.append(f"{process.name}: {line}")
    return lines


def rows_of(report: Any) -> dict[str, Any]:
    (case,) = report["cases"]
    return {row["name"]: row for row in case["rows"]}


def test_no_access_failed_whatever_was_done_to_the_backend(report: Any) -> None:
    rows = [row for name, row in rows_of(report).items() if "right answers" in name]
    assert len(rows) >= 2
    for row in rows:
        assert row["sides"]["right"]["median"] == row["sides"]["made"]["median"] > 0, row["name"]


def test_stalls_stand_beside_those_of_a_time_when_nothing_is_done(report: Any) -> None:
    rows = [
        row
        for name, row in rows_of(report).items()
        if name.startswith(("restarts, ", "drain, ")) and "answers" not in name
    ]
    assert len(rows) >= 3
    for row in rows:
        assert row["sides"]["nothing"]["nr"] == 1
        assert any(ratio["aim"] for ratio in row["ratios"]), row["name"]


def test_everything_is_measured_that_was_promised(report: Any) -> None:
    names = " / ".join(rows_of(report))
    for part in ("mapped guests", "over tcp", "drain, ", "hits in", "MiB private"):
        assert part in names


def test_nothing_is_left_behind(report: Any) -> None:
    assert report["left"] == []
