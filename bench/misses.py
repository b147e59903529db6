# SPDX-License-Identifier: Apache-2.0
"""Compares eviction policies on sequences of accesses: `python bench/misses.py [--only NAME]...`.

Prints a table of misses for three capacities of each workload: an eighth, a quarter and a half of
the extents that it uses. With --write it replaces the table in docs/eviction.md. Workloads whose
programs or data are missing are named with the reason, and left out.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from backend import BenchError
from replay import POLICIES
from workloads import WORKLOADS

PAGE: Final = Path(__file__).parent.parent / "docs" / "eviction.md"
_BEGIN, _END = "<!-- misses: begin -->\n", "<!-- misses: end -->\n"
_PARTS: Final = (8, 4, 2)
_SEED: Final = 1


def rows(name: str, accesses: list[int]) -> Iterator[str]:
    """Yield a row of the table for each capacity."""
    nr_used = len(set(accesses))
    for part in _PARTS:
        capacity = max(16, nr_used // part)
        misses = {policy: count(accesses, capacity) for policy, count in POLICIES.items()}
        cells = " | ".join(f"{nr:,}" for nr in misses.values())
        ratio = misses["cowshed"] / misses["LRU"]
        sizes = f"{len(accesses):,} | {capacity:,} of {nr_used:,}"
        yield f"| {name} | {sizes} | {cells} | {ratio:.2f} |"


def main() -> int:
    """Measure the workloads asked for and print their rows."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", action="append", choices=list(WORKLOADS), metavar="NAME")
    parser.add_argument("--write", action="store_true", help=f"write the table into {PAGE.name}")
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("--write replaces the whole table: leave --only out")
    head = ["workload", "accesses", "capacity, extents", *POLICIES, "cowshed / LRU"]
    table = [f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    print("\n".join(table))
    is_whole = True
    for name in options.only or WORKLOADS:
        try:
            with tempfile.TemporaryDirectory() as folder:
                accesses = WORKLOADS[name](Path(folder), random.Random(_SEED))
        except BenchError as error:
            print(f"misses: {name} is left out: {error}", file=sys.stderr)
            is_whole = False
            continue
        for row in rows(name, accesses):
            table.append(row)
            print(row, flush=True)
    if options.write and not is_whole:
        print("misses: nothing is written, since rows are missing", file=sys.stderr)
        return 1
    if options.write:
        text = PAGE.read_text()
        before, _, rest = text.partition(_BEGIN)
        after = rest.partition(_END)[2]
        PAGE.write_text(f"{before}{_BEGIN}\n" + "\n".join(table) + f"\n\n{_END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
