# SPDX-License-Identifier: Apache-2.0
"""All that reads a peer's bytes: the corpus again, random bytes, and a guided fuzzer for a while.

`make fuzz FUZZ_SECONDS=600` does the last for longer.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))
from targets import TARGETS, run

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
SEEDS = sorted((HERE / "corpus").glob("*/*.hex"))


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: f"{seed.parent.name}-{seed.stem}")
def test_what_was_found_before_is_no_defect_now(seed: Path) -> None:
    run(seed.parent.name, bytes.fromhex(seed.read_text()))


def test_every_target_has_a_corpus() -> None:
    assert {seed.parent.name for seed in SEEDS} == set(TARGETS)


@pytest.mark.parametrize("name", TARGETS)
@given(said=st.binary(max_size=300))
def test_random_bytes_are_no_defect(name: str, said: bytes) -> None:
    run(name, said)


@pytest.mark.parametrize("name", TARGETS)
@given(data=st.data())
def test_spoiled_seeds_are_no_defect(name: str, data: st.DataObject) -> None:
    mine = [seed for seed in SEEDS if seed.parent.name == name]
    said = bytearray(bytes.fromhex(data.draw(st.sampled_from(mine)).read_text()))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(said)))
        said[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=6))
    run(name, bytes(said))


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None, reason="needs atheris, which has wheels for x86-64"
)
@pytest.mark.parametrize("name", TARGETS)
def test_a_guided_fuzzer_finds_nothing_in_a_short_while(name: str) -> None:
    seconds = os.environ.get("FUZZ_SECONDS", "2")
    done = subprocess.run(
        [sys.executable, str(HERE / "fuzz.py"), name, seconds],
        capture_output=True,
        text=True,
        check=False,
        timeout=int(seconds) + 150,
    )
    assert done.returncode == 0, done.stderr[-3000:]
