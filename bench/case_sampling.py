# SPDX-License-Identifier: Apache-2.0
"""The price of the estimates: what random probes cost the backend, and what a guest notices.

Two backends serve the same image, all of it resident and mapped: one makes probes, one has no
standby list and makes none. Nothing is evicted, so the probes are the only difference.
"""

from __future__ import annotations

from typing import Any

from backend import Served, WorkerProcess
from cases import Bench, CaseResult, Row, Side
from stats import Aim

__all__ = ["sampling"]

CPU_PERCENT = 0.5
P99_AIM = Aim(1.05)
SECONDS = 4.0
QUICK_SECONDS = 0.5


def sampling(bench: Bench) -> CaseResult:
    """Measure the CPU that probes take, at rest and under load, and the guest's slow touches."""
    images = {"warm": bench.warm}
    capacity_bytes = 2 * bench.warm.stat().st_size
    out = bench.build_dir
    with (
        Served(images, capacity_bytes) as probing,
        Served(images, capacity_bytes, ["--standby", "0"]) as plain,
        WorkerProcess(out, probing) as of_probing,
        WorkerProcess(out, plain) as of_plain,
    ):
        workers = {"probing": of_probing, "plain": of_plain}
        allowed = {"allowed": lambda: (CPU_PERCENT, {})}
        ratio = [("probes", "allowed", Aim(1.0))]
        rows = [
            Row.measure(
                bench, f"CPU {when}", "%", {"probes": _cpu(bench, workers, seed), **allowed}, ratio
            )
            for when, seed in (("at rest", None), ("under load", 1))
        ]
        ratio = [("probing", "plain", P99_AIM)]
        for what, key in (("99th of 100 touches", "ns_p99"), ("slowest touch of all", "ns_max")):
            sides = {name: _touches(bench, worker, key) for name, worker in workers.items()}
            rows.append(Row.measure(bench, what, "ns", sides, ratio if key == "ns_p99" else []))
    return CaseResult(
        "random probes of a resident image, against none",
        rows,
        [
            "CPU is that of the backend with probes, less that of the one without",
            "about 12 touches a second meet a probe, of millions: only the slowest show it",
        ],
    )


def _stay(bench: Bench, worker: WorkerProcess, seed: int | None) -> dict[str, Any]:
    seconds = QUICK_SECONDS if bench.quick else SECONDS
    return dict(worker.call("stay", place="warm", seconds=seconds, seed=seed))


def _cpu(bench: Bench, workers: dict[str, WorkerProcess], seed: int | None) -> Side:
    def measure() -> tuple[float, dict[str, float]]:
        percent = {name: _stay(bench, worker, seed)["percent"] for name, worker in workers.items()}
        extra = max(0.0, percent["probing"] - percent["plain"])
        return extra, {f"percent_{name}": each for name, each in percent.items()}

    return measure


def _touches(bench: Bench, worker: WorkerProcess, key: str) -> Side:
    def measure() -> tuple[float, dict[str, float]]:
        found = _stay(bench, worker, bench.rng.randrange(1, 1 << 30))
        times = dict(zip(("ns_p50", "ns_p99", "ns_p999"), found["ns"], strict=True))
        times["ns_max"] = found["slowest_ns"]
        return times.pop(key), {**times, "touches": found["nr"]}

    return measure
