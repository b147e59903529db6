# SPDX-License-Identifier: Apache-2.0
"""The benchmark writes down what it promises; how fast anything was is not looked at."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]

# The measurements are of the first test that wants them, and take long on a busy machine.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

# Of a small image, eight extents may be unmapped at the moment to see whether they are used.
MOST_PROBED_MIB = 0.5


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The JSON of a quick run of the cases that trap in all the ways there are."""
    out = tmp_path_factory.mktemp("bench")
    command = [sys.executable, str(ROOT / "bench/run.py"), "--quick", "--out", str(out)]
    command += ["--only", "write", "--only", "cold", "--only", "fault", "--only", "memory"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=380)
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "bench.json").read_text())
    report["text"] = done.stdout
    report["files"] = {path.name: path.stat().st_size for path in out.iterdir()}
    return report


def rows_of(report: Any) -> list[Any]:
    return [row for case in report["cases"] for row in case["rows"]]


def test_report_names_the_machine_and_the_load(report: Any) -> None:
    assert report["version"] == 1
    assert report["machine"]["cpus"] >= 1
    assert report["machine"]["cpu"] in report["text"]
    for case in report["cases"]:
        assert case["load"]["seconds"] > 0
        text = report["text"]
        line_of_load = text[text.index(case["title"]) :].split("\n")[1]
        assert case["load"]["noisy"] == ("NOISY" in line_of_load)


def test_cases_come_in_the_order_asked_for(report: Any) -> None:
    assert [case["name"] for case in report["cases"]] == ["write", "cold", "fault", "memory"]


def test_every_side_has_a_sample_a_round(report: Any) -> None:
    for row in rows_of(report):
        counts = {len(side["samples"]) for side in row["sides"].values()}
        assert len(counts) == 1, row["name"]
        for side in row["sides"].values():
            assert 0 < side["min"] <= side["q1"] <= side["median"] <= side["q3"] <= side["max"]


def test_every_ratio_is_of_two_sides_of_its_row(report: Any) -> None:
    for row in rows_of(report):
        for ratio in row["ratios"]:
            medians = [row["sides"][ratio[end]]["median"] for end in ("of", "to")]
            assert ratio["value"] == pytest.approx(medians[0] / medians[1])
            assert (ratio["met"] is None) == (ratio["aim"] is None)
            if ratio["aim"] is not None:
                sign, aim = ratio["aim"].split()
                under, over = ratio["value"] <= float(aim), ratio["value"] >= float(aim)
                assert ratio["met"] == {"<=": under, ">=": over}[sign]


def test_aims_of_every_case_are_judged(report: Any) -> None:
    for case in report["cases"]:
        assert any(ratio["aim"] for row in case["rows"] for ratio in row["ratios"]), case["name"]


def test_every_page_of_a_random_order_is_a_fault_of_its_own(report: Any) -> None:
    (case,) = [case for case in report["cases"] if case["name"] == "fault"]
    for row in case["rows"]:
        # What a probe had unmapped comes back by whole extents.
        assert row["where"]["fault"]["pages_per_fault"] == pytest.approx(1.0, rel=0.1)


def test_handler_is_pinned_where_the_row_says(report: Any) -> None:
    (case,) = [case for case in report["cases"] if case["name"] == "fault"]
    allowed = {row["name"]: row["where"]["fault"]["handler_may_use_cpus"] for row in case["rows"]}
    assert allowed.pop("round trip, anywhere") == len(os.sched_getaffinity(0))
    assert set(allowed.values()) == {1}


def test_guests_of_a_cold_image_wait_for_loads_and_others_do_not(report: Any) -> None:
    for case in report["cases"]:
        for row in case["rows"]:
            for side in row["where"].values():
                if "misses" not in side:
                    continue
                if case["name"] == "cold":
                    assert side["misses"] > 0
                else:  # touches of probes
                    assert side["misses"] <= 2 + 0.05 * side["faults"]


def test_every_page_is_mapped_in_the_end(report: Any) -> None:
    for row in rows_of(report):
        for name, side in row["where"].items():
            if "mapped_pages" in side:
                expected = 8192 if "image" in row["name"] else 4096
                is_ours = name.startswith(("guest", "fault"))
                least = expected - (MOST_PROBED_MIB * 256 if is_ours else 0)
                assert least <= side["mapped_pages"] <= expected, (row["name"], name)


def test_everybody_in_a_crowd_has_all_of_the_image(report: Any) -> None:
    (case,) = [case for case in report["cases"] if case["name"] == "memory"]
    for row in case["rows"]:
        assert 16 - MOST_PROBED_MIB <= row["where"]["guests"]["mib_mapped_per_guest"] <= 16
        assert row["where"]["plain mmap"]["mib_mapped_per_guest"] == 16


def test_second_run_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with (tmp_path / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [sys.executable, str(ROOT / "bench/run.py"), "--quick", "--out", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=380)
    assert done.returncode == 1
    assert "another run uses" in done.stderr
    assert done.stderr.count("\n") == 1


def test_plots_are_drawn(report: Any) -> None:
    assert report["files"]["bench.png"] > 10_000
    assert report["files"]["bench.svg"] > 10_000
