# SPDX-License-Identifier: Apache-2.0
"""Writes docs/metrics.md from the exporter's own catalog.

.venv/bin/python tools/metrics_doc.py            write it
.venv/bin/python tools/metrics_doc.py --check    exit with 1 if it is not up to date
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from cowshed.service.metrics.catalog import CATALOG, LIBRARY, Metric

DOCUMENT = Path(__file__).resolve().parent.parent / "docs/metrics.md"

INTRODUCTION = """# Metrics

<!-- Written by tools/metrics_doc.py from service/metrics/catalog.py. Do not edit. -->

`cowshed serve --metrics HOST:PORT` (or `metrics = "HOST:PORT"` in its configuration) serves these
at `/metrics`, as text or OpenMetrics, whichever the scraper prefers. For port 0 the kernel chooses
one, which the log shows. There is no TLS and no password: listen on localhost, or on a network
where every host may read.

* All label sets whose values are known beforehand exist from the start, at 0; estimates are absent
  while they are not known.
* `cowshed_hits_total` and `cowshed_requests_total` count faults. A page that is mapped does not
  fault, so their quotient says nothing about how many reads wait: for that see the next section.
* Counters of an image include those of guests that left. They, and those of the backend, never
  fall: a successor goes on with the counters of a backend that died or was replaced (`process_*`
  and `python_*` belong to the process).
* A scrape reads the core's counters and blocks no guest. It does not settle: charges for pages that
  a guest never wrote are returned after each scrape and are gone from the next. So
  `cowshed_private_bytes`, `cowshed_cow_pages_total` and charges per guest can be ahead of the
  kernel by the pages opened since the last scrape.
* Requests and quota stops are counted when they begin, faults by outcome and durations when they
  are answered: `cowshed_requests_total` is ahead of `cowshed_faults_total` by the faults that wait
  at this moment, and by those whose guest left before they were answered.
* Metrics of single guests are opt-in: `guest_metrics = N` gives series to N guests at most, in the
  order in which they attached. `cowshed_guest_metrics_left_out` is the number of those without. A
  guest's series are gone from the first scrape after it left.
* Guests name themselves. A name has 1 to 64 printable characters: quotes and letters of any script
  are escaped in labels, and a name with a line end or another control character is refused when
  the guest attaches. Image names are letters, digits, `.`, `_` and `-`; domain names have no `.`.
* Every series of an image has the label `domain`, so images of one name in several sharing domains
  have separate series, and so have guests. It is `default` where no domains are configured.
* A scrape while the daemon ends gets a complete answer or is refused.

## The hit rate and the working set

Reads of mapped pages cost nothing because nobody sees them, so both are estimated. A few times a
second the daemon picks a resident extent at random, unmaps it from the guests and keeps its bytes
in the standby list: the next touch costs microseconds and tells how soon the extent was used. As
with an opinion poll, what holds of the sample holds of all, within bounds that its size gives.

* *Hit rate*: of the uses of extents by guests in the window, those that found them in memory. Uses
  of resident extents are estimated, soft hits and loads that guests waited for are counted. Uses
  are taken to come at random times: what is read again in a burst counts as fewer, and what is
  read at an even pace, as by a scan that repeats in a random order, as more: the hit rate was
  shown up to ten points too high there, and within five everywhere else (`make hit-rates`).
* *Working set*: what guests used at least once in the window: the estimated part of what is
  resident, and what was loaded.
* `bound="low"` and `"high"` hold the truth in about 95 of 100 cases, if the load is steady. Nothing
  is exported while too little is known: in the first minute, with less than 160 resident extents,
  and with `standby = 0`; and no hit rate while no guest uses anything. Pinned extents are never
  probed, and are taken to be used as the others are.
* Would more memory help? `cowshed_hit_ratio_at_capacity` says what the hit rate would have been
  with half and with twice the capacity. If all three are close and low, guests read new data once
  (a scan, a first boot); if all are close and high, there is memory to spare.
"""


def table(metrics: Iterable[Metric]) -> str:
    """Return a table with a row for each metric."""
    rows = ["| metric | type | labels | means |", "|---|---|---|---|"]
    for metric in metrics:
        labels = ", ".join(_label(metric, label) for label in metric.labels) or "-"
        rows.append(f"| `{metric.name}` | {metric.kind} | {labels} | {metric.meaning} |")
    return "\n".join(rows) + "\n"


def _label(metric: Metric, label: str) -> str:
    values = metric.values.get(label)
    return f"`{label}`" + (f" ({', '.join(values)})" if values else "")


def document() -> str:
    """Return the whole page."""
    by_image = [metric for metric in CATALOG.values() if "image" in metric.labels]
    sections = {
        "The backend": [metric for metric in CATALOG.values() if "image" not in metric.labels],
        "Images": [metric for metric in by_image if not metric.of_guest],
        "Guests, with `guest_metrics`": [metric for metric in by_image if metric.of_guest],
        "The process, by prometheus_client": LIBRARY.values(),
    }
    return INTRODUCTION + "".join(
        f"\n## {title}\n\n{table(metrics)}" for title, metrics in sections.items()
    )


def main() -> int:
    """Write or check the page."""
    text = document()
    if sys.argv[1:] != ["--check"]:
        DOCUMENT.write_text(text)
    elif DOCUMENT.read_text() != text:
        print(f"{DOCUMENT} is not up to date: run tools/metrics_doc.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
