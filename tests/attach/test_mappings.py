# SPDX-License-Identifier: Apache-2.0
"""Each case of mapper.c, a program that maps in every way there is, sees the image's bytes."""

import re
from pathlib import Path

import pytest
from attached import ROOM, Attached

CASES = [
    name
    for source in sorted(ROOM.glob("mapper_*.c"))
    for name in re.findall(r'^\t\{"(\w+)"', source.read_text(), re.MULTILINE)
]


@pytest.mark.parametrize("case", CASES)
def test_a_program_that_maps(case: str, shared: Attached, mapper: Path) -> None:
    ended = shared.run(mapper, case, "{image}", shared.copy)
    assert ended.returncode == 0, ended.stderr
    assert shared.daemon.mismatches() == []
