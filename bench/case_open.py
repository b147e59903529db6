# SPDX-License-Identifier: Apache-2.0
"""Open regions: a guest's first touches where the kernel maps the frames by itself.

The image is pinned, and its regions are open before the guest touches it. The sides: the guest;
plain mappings, MAP_PRIVATE, of the file, of a memfd, and of a memfd with huge pages, which is what
the guest's frames are.
"""

from __future__ import annotations

import time
from contextlib import closing
from typing import Any

from cases import Bench, CaseResult, Row, Side, explain
from mappings import GuestMapping
from stats import Aim

__all__ = ["open_regions"]

REGION_BYTES = 2 << 20
NR_AT_ONCE = 16
READ_AIM, RANDOM_AIM, WRITE_AIM = Aim(1.0), Aim(1.5), Aim(1.05)


def open_regions(bench: Bench) -> CaseResult:
    """Measure reads and writes in open regions, and what it takes to open and close them."""
    bench.served.request("pin", image="warm")
    try:
        bench.worker.call("uncache", path=str(bench.warm))
        bench.worker.call("file", path=str(bench.warm), chunk_bytes=1 << 20, direct=False)
        rows = [
            _row(bench, "read a byte, sequential", "read", "sequential", READ_AIM),
            _row(bench, "read a byte, shuffled", "read", "shuffled", RANDOM_AIM),
            _row(bench, "read a byte, subset", "read", "subset", RANDOM_AIM),
            _row(bench, "copy the page, sequential", "copy", "sequential", READ_AIM),
        ]
        for what, read_before in (("pages read before", True), ("untouched pages", False)):
            rows += [
                _row(bench, f"write {what}, {order}", "write", order, WRITE_AIM, read_before)
                for order in ("sequential", "shuffled")
            ]
        rows += [_turns(bench), _at_once(bench)]
    finally:
        bench.served.request("unpin", image="warm")
    return CaseResult(
        "open regions: first touch of each page, guest against plain MAP_PRIVATE mappings",
        rows,
        [
            "plain: of the file; memfd: of a copy in a memfd; huge: the same in huge pages",
            "subset: an eighth of the pages at random; us_again: a second pass, all mapped",
            "a region is 2 MiB; its frames are one huge page already in all rows",
        ],
    )


def _row(bench: Bench, name: str, how: str, order: str, aim: Aim, read_before: bool = False) -> Row:
    def side(kind: str) -> Side:
        place = "warm" if kind == "open" else str(bench.warm)

        def measure() -> tuple[float, dict[str, float]]:
            answer: dict[str, Any] = bench.worker.call(
                "touch", side=kind, how=how, order=order, place=place, read_before=read_before
            )
            nr_pages = answer["nr_pages"]
            return answer["cost"]["wall_ns"] / nr_pages / 1e3, explain(answer, nr_pages)

        return measure

    kinds = ("open", "plain", "memfd", "huge")
    ratios = [("open", "plain", aim), ("open", "memfd", None), ("open", "huge", None)]
    return Row.measure(bench, name, "us/page", {kind: side(kind) for kind in kinds}, ratios)


def _turns(bench: Bench) -> Row:
    """Time the opening of all regions for one guest, and their closing, which its quota orders."""
    uri, nr_regions = bench.served.uri, bench.warm.stat().st_size // REGION_BYTES

    def opening() -> tuple[float, dict[str, float]]:
        began = time.perf_counter_ns()
        with closing(GuestMapping(uri, "warm", wait_open=True)):
            return (time.perf_counter_ns() - began) / nr_regions / 1e3, {}

    def close() -> tuple[float, dict[str, float]]:
        with closing(GuestMapping(uri, "warm", wait_open=True)) as mapping:
            began = time.perf_counter_ns()
            bench.served.request("quota", guest=mapping.name, quota_bytes=4096)
            return (time.perf_counter_ns() - began) / nr_regions / 1e3, {}

    sides = {"attach and open": opening, "close": close}
    return Row.measure(bench, "open and close", "us/region", sides, [])


def _at_once(bench: Bench) -> Row:
    """Time until all regions are open for guests that attach one after the other, at once."""
    uri, nr_regions = bench.served.uri, bench.warm.stat().st_size // REGION_BYTES

    def open_for(nr: int) -> Side:
        def measure() -> tuple[float, dict[str, float]]:
            began = time.perf_counter_ns()
            mappings = [GuestMapping(uri, "warm") for _ in range(nr)]
            try:
                for mapping in mappings:
                    mapping.wait_open()
                nr_opened = nr * nr_regions
                return (time.perf_counter_ns() - began) / nr_opened / 1e3, {}
            finally:
                for mapping in mappings:
                    mapping.close()

        return measure

    sides = {f"{nr} guests": open_for(nr) for nr in (1, NR_AT_ONCE)}
    return Row.measure(bench, "attach and open, by guests at once", "us/region", sides, [])
