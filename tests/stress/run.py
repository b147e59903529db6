# SPDX-License-Identifier: Apache-2.0
"""The stress test: everything at once, for a time, against a model that knows every byte.

    run.py [--seconds 60] [--seed N] [--backend-env NAME=VALUE]...

Rounds of several seconds each. In a round a backend serves two images under a capacity smaller than
they are, while guests come, go, are killed and frozen, and operators evict, pin, warm, audit and
change quotas; threads of the core are held up at random places, and sources fail. Twice in a round
everything pauses: the audit must be clean, invariants hold, what failed be repaired, and every
guest see every byte as it must. At a round's end nothing may be left.

The seed decides what is tried, not how threads interleave. Exits 0 if nothing was wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from stress_round import RoundRun

ROUND_SECONDS = 9.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", default=os.environ.get("COWSHED_TEST_SEED") or None)
    parser.add_argument("--first-round", type=int, default=0)
    parser.add_argument(
        "--backend-env",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="for the backend only",
    )
    parser.add_argument(
        "--slowness", type=float, default=1.0, help="how many times longer answers may take"
    )

    arguments = parser.parse_args()
    seed = arguments.seed or str(random.SystemRandom().randrange(1 << 32))
    env = dict(item.split("=", 1) for item in arguments.backend_env)
    print(f"stress: seed {seed} (COWSHED_TEST_SEED={seed} repeats it)", flush=True)
    nr_rounds = max(1, round(arguments.seconds / ROUND_SECONDS))
    for no in range(arguments.first_round, arguments.first_round + nr_rounds):
        with tempfile.TemporaryDirectory(prefix="cowshed-stress-") as folder:
            Path(folder).chmod(0o755)
            started = time.monotonic()
            run = RoundRun(
                random.Random(f"{seed}:{no}"), no, Path(folder), env, 60 * arguments.slowness
            )
            print(f"stress: {run.round}", flush=True)
            summary = run.run(arguments.seconds / nr_rounds)
            seconds = time.monotonic() - started
            if summary is None:
                print(f"stress: FAILED in round {no}; seed {seed}", flush=True)
                return 1
            print(f"stress: round {no} took {seconds:.1f} s: {summary}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
