# SPDX-License-Identifier: Apache-2.0
"""A run's results, as text for people and as JSON for programs: see docs/benchmarks.md."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from typing import Any

from cases import CaseResult, Row
from stats import Ratio, summarise

__all__ = ["case_json", "case_text", "machine_text", "verdict"]

JSON_VERSION = 1
INDENT = " " * 6


def verdict(ratio: Ratio) -> str:
    """Return whether an aim is met, and whether the rounds agree about it, as text."""
    if ratio.aim is None:
        return "no aim"
    unclear = "" if ratio.clear else " (unclear)"
    return f"aim {ratio.aim}: {'met' if ratio.met else 'MISSED'}{unclear}"


def case_json(name: str, result: CaseResult, load: dict[str, Any]) -> dict[str, Any]:
    """Return a case as an object of the JSON file."""
    return {
        "name": name,
        "title": result.title,
        "load": load,
        "notes": result.notes,
        "rows": [_row_json(row) for row in result.rows],
    }


def _row_json(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "unit": row.unit,
        "sides": {
            side: {**asdict(summarise(samples)), "samples": samples}
            for side, samples in row.samples.items()
        },
        "ratios": [
            {
                "of": ratio.of,
                "to": ratio.to,
                "value": ratio.value,
                "low": ratio.low,
                "high": ratio.high,
                "aim": None if ratio.aim is None else str(ratio.aim),
                "met": ratio.met,
                "clear": ratio.clear,
            }
            for ratio in row.ratios
        ],
        "where": row.where,
    }


def machine_text(machine: dict[str, Any]) -> str:
    """Return the machine's description in three lines."""
    return (
        f"{machine['cpu']}, {machine['cpus']} CPUs{' (virtual)' if machine['virtual'] else ''}, "
        f"{machine['memory_bytes'] / (1 << 30):.0f} GiB; Linux {machine['kernel']}\n"
        f"load {machine['loadavg'][0]:.2f}, clock {machine['clock_ns']} ns a reading, readahead "
        f"{machine['readahead_kb']} KiB, shmem THP {machine['shmem_thp']}\n"
        f"commit {machine['commit']}, Python {machine['python']}"
    )


def case_text(name: str, result: CaseResult, load: dict[str, Any]) -> str:
    """Return a case as lines: for each row its sides, its ratios, and where the time went."""
    lines = [f"\n{name}: {result.title}"]
    mark = "   ** NOISY: others used this machine meanwhile **" if load["noisy"] else ""
    lines.append(
        f"  {load['seconds']:.0f} s, loadavg {load['loadavg_before']:.2f} to "
        f"{load['loadavg_after']:.2f}, CPUs used by us {load['our_cpus']:.2f}, by others "
        f"{load['other_cpus']:.2f}, stolen {load['stolen_cpus']:.3f}{mark}"
    )
    for row in result.rows:
        lines.append(f"  {row.name} [{row.unit}]")
        for side, samples in row.samples.items():
            lines.append(f"    {side:<28}{_spread(samples)}")
            if where := row.where.get(side):
                figures = ", ".join(f"{key} {_number(value)}" for key, value in where.items())
                lines += [INDENT + line for line in textwrap.wrap(figures, 98)]
        for ratio in row.ratios:
            interval = "" if ratio.low is None else f" ({ratio.low:.2f} to {ratio.high:.2f})"
            what = f"{ratio.of} / {ratio.to}"
            lines.append(f"    = {what:<38} {ratio.value:.3g}{interval}  {verdict(ratio)}")
    return "\n".join([*lines, *(f"  - {note}" for note in result.notes)])


def _spread(samples: list[float]) -> str:
    if len(samples) == 1:
        return _number(samples[0])
    s = summarise(samples)
    return (
        f"{_number(s.median):>8}  min {_number(s.min)}  quartiles {_number(s.q1)} to "
        f"{_number(s.q3)}  max {_number(s.max)}  n {s.nr}"
    )


def _number(value: float) -> str:
    return f"{value:.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.3g}"
