# SPDX-License-Identifier: Apache-2.0
"""Resident memory: a guest's first touches, against a plain mmap of the cached file.

Each measurement makes a new mapping, so that every page is touched for the first time.
"""

from __future__ import annotations

from typing import Any

from cases import Bench, CaseResult, Row, Side, explain
from stats import Aim

__all__ = ["first_write", "resident"]

READ_AIM = Aim(1.1)
WRITE_AIM = Aim(1.2)


def resident(bench: Bench) -> CaseResult:
    """Measure reads of a resident image, and writes to untouched pages."""
    _make_resident(bench)
    rows = []
    for how, what in (("read", "read a byte"), ("copy", "copy the page")):
        for order, aim in (("sequential", READ_AIM), ("shuffled", None), ("subset", None)):
            rows.append(_row(bench, f"{what}, {order}", how, order, aim))
    rows += [
        _row(bench, f"write untouched pages, {order}", "write", order, None)
        for order in ("sequential", "shuffled")
    ]
    return CaseResult(
        "resident image, first touch of each page, guest against plain mmap(MAP_PRIVATE)",
        rows,
        [
            "memfd: a plain mapping of a memfd's copy: single pages, where a file has large folios",
            "populate: the plain mapping with madvise(MADV_POPULATE_*) in the time: no traps",
            "subset: an eighth of the pages at random; us_again: a second pass, all mapped",
        ],
    )


def first_write(bench: Bench) -> CaseResult:
    """Measure the first write to pages that were read before: a copy-on-write break each."""
    _make_resident(bench)
    rows = [
        _row(bench, f"write pages read before, {order}", "write", order, aim, read_before=True)
        for order, aim in (("sequential", WRITE_AIM), ("shuffled", None))
    ]
    rows.append(_row(bench, "write untouched pages, sequential", "write", "sequential", WRITE_AIM))
    return CaseResult(
        "first write, amortised, against the kernel's copy-on-write of a MAP_PRIVATE file mapping",
        rows,
        ["the aim is for writes in order: no window predicts shuffled ones, so each is one trap"],
    )


def _make_resident(bench: Bench) -> None:
    bench.served.request("warm", image="warm")
    # Fill the page cache by the kernel's readahead, not by the writes that made the file: that
    # decides the size of folios, and so how many pages a fault of the plain side maps.
    bench.worker.call("uncache", path=str(bench.warm))
    bench.worker.call("file", path=str(bench.warm), chunk_bytes=1 << 20, direct=False)


def _row(
    bench: Bench, name: str, how: str, order: str, aim: Aim | None, read_before: bool = False
) -> Row:
    def side(kind: str) -> Side:
        place = "warm" if kind == "guest" else str(bench.warm)

        def measure() -> tuple[float, dict[str, float]]:
            answer: dict[str, Any] = bench.worker.call(
                "touch", side=kind, how=how, order=order, place=place, read_before=read_before
            )
            nr_pages = answer["nr_pages"]
            return answer["cost"]["wall_ns"] / nr_pages / 1e3, explain(answer, nr_pages)

        return measure

    kinds = ["guest", "plain", "memfd"] + ["populate"] * (order != "subset")
    ratios = [("guest", "plain", aim), ("guest", "memfd", None)]
    return Row.measure(bench, name, "us/page", {kind: side(kind) for kind in kinds}, ratios)
