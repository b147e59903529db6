# SPDX-License-Identifier: Apache-2.0
"""A scraper for tests: a daemon's /metrics, parsed by prometheus_client."""

from __future__ import annotations

import re
import urllib.request
from collections.abc import Mapping

from domains import Daemon
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

ANY_PORT = ("--metrics", "127.0.0.1:0")

Labels = frozenset[tuple[str, str]]
Samples = dict[tuple[str, Labels], float]


def metrics_url(daemon: Daemon) -> str:
    """Return the metrics URL of a daemon that was started with ANY_PORT."""
    found = re.search(r"event=metrics url=(\S+)", daemon.log())
    assert found, daemon.log()
    return found[1]


def fetch(url: str, **headers: str) -> str:
    request = urllib.request.Request(url, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        text: bytes = answer.read()
    return text.decode()


def families(daemon: Daemon) -> dict[str, Metric]:
    """Return a scrape's families, by the name in queries."""
    parsed = text_string_to_metric_families(fetch(metrics_url(daemon)))
    return {
        family.name + ("_total" if family.type == "counter" else ""): family for family in parsed
    }


def samples_of(parsed: Mapping[str, Metric]) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parsed.values()
        for sample in family.samples
    }


def scrape(daemon: Daemon) -> Samples:
    return samples_of(families(daemon))


def value(samples: Samples, name: str, **labels: str) -> float:
    """Return one sample, named without cowshed_; by default of the default domain's image."""
    if "image" in labels:
        labels = {"domain": "default", **labels}
    return samples[f"cowshed_{name}", frozenset(labels.items())]
