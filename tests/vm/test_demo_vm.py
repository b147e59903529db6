# SPDX-License-Identifier: Apache-2.0
"""`make demo-vm`: what it shows when all is right, and that it would see one wrong file."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from domains import new_run_dir
from machines import Kit

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

from demo_vm_disk import Contents, checksum, parse_sums

pytestmark = pytest.mark.slow

BENCH = Path(__file__).parents[2] / "bench"


@pytest.mark.timeout(600)
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, as the demo does")
def test_a_small_demo_finds_no_wrong_byte_and_leaves_nothing_behind(kit: Kit) -> None:
    with new_run_dir() as folder:
        done = subprocess.run(
            [sys.executable, str(BENCH / "demo_vm.py"), "--size", "16M"],
            env={**os.environ, "TMPDIR": str(folder)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "All is right: wrong bytes: 0." in done.stdout
        assert done.stderr == ""
        assert max(map(len, done.stdout.splitlines())) <= 80
        assert list(folder.iterdir()) == []


def test_arguments_that_cannot_work_are_one_line_and_a_failure() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "demo_vm.py"), "--size", "1M"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("demo: ")
    assert done.stderr.count("\n") == 1


@pytest.fixture
def contents() -> Contents:
    return Contents(
        {"./bin/busybox": "b0", "./a": "a0", "./c": "c0"},
        {"./bin/busybox": 10, "./a": 20, "./c": 30},
    )


def test_every_byte_of_a_file_that_differs_is_wrong(contents: Contents) -> None:
    found = dict(contents.sums)
    assert contents.compare(found) == (0, [])
    found["./a"] = "other"
    assert contents.compare(found) == (20, ["./a"])
    del found["./c"]
    assert contents.compare(found) == (50, ["./a", "./c"])
    found["./extra"] = "e"
    assert contents.compare(found) == (51, ["./a", "./c", "./extra"])


def test_what_is_written_and_removed_is_expected(contents: Contents) -> None:
    assert contents.ordinary_names() == ["./a", "./c"]
    changed = contents.copy()
    changed.write("./a", b"xyz\n", 10)
    changed.remove("./c")
    assert contents.sums["./a"] == "a0"
    assert changed.sums["./a"] == hashlib.md5(b"xyz\nxyz\nxy").hexdigest()
    assert changed.nr_bytes == 20
    assert checksum(changed.sums) != checksum(contents.sums)


def test_sums_are_read_as_md5sum_prints_them() -> None:
    assert parse_sums("00ff  ./a b\n11ee  ./c\n") == {"./a b": "00ff", "./c": "11ee"}
