# SPDX-License-Identifier: Apache-2.0
"""Compares the hit rate that the daemon shows with the true one: `python bench/hit_rates.py`.

Guests read extents of an image in a known order, and count their reads. A read of an extent that
the backend loads because of it, by its own count, is a miss; every other is a hit. Prints a row for
each scenario: true, shown with its bounds, and the difference, over the same minute. About fourteen
minutes.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import json
import math
import mmap
import multiprocessing
import random
import re
import signal
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from backend import Served

from cowshed.transport import connect

EXTENT_BYTES: Final = 64 << 10
NR_EXTENTS: Final = 1024
ALPHA: Final = 0.9
READS_PER_SECOND: Final = 2000
WARM_SECONDS: Final = 30
WINDOW_SECONDS: Final = 60
MOST_OFF: Final = 0.05

Order = Callable[[int], Iterator[int]]


def zipf(seed: int) -> Iterator[int]:
    """Yield extents, the k-th most popular k^-0.9 times as often as the first, for ever."""
    extents = list(range(NR_EXTENTS))
    random.Random(1).shuffle(extents)  # all guests like the same
    rng = random.Random(seed)
    sums = list(itertools.accumulate((rank + 1) ** -ALPHA for rank in range(NR_EXTENTS)))
    while True:
        yield extents[bisect.bisect(sums, rng.random() * sums[-1])]


def scan(_: int) -> Iterator[int]:
    """Yield all extents from first to last, for ever."""
    return itertools.cycle(range(NR_EXTENTS))


def random_scan(seed: int) -> Iterator[int]:
    """Yield all extents in a random order, for ever the same."""
    extents = list(range(NR_EXTENTS))
    random.Random(seed).shuffle(extents)
    return itertools.cycle(extents)


def even(_: int) -> Iterator[int]:
    """Yield 64 extents in turn, each between two of the others in a random order, for ever."""
    others = list(range(64, NR_EXTENTS))
    random.Random(1).shuffle(others)
    for hot, other in zip(itertools.cycle(range(64)), itertools.cycle(others), strict=False):
        yield hot
        yield other


@dataclass(frozen=True)
class Scenario:
    """What guests read, how many they are, and how many extents fit into memory."""

    name: str
    order: Order
    capacity: int
    nr_guests: int = 1
    reads_per_second: float = READS_PER_SECOND


SCENARIOS: Final = (
    Scenario("Zipf, a quarter fits", zipf, 256),
    Scenario("Zipf, half fits", zipf, 512),
    Scenario("Zipf, three quarters fit", zipf, 768),
    Scenario("Zipf, half fits, 16 guests", zipf, 512, nr_guests=16),
    Scenario("Zipf, half fits, at full speed", zipf, 512, reads_per_second=math.inf),
    Scenario("hot set at an even pace, random scan", even, 512, reads_per_second=1200),
    Scenario("scan in order, half fits", scan, 512, reads_per_second=300),
    Scenario("scan in random order, half fits", random_scan, 512, reads_per_second=300),
    Scenario("all read once, then idle", scan, 512, reads_per_second=0),
)


def read(uri: str, no: int, scenario: Scenario, counted: Any) -> None:
    """Be a guest: read a byte of one extent after the other, wait after each, and count.

    With no reads per second, read all once, and then do nothing.
    """
    rate = scenario.reads_per_second / scenario.nr_guests
    with connect(uri) as backend, backend.open("image", guest=f"guest-{no}") as disk:
        view = memoryview(disk.view)
        if not rate:
            for extent in range(NR_EXTENTS):
                view[extent * EXTENT_BYTES]
            signal.pause()
        due = time.monotonic()
        for extent in scenario.order(no):
            if view[extent * EXTENT_BYTES] != extent % 251:
                raise AssertionError(f"extent {extent} begins with a wrong byte")
            counted[no] += 1
            due = max(due + 1 / rate, time.monotonic())
            if rate < math.inf:
                time.sleep(max(0.0, due - time.monotonic()))


def misses(url: str) -> float:
    """Read how many extents were loaded because a guest waited."""
    with urllib.request.urlopen(url) as answer:
        text = answer.read().decode()
    found = re.findall(r'^cowshed_loads_total\{.*reason="demand".*\} (\S+)$', text, re.MULTILINE)
    return sum(map(float, found))


def measure(
    scenario: Scenario, warm_seconds: float, window_seconds: int
) -> tuple[float | None, dict[str, float] | None]:
    """Return the true hit rate over the window, None if nobody read, and the estimate shown."""
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "image")
        pages = [bytes([no % 251]) * EXTENT_BYTES for no in range(NR_EXTENTS)]
        image.write_bytes(b"".join(pages))
        capacity_bytes = scenario.capacity * EXTENT_BYTES
        options = ["--metrics", "127.0.0.1:0"]
        with Served({"image": image}, capacity_bytes, options) as served:
            return _watch(served, scenario, warm_seconds, window_seconds)


def _watch(
    served: Served, scenario: Scenario, warm_seconds: float, window_seconds: int
) -> tuple[float | None, dict[str, float] | None]:
    context = multiprocessing.get_context("fork")
    counted = memoryview(mmap.mmap(-1, 8 * scenario.nr_guests)).cast("Q")
    guests = [
        context.Process(target=read, args=(served.uri, no, scenario, counted), daemon=True)
        for no in range(scenario.nr_guests)
    ]
    for guest in guests:
        guest.start()
    try:
        time.sleep(warm_seconds)
        url = served.metrics_url
        before = sum(counted), misses(url)
        time.sleep(window_seconds)
        nr_reads, nr_missed = sum(counted) - before[0], misses(url) - before[1]
        uses = served.request("status")["status"]["use"]
        if not all(guest.is_alive() for guest in guests):
            raise RuntimeError("a guest ended: see its traceback")
    finally:
        for guest in guests:
            guest.kill()
            guest.join()
    (use,) = [each for each in uses if each["window_seconds"] == window_seconds]
    return (1 - nr_missed / nr_reads if nr_reads else None), use["hit_rate"]


def main() -> int:
    """Measure the scenarios asked for; the exit status says whether all were close enough."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--only", action="append", choices=names, metavar="NAME")
    parser.add_argument("--json", action="store_true", help="a JSON object a line")
    parser.add_argument("--warm", type=float, default=WARM_SECONDS, help="seconds before (30)")
    parser.add_argument(
        "--window", type=int, default=WINDOW_SECONDS, choices=(10, 60, 300), help="seconds (60)"
    )
    options = parser.parse_args()
    all_close = True
    print(f"{'scenario':<34}{'true':>7}{'shown':>7}  {'low to high':<16}off", file=sys.stderr)
    for scenario in SCENARIOS:
        if options.only and scenario.name not in options.only:
            continue
        truth, shown = measure(scenario, options.warm, options.window)
        if truth is None or shown is None:
            close = truth is None and shown is None
            line = f"{scenario.name:<34}{'none' if truth is None else f'{truth:.3f}':>7}"
            line += f"{'none' if shown is None else format(shown['value'], '.3f'):>7}"
        else:
            off = shown["value"] - truth
            close = abs(off) <= MOST_OFF
            bounds = f"{shown['low']:.3f} to {shown['high']:.3f}"
            line = f"{scenario.name:<34}{truth:>7.3f}{shown['value']:>7.3f}  {bounds:<16}{off:+.3f}"
        all_close &= close
        if options.json:
            line = json.dumps({"scenario": scenario.name, "true": truth, "shown": shown})
        print(line, flush=True)
    return 0 if all_close else 1


if __name__ == "__main__":
    sys.exit(main())
