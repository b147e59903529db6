# SPDX-License-Identifier: Apache-2.0
"""The parts of cases: their parameters, the rows they return, and interleaved rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from backend import Served, WorkerProcess
from stats import Aim, Ratio, compare

__all__ = ["Bench", "CaseResult", "Row", "Side", "interleave"]

MIN_ROUNDS = 3
# Measures one side once; returns the sample, and figures that show where the time went.
Side = Callable[[], tuple[float, dict[str, float]]]


@dataclass(frozen=True)
class Bench:
    """The parameters of every case. "warm" and "cold" are also the names of the served images.

    A row has that many rounds unless row_seconds end first; quick means small images, few rounds.
    """

    served: Served
    worker: WorkerProcess
    warm: Path
    cold: Path
    build_dir: Path
    rounds: int
    row_seconds: float
    quick: bool
    rng: Random
    say: Callable[[str], None]


@dataclass
class Row:
    """One measurement on several sides in the same rounds: samples[side][round], in unit.

    where[side] shows where the time went: medians over rounds of each figure.
    """

    name: str
    unit: str
    samples: dict[str, list[float]]
    ratios: list[Ratio]
    where: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def measure(
        cls,
        bench: Bench,
        name: str,
        unit: str,
        sides: dict[str, Side],
        ratios: Sequence[tuple[str, str, Aim | None]],
    ) -> Row:
        """Measure the sides in turn and compare them: ratios are (of, to, aim)."""
        bench.say(name)
        samples, where = interleave(bench, sides)
        return cls(name, unit, samples, [compare(samples, *ratio) for ratio in ratios], where)


@dataclass
class CaseResult:
    """A case's rows, and remarks for the reader. curves are for the plot: label, xs, ys."""

    title: str
    rows: list[Row]
    notes: list[str] = field(default_factory=list)
    curves: list[tuple[str, list[float], list[float]]] = field(default_factory=list)


def interleave(
    bench: Bench, sides: dict[str, Side]
) -> tuple[dict[str, list[float]], dict[str, dict[str, float]]]:
    """Measure every side once a round, in an order drawn anew each round; round 0 is not counted.

    So a long disturbance affects all sides alike, and no side always follows the same other.
    """
    samples: dict[str, list[float]] = {name: [] for name in sides}
    details: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    deadline = time.monotonic() + bench.row_seconds
    for number in range(bench.rounds + 1):
        if number > MIN_ROUNDS and time.monotonic() > deadline:
            break
        for name in bench.rng.sample(sorted(sides), len(sides)):
            sample, detail = sides[name]()
            if number:
                samples[name].append(sample)
                details[name].append(detail)
    return samples, {name: _medians(rounds) for name, rounds in details.items() if any(rounds)}


def _medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {
        key: sorted(detail.get(key, 0.0) for detail in rounds)[len(rounds) // 2]
        for key in rounds[0]
    }


def explain(answer: dict[str, Any], nr_pages: int) -> dict[str, float]:
    """Return a worker's answer as figures that show where its time went, some per page.

    us_in_handler and us_handler_waited are of the daemon's thread for the guest: on a CPU, and
    ready but without one. us_on_cpu is the measuring thread's own CPU time.
    """
    cost = answer.get("cost", {})
    where: dict[str, float] = {}
    if "minor_faults" in cost:
        where["us_on_cpu"] = cost["cpu_ns"] / nr_pages / 1e3
        where["kernel_faults"] = cost["minor_faults"] + cost["major_faults"]
        where["slept"] = cost["switches_voluntary"]
        where["preempted"] = cost["switches_forced"]
    if "mapped_pages" in answer:
        where["us_again"] = answer["again_ns"] / nr_pages / 1e3
        where["mapped_pages"] = answer["mapped_pages"]
        where["us_attach"] = answer["attach_ns"] / 1e3
    if "guest" in answer:
        kinds = answer["guest"]["faults"]
        faults = sum(kinds.values())
        handler = answer["daemon"].get("cow-faults", {})
        where["faults"] = faults
        where |= {f"of_them_{kind}": nr for kind, nr in kinds.items() if nr}
        where["faults_per_mib"] = faults / (nr_pages / 256)
        where["pages_per_fault"] = answer.get("mapped_pages", nr_pages) / max(1, faults)
        where["us_in_handler"] = handler.get("run_ns", 0) / nr_pages / 1e3
        where["us_handler_waited"] = handler.get("wait_ns", 0) / nr_pages / 1e3
        where["handler_slept"] = handler.get("slept", 0)
        where["handler_preempted"] = handler.get("preempted", 0)
        where["misses"] = answer["guest"]["misses"]
        loader = answer["daemon"].get("cow-loader", {})
        if loader.get("run_ns"):
            where["ms_in_loaders"] = loader["run_ns"] / 1e6
            where["ms_loaders_waited"] = loader["wait_ns"] / 1e6
            where["loaders_slept"] = loader["slept"]
    return where
