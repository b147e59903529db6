# SPDX-License-Identifier: Apache-2.0
"""Each case of mapper.c, a program that maps in every way there is, sees the image's bytes."""

import re
import subprocess
from pathlib import Path

import pytest
from attached import ROOM, Attached


def cases_of(source: Path) -> list[str]:
    """The names in its table."""
    return re.findall(r'^\t\{"(\w+)"', source.read_text(), re.MULTILINE)


CASES = [name for source in sorted(ROOM.glob("mapper_*.c")) for name in cases_of(source)]


@pytest.mark.parametrize("case", CASES)
def test_a_program_that_maps(case: str, shared: Attached, mapper: Path) -> None:
    ended = shared.run(mapper, case, "{image}", shared.copy)
    assert ended.returncode == 0, ended.stderr
    assert shared.daemon.mismatches() == []


@pytest.mark.parametrize("case", cases_of(ROOM / "mapper_ends.c"))
def test_an_ordinary_file_is_no_different(case: str, shared: Attached, mapper: Path) -> None:
    subprocess.run([mapper, case, shared.copy, shared.copy], check=True)


def test_a_bare_clone_takes_nothing_from_its_parent(attached: Attached, mapper: Path) -> None:
    """With a daemon that has loaded nothing: an unguarded page would be zeros."""
    ended = attached.run(mapper, "bare_clone_begins_anew", "{image}", attached.copy)
    assert ended.returncode == 0, ended.stderr
