# SPDX-License-Identifier: Apache-2.0
"""The time of a scrape of the metrics with many guests, over HTTP, against its limit.

The guests are accounts of a store in this process, without mappings: a scrape reads the same of
them as of mapped ones. The time includes the connection and the text.
"""

from __future__ import annotations

import contextlib
import resource
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from cases import Bench, CaseResult, Row, Side
from stats import Aim

from cowshed.accounting import Account, Quota, QuotaPolicy
from cowshed.cache import FileSource, PageStore
from cowshed.service.guests.guests import GuestTable
from cowshed.service.images.evictor import Evictor
from cowshed.service.metrics.exporter import Exporter, MetricsSources
from cowshed.service.metrics.service_counters import ServiceCounters
from cowshed.service.runtime.file_limit import raise_file_limit
from cowshed.service.settings.endpoint import Endpoint
from cowshed.service.web.http_server import HttpServer

__all__ = ["scrape"]

MOST_MS = 50.0
NR_IMAGES = 10
IMAGE_BYTES = 1 << 30
SPARE_FDS = 256


def scrape(bench: Bench) -> CaseResult:
    """Scrape ten images of 1 GiB with 1,000 guests in all, and with 1,000 guests each."""
    raise_file_limit()
    room = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE_FDS
    rows, notes = [], ["ten images of 1 GiB; no guest has series of its own"]
    for nr_guests, what in ((1_000, "1,000 guests of"), (10_000, "1,000 guests of each of")):
        if nr_guests > room:
            notes.append(f"{nr_guests} guests need more open files than {room}: left out")
            continue
        with _serving(bench.build_dir, nr_guests) as url:
            sides: dict[str, Side] = {"scrape": _side(url), "allowed": lambda: (MOST_MS, {})}
            ratios = [("scrape", "allowed", Aim(1.0))]
            rows.append(Row.measure(bench, f"{what} 10 images", "ms", sides, ratios))
    return CaseResult("a scrape of /metrics, against the 50 ms it may take", rows, notes)


@contextlib.contextmanager
def _serving(folder: Path, nr_guests: int) -> Iterator[str]:
    """Run an exporter of a store with so many accounts for the block; yield its URL."""
    path = folder / "scrape.raw"
    with path.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    with contextlib.ExitStack() as stack:
        store = stack.enter_context(PageStore(1 << 30))
        for no in range(NR_IMAGES):
            image = store.open_image(f"image-{no}", FileSource.open(path))
            quota = Quota(IMAGE_BYTES, QuotaPolicy.STOP)
            stack.callback(quota.close)
            for _ in range(nr_guests // NR_IMAGES):
                account = Account(image, quota)
                stack.callback(account.close)
        evictor = Evictor(store)
        evictor.start()
        stack.callback(evictor.stop)
        exporter = Exporter(MetricsSources(store, evictor, GuestTable(), ServiceCounters()))
        server = HttpServer(Endpoint("127.0.0.1", 0), {"/metrics": exporter.serve})
        server.start()
        stack.callback(server.stop)
        yield f"http://{server.endpoint}/metrics"


def _side(url: str) -> Side:
    def measure() -> tuple[float, dict[str, float]]:
        before = time.perf_counter()
        with urllib.request.urlopen(url) as answer:
            text = answer.read()
        elapsed_ms = (time.perf_counter() - before) * 1e3
        nr_series = sum(not line.startswith(b"#") for line in text.splitlines())
        return elapsed_ms, {"kib": len(text) / 1024, "series": nr_series}

    return measure
