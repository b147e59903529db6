# SPDX-License-Identifier: Apache-2.0
"""The hit rate that a daemon shows is the one that its guests have."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from bench_modules import BENCH

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.access("/dev/userfaultfd", os.W_OK), reason="needs /dev/userfaultfd"),
]


def test_the_true_hit_rate_lies_near_the_bounds_that_are_shown() -> None:
    scenario = "Zipf, half fits, 16 guests"
    command = [sys.executable, str(BENCH / "hit_rates.py"), "--only", scenario, "--json"]
    done = subprocess.run(
        [*command, "--warm", "6", "--window", "10"], stdout=subprocess.PIPE, timeout=150
    )
    (answer,) = map(json.loads, done.stdout.splitlines())
    truth, shown = answer["true"], answer["shown"]
    assert 0.7 < truth < 0.95, "a cache of half of the extents serves most of Zipf's reads"
    assert shown is not None, "guests used extents all the time"
    assert shown["low"] <= shown["value"] <= shown["high"]
    # Of ten seconds little is known: in one of twenty cases it is off by a tenth or more.
    assert abs(shown["value"] - truth) < 0.25
