# SPDX-License-Identifier: Apache-2.0
"""Faults against .editorconfig are found, and hooks before a commit agree with `make check`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]


def look(*paths: Path) -> subprocess.CompletedProcess[str]:
    script = ROOT / "tools/layout.py"
    return subprocess.run([sys.executable, script, *paths], capture_output=True, text=True)


def test_the_tree_is_laid_out() -> None:
    assert (look().returncode, look().stderr) == (0, "")


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"\xe9t\xe9\n", "byte 0 is not utf-8"),
        (b"one\r\ntwo\r\n", "carriage return"),
        (b"one\ntwo", "does not end with a newline"),
        (b"one\ntwo \n", ":2: white space at the end of the line"),
        (b"one:\n\ttwo\n", ":2: is indented with a tab"),
    ],
)
def test_each_fault_is_found(tmp_path: Path, content: bytes, fault: str) -> None:
    (tmp_path / ".editorconfig").write_bytes((ROOT / ".editorconfig").read_bytes())
    path = tmp_path / "file.yaml"
    path.write_bytes(content)
    done = look(path)
    assert done.returncode == 1
    assert fault in done.stderr
    path.write_bytes(b"one\ntwo\n")
    assert (look(path).returncode, look(path).stderr) == (0, "")


def test_what_runs_before_a_commit_runs_in_check_too() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    check = (ROOT / "Makefile").read_text().partition("\ncheck:")[2].partition("\n\n")[0]
    entries = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    assert len(entries) == 5
    for entry in entries:
        tool = re.match(r"\.venv/bin/((?:ruff|python) \S+|\S+)", entry)
        assert tool is not None, entry
        assert f"$(BIN)/{tool[1]}" in check, f"`make check` does not run {tool[1]}"
