# SPDX-License-Identifier: Apache-2.0
"""The exporter against its catalog: names, types, labels, zeros, formats, the documentation."""

import itertools
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from domains import Daemon, MakeImage, StartDaemon, until
from prometheus_client import Metric as Family
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from scraping import ANY_PORT, families, fetch, metrics_url, samples_of, scrape, value

from cowshed.service.metrics.catalog import (
    ACCESS_OUTCOMES,
    CATALOG,
    LIBRARY,
    WRITE_OUTCOMES,
    Metric,
)

MIB = 1 << 20
ROOT = Path(__file__).resolve().parents[3]
TOOLS = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
NOT_ZERO_AT_START = {
    "cowshed_start_timestamp_seconds",
    "cowshed_capacity_bytes",
    "cowshed_pinnable_bytes",
    "cowshed_standby_limit_bytes",
    "cowshed_image_size_bytes",
}
# Whatever a look at a source has taken up to now, if one is under way.
ANYTHING_AT_ANY_TIME = {"cowshed_source_wait_seconds"}


@pytest.fixture
def daemon(make_image: MakeImage, start_daemon: StartDaemon) -> Daemon:
    return start_daemon(
        "--image", f"a={make_image(MIB)}", "--image", f"b={make_image(MIB, 'b')}", *ANY_PORT
    )


def label_sets(metric: Metric) -> list[dict[str, str]]:
    """All that a metric of two images must have from the start."""
    known = {"domain": ("default",), "image": ("a", "b"), **metric.values}
    sets = [
        dict(zip(metric.labels, values, strict=True))
        for values in itertools.product(*(known[label] for label in metric.labels))
    ]
    outcomes = {"missing": ACCESS_OUTCOMES, "minor": ACCESS_OUTCOMES, "write": WRITE_OUTCOMES}
    if {"kind", "outcome"} <= set(metric.labels):
        sets = [labels for labels in sets if labels["outcome"] in outcomes[labels["kind"]]]
    return sets


def test_names_types_and_labels_are_those_of_the_catalog(daemon: Daemon) -> None:
    found = families(daemon)
    wanted = {name: metric for name, metric in CATALOG.items() if not metric.of_guest}
    assert found.keys() == wanted.keys() | LIBRARY.keys()
    for name, metric in (wanted | dict(LIBRARY)).items():
        family: Family = found[name]
        assert family.type == ("gauge" if metric.kind == "info" else metric.kind), name
        if name in wanted:
            assert family.documentation == metric.meaning
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(metric.labels), name


def test_every_label_set_is_there_at_zero_from_the_start(daemon: Daemon) -> None:
    samples = scrape(daemon)
    for name, metric in CATALOG.items():
        if metric.of_guest or metric.is_estimate or metric.kind == "info":
            continue
        suffix = "_count" if metric.kind == "histogram" else ""
        there = [labels for sample, labels in samples if sample == name + suffix]
        sets = label_sets(metric)
        assert set(there) == {frozenset(labels.items()) for labels in sets}, name
        for labels in sets:
            found = samples[name + suffix, frozenset(labels.items())]
            expected = int(list(labels.values()) == ["none"])
            if name in ANYTHING_AT_ANY_TIME:
                assert found >= 0, (name, labels)
                continue
            assert (found > 0) if name in NOT_ZERO_AT_START else (found == expected), (name, labels)


def test_infos_name_the_version_and_what_an_image_is_made_of(daemon: Daemon, run_dir: Path) -> None:
    until(lambda: all(image["digest"] for image in daemon.status()["images"]))
    samples, status = scrape(daemon), daemon.status()
    assert value(samples, "build_info", version=status["version"]) == 1
    for image in status["images"]:
        labels = {"image": image["name"], "source": image["source"], "digest": image["digest"]}
        assert value(samples, "image_info", **labels) == 1
    assert value(samples, "image_size_bytes", image="a") == MIB


def test_durations_have_a_bucket_for_each_power_of_two_of_nanoseconds(daemon: Daemon) -> None:
    for kind in ("hit", "miss", "write"):
        bounds = [
            float(sample.labels["le"])
            for sample in families(daemon)["cowshed_fault_duration_seconds"].samples
            if sample.name.endswith("_bucket") and sample.labels["kind"] == kind
        ]
        assert bounds == [*(2**exponent / 1e9 for exponent in range(10, 34)), float("inf")]


def test_openmetrics_is_there_for_who_prefers_it(daemon: Daemon) -> None:
    accept = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"
    text = fetch(metrics_url(daemon), Accept=accept)
    parsed = {family.name: family for family in parse_openmetrics(text)}
    assert parsed["cowshed_build"].type == "info"
    assert {sample for sample, _ in samples_of(parsed)} >= {
        name for name, metric in CATALOG.items() if metric.kind == "counter" and not metric.of_guest
    }


def test_promtool_finds_nothing_to_complain_of(daemon: Daemon) -> None:
    promtool = shutil.which("promtool", path=TOOLS)
    assert promtool, "no promtool: run make setup"
    text = fetch(metrics_url(daemon))
    checked = subprocess.run(
        [promtool, "check", "metrics"], input=text, capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


def test_the_documentation_is_written_from_the_catalog() -> None:
    command = [sys.executable, str(ROOT / "tools/metrics_doc.py"), "--check"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (checked.returncode, checked.stderr) == (0, "")
