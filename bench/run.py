# SPDX-License-Identifier: Apache-2.0
"""Measures the cost of cowshed, as ratios to the plain kernel's in the same run.

    make bench                          every case, about eleven minutes
    .venv/bin/python bench/run.py --quick --only fault

Writes build/bench/bench.json, bench.png and bench.svg. A missed aim does not fail the run: the exit
status only reports whether it could measure. docs/benchmarks.md describes each case.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import fcntl
import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from backend import BenchError, Served, WorkerProcess
from case_cold import COLD_HUGE, cold
from case_fault import fault
from case_memory import memory
from case_nbd import nbd
from case_open import open_regions
from case_resident import first_write, resident
from case_restart import restart
from case_sampling import sampling
from case_scrape import scrape
from case_vm import vm
from cases import Bench, CaseResult
from machine import LoadWatch, describe
from native import ROOT, load
from plot import draw
from report import JSON_VERSION, case_json, case_text, machine_text, verdict

CASES: dict[str, Callable[[Bench], CaseResult]] = {
    "resident": resident,
    "open": open_regions,
    "fault": fault,
    "write": first_write,
    "cold": cold,
    "memory": memory,
    "scrape": scrape,
    "sampling": sampling,
    "nbd": nbd,
    "vm": vm,
    "restart": restart,
}
MIB = 1 << 20


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="small images, few rounds")
    parser.add_argument("--only", action="append", choices=CASES, help="this case; may be repeated")
    parser.add_argument("--rounds", type=int, help="rounds of each row (15; quick: 3)")
    parser.add_argument("--seed", type=int, default=1, help="seed of orders and pages (1)")
    parser.add_argument("--out", type=Path, default=ROOT / "build/bench", help="where files go")
    options = parser.parse_args()
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds {options.rounds}: give 1 or more")
    return options


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock the folder for this run: two at once would share each other's pages."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BenchError(
                f"another run uses {out}; wait for it, or give --out another folder"
            ) from error
        yield


def make_image(out: Path, name: str, size_bytes: int) -> Path:
    """Make a file of random bytes, or reuse that of an earlier run."""
    path = out / f"{name}-{size_bytes // MIB}M.raw"
    if not path.exists() or path.stat().st_size != size_bytes:
        generator = np.random.default_rng(7)
        with path.open("wb") as file:
            for _ in range(size_bytes // MIB):
                file.write(generator.bytes(MIB))
    # Written back, since dirty pages cannot be dropped from the page cache.
    subprocess.run(["sync", str(path)], check=True)
    return path


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run the chosen cases, print each when it is done, and return all as an object for JSON."""
    out: Path = options.out
    warm = make_image(out, "warm", (16 if options.quick else 128) * MIB)
    cold_image = make_image(out, "cold", (32 if options.quick else 256) * MIB)
    lib = load(out)
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    machine = {
        **describe(out),
        "clock_ns": int(lib.touch_clock_ns()),
        "commit": commit.stdout.strip() or "?",
    }
    print(machine_text(machine), flush=True)
    results: dict[str, CaseResult] = {}
    cases = []
    images = {"warm": warm, "cold": cold_image, COLD_HUGE: f"{cold_image},extent=2M"}
    capacity_bytes = 2 * warm.stat().st_size + 4 * cold_image.stat().st_size
    # Regions that open by themselves would change rows of guests whose faults are answered.
    settings = ["--open-regions", "pinned"]
    with (
        Served(images, capacity_bytes, settings) as served,
        WorkerProcess(out, served) as worker,
    ):
        bench = Bench(
            served=served,
            worker=worker,
            warm=warm,
            cold=cold_image,
            build_dir=out,
            rounds=options.rounds or (3 if options.quick else 15),
            row_seconds=3 if options.quick else 15,
            quick=options.quick,
            rng=random.Random(options.seed),
            say=lambda text: print(f"  ... {text}", file=sys.stderr, flush=True),
        )
        for name in options.only or CASES:
            watch = LoadWatch([served.pid, worker.pid])
            result = results[name] = CASES[name](bench)
            load_seen = watch.read()
            cases.append(case_json(name, result, load_seen))
            print(case_text(name, result, load_seen), flush=True)
    plots = [out / "bench.png", out / "bench.svg"]
    draw(results, machine_text(machine), plots)
    print(f"\n{'case':<10}{'row':<36}{'ratio':<36}aim")
    for name, result in results.items():
        for row in result.rows:
            for ratio in row.ratios:
                if ratio.aim is not None:
                    what = f"{ratio.of} / {ratio.to}"
                    start = f"{name:<10}{row.name:<36}{what:<28}"
                    print(f"{start}{ratio.value:>6.3g}  {verdict(ratio)}")
    return {
        "version": JSON_VERSION,
        "made": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine,
        "options": {"quick": options.quick, "rounds": bench.rounds, "seed": options.seed},
        "cases": cases,
    }


def main() -> int:
    """Measure, and write the JSON; return 1 if something could not be measured."""
    options = arguments()
    try:
        with locked(options.out):
            report = measure(options)
    except BenchError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    path = options.out / "bench.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwrote {path}, and bench.png and bench.svg beside it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
