# SPDX-License-Identifier: Apache-2.0
"""The committed JSON is what the code gives, and a difference is noticed."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from board_files import DASHBOARDS, GENERATED, ROOT


def build(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "dashboards.build", *arguments],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    shutil.copytree(DASHBOARDS, tmp_path / "dashboards")
    return tmp_path


def test_committed_json_is_what_the_code_gives() -> None:
    done = build(ROOT, "--check")
    assert done.returncode == 0, done.stderr
    assert {path.stem for path in GENERATED} == {"overview", "image", "guest", "drain"}


def test_every_difference_is_named_and_mended(copy: Path) -> None:
    folder = copy / "dashboards/generated"
    wanted = {path.name: path.read_text() for path in folder.iterdir()}
    (folder / "drain.json").unlink()
    (folder / "other.json").write_text("{}\n")
    (folder / "image.json").write_text(wanted["image.json"].replace("Hit rate", "Hits"))
    done = build(copy, "--check")
    assert done.returncode == 1
    assert [line.partition(": run")[0] for line in done.stderr.splitlines()] == [
        "dashboards/generated/drain.json: missing",
        "dashboards/generated/other.json: no dashboard of that name",
        "dashboards/generated/image.json: out of date",
    ]
    assert build(copy).returncode == 0
    assert {path.name: path.read_text() for path in folder.iterdir()} == wanted


def test_unknown_argument_is_refused(copy: Path) -> None:
    done = build(copy, "--chekc")
    assert (done.returncode, done.stderr[:6]) == (2, "usage:")
