# SPDX-License-Identifier: Apache-2.0
"""Ratios, intervals and aims of the benchmarks. bench/ is a folder of scripts, not a package."""

from typing import Any

import pytest
from bench_modules import bench_module

stats = bench_module("stats")


def test_ratio_is_of_medians() -> None:
    ratio = stats.compare({"a": [2.0, 4.0, 400.0], "b": [1.0, 2.0, 3.0]}, "a", "b")
    assert ratio.value == 2.0
    assert ratio.met is None
    assert ratio.clear


def test_interval_holds_the_ratio_and_narrows_when_rounds_agree() -> None:
    steady = stats.compare({"a": [2.0] * 9, "b": [1.0] * 9}, "a", "b")
    assert (steady.low, steady.high) == (2.0, 2.0)
    wild = stats.compare({"a": [1.0, 2.0, 3.0] * 3, "b": [1.0] * 9}, "a", "b")
    assert wild.low < wild.value < wild.high


def test_rounds_are_drawn_in_pairs() -> None:
    # A disturbance that slows both sides of a round by the same factor leaves every ratio at 2.
    slow = [1.0, 3.0, 1.0, 7.0, 1.0, 2.0, 5.0]
    ratio = stats.compare({"a": [2 * x for x in slow], "b": slow}, "a", "b")
    assert (ratio.low, ratio.high) == (2.0, 2.0)


def test_too_few_rounds_give_no_interval() -> None:
    ratio = stats.compare({"a": [3.0, 3.0], "b": [1.0, 1.0]}, "a", "b", stats.Aim(2.0))
    assert (ratio.low, ratio.high) == (None, None)
    assert ratio.met is False


@pytest.mark.parametrize(
    ("aim", "met"),
    [
        (stats.Aim(1.1), False),
        (stats.Aim(2.0), True),
        (stats.Aim(0.95, at_least=True), True),
        (stats.Aim(2.5, at_least=True), False),
    ],
)
def test_aim_is_a_limit_from_above_or_from_below(aim: Any, met: bool) -> None:
    ratio = stats.compare({"a": [2.0] * 5, "b": [1.0] * 5}, "a", "b", aim)
    assert ratio.met is met
    assert ratio.clear


def test_aim_inside_the_interval_is_unclear() -> None:
    samples = {"a": [1.0, 2.0, 3.0] * 3, "b": [1.0] * 9}
    assert not stats.compare(samples, "a", "b", stats.Aim(2.5)).clear
    assert stats.compare(samples, "a", "b", stats.Aim(3.5)).clear
