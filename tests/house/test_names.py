# SPDX-License-Identifier: Apache-2.0
"""Lint refuses the imports that would work here by accident and nowhere else."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RUFF = Path(sys.executable).with_name("ruff")


def rules_broken_by(line: str, in_file: str) -> list[str]:
    options = ["--select=TID", "--output-format=concise", "--quiet", "--no-cache"]
    result = subprocess.run(
        [RUFF, "check", *options, f"--stdin-filename={ROOT / in_file}", "-"],
        input=line + "\n",
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    return [found.split()[1] for found in result.stdout.splitlines()]


@pytest.mark.parametrize("name", ["accounting", "cache", "faults", "service", "transport"])
def test_bare_import_of_a_room_is_refused(name: str) -> None:
    assert rules_broken_by(f"import {name}", "service/cli.py") == ["TID251"]
    assert rules_broken_by(f"from {name}.errors import Thing", "tests/t.py") == ["TID251"]


def test_relative_import_is_refused() -> None:
    assert "TID252" in rules_broken_by("from . import errors", "cache/store.py")


def test_absolute_import_is_kept() -> None:
    assert rules_broken_by("from cowshed.cache.errors import UsageError", "service/cli.py") == []


def test_every_source_names_its_licence() -> None:
    rooms = [
        "accounting",
        "bench",
        "cache",
        "dashboards",
        "examples",
        "faults",
        "service",
        "tests",
        "tools",
        "transport",
    ]
    without = [
        path.relative_to(ROOT).as_posix()
        for room in rooms
        for kind in ("*.py", "*.pyi", "*.c", "*.h", "*.sh")
        for path in (ROOT / room).rglob(kind)
        if "SPDX-License-Identifier: Apache-2.0" not in "".join(path.read_text().splitlines()[:2])
    ]
    assert without == []
