# SPDX-License-Identifier: Apache-2.0
"""Single faults: the cost of a trap to the backend, against a byte through pipes and back.

Windows are one page, so each page of a random order is a separate fault. The peer is the cost of a
round trip between any two processes with the same placement on CPUs. A round trip on one CPU takes
half as long as one between two, and the scheduler does not place faults and ping-pongs alike: where
a row leaves the placement to it, the ping-pong is put where the faults before it were.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from cases import Bench, CaseResult, Row, Side, explain
from stats import Aim, compare

__all__ = ["fault"]

FAULT_AIM = Aim(1.5)
NR_FAULTS = 2048


def fault(bench: Bench) -> CaseResult:
    """Measure single-fault latency on one CPU, on two, and unpinned."""
    bench.served.request("warm", image="warm")
    cpus = sorted(os.sched_getaffinity(0))
    placements: dict[str, tuple[list[int], list[int]]] = {"one CPU": (cpus[:1], cpus[:1])}
    if len(cpus) > 1:
        placements["two CPUs"] = (cpus[:1], cpus[1:2])
    placements["anywhere"] = (cpus, cpus)
    result = CaseResult(
        "one random single-page fault, against a ping-pong over pipes with the same placement",
        [],
        [
            "a sample is the median of a round's faults; a few disturbed faults affect the mean",
            "the daemon spins for the next fault for some time before it sleeps: us_in_handler",
        ],
    )
    for label, (ours, theirs) in placements.items():
        pooled: dict[str, list[list[int]]] = {"fault": [], "ping-pong": []}
        places = _Places(ours, theirs)
        sides = {
            "fault": _faults(bench, pooled["fault"], places),
            "ping-pong": _pings(bench, pooled["ping-pong"], places),
        }
        ratios = [("fault", "ping-pong", FAULT_AIM)]
        row = Row.measure(bench, f"round trip, {label}", "us", sides, ratios)
        for name, rounds in pooled.items():
            row.samples[f"{name}, mean"] = [float(np.mean(each)) / 1e3 for each in rounds[1:]]
        row.ratios.append(compare(row.samples, "fault, mean", "ping-pong, mean"))
        result.rows.append(row)
        for name, rounds in pooled.items():
            percents = list(np.linspace(0, 99.5, 200))
            values = [float(ns) / 1e3 for ns in np.percentile(rounds[1:], percents)]
            result.curves.append((f"{name}, {label}", values, [float(p) for p in percents]))
    bench.worker.call("pin", cpus=cpus)
    return result


@dataclass
class _Places:
    """The CPUs of a row, and whether the last faults were between two CPUs."""

    guest: list[int]
    handler: list[int]
    apart: bool = False

    def alike(self) -> tuple[list[int], list[int]]:
        """Return the CPUs for the two ends of the ping-pong."""
        return self.guest[:1], self.handler[-1:] if self.apart else self.guest[:1]


def _faults(bench: Bench, pooled: list[list[int]], places: _Places) -> Side:
    def measure() -> tuple[float, dict[str, float]]:
        bench.worker.call("pin", cpus=places.guest)
        cpus = places.handler
        nr = min(NR_FAULTS, bench.warm.stat().st_size // 4096)
        seed = bench.rng.randrange(1 << 30)
        answer = bench.worker.call("each", place="warm", nr=nr, seed=seed, fault_cpus=cpus)
        where = explain(answer, nr) | {
            "handler_may_use_cpus": len(answer["handler_cpus"]),
            "apart": answer["apart"],
        }
        places.apart = answer["apart"] >= 0.5
        return _medians(answer, pooled, where)

    return measure


def _pings(bench: Bench, pooled: list[list[int]], places: _Places) -> Side:
    def measure() -> tuple[float, dict[str, float]]:
        ours, theirs = places.alike()
        bench.worker.call("pin", cpus=ours)
        return _medians(bench.worker.call("ping", nr=NR_FAULTS, pong_cpus=theirs), pooled, {})

    return measure


def _medians(
    answer: dict[str, Any], pooled: list[list[int]], where: dict[str, float]
) -> tuple[float, dict[str, float]]:
    each_ns = answer["each_ns"]
    pooled.append(each_ns)
    median, p99 = (float(ns) / 1e3 for ns in np.percentile(each_ns, [50, 99]))
    return median, {"us_p99": p99, **where}
