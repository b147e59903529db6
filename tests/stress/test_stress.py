# SPDX-License-Identifier: Apache-2.0
"""The stress test as one test of the suite; run.py says what it does, and runs by hand too.

COWSHED_STRESS_SECONDS makes it longer (or shorter) than a minute.
"""

import faulthandler
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

RUN = Path(__file__).parent / "run.py"
SECONDS = float(os.environ.get("COWSHED_STRESS_SECONDS") or 60)
# A sanitizer is for the backend alone: see tools/sanitize.sh.
OF_SANITIZERS = ("LD_PRELOAD", "PYTHONPATH")


@pytest.mark.timeout(3 * SECONDS + 120)
def test_no_byte_is_wrong_nobody_hangs_and_nothing_is_left_under_stress(
    rng: random.Random,
) -> None:
    faulthandler.cancel_dump_traceback_later()  # the suite's bound is below ours
    command = [sys.executable, str(RUN), "--seconds", str(SECONDS)]
    command += ["--seed", str(rng.randrange(1 << 32))]
    env = dict(os.environ)
    if "LD_PRELOAD" in env:
        command += ["--slowness", "4"]
        for name in OF_SANITIZERS:
            command += ["--backend-env", f"{name}={env.pop(name)}"]
    run = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    print(run.stdout.decode(errors="replace"))
    status = run.returncode
    assert status == 0, "see the seed and what was seen, in the output"
