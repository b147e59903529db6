# SPDX-License-Identifier: Apache-2.0
"""Medians, spreads, and ratios with a confidence interval over rounds. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Aim", "Ratio", "Summary", "compare", "summarise"]

RESAMPLES = 2000
ROUNDS_FOR_INTERVAL = 3


@dataclass(frozen=True)
class Summary:
    """One side's samples, one a round: median, quartiles and extremes, in the samples' unit."""

    median: float
    q1: float
    q3: float
    min: float
    max: float
    nr: int


@dataclass(frozen=True)
class Aim:
    """The aim of a ratio: at most, or at least, a value."""

    value: float
    at_least: bool = False

    def met_by(self, ratio: float) -> bool:
        """Return whether a ratio meets the aim."""
        return ratio >= self.value if self.at_least else ratio <= self.value

    def __str__(self) -> str:
        return f"{'>=' if self.at_least else '<='} {self.value:g}"


@dataclass(frozen=True)
class Ratio:
    """The ratio of two sides' medians; low..high is a 95 % interval, None with too few rounds."""

    of: str
    to: str
    value: float
    low: float | None
    high: float | None
    aim: Aim | None

    @property
    def met(self) -> bool | None:
        """Whether the median meets the aim; None without an aim."""
        return None if self.aim is None else self.aim.met_by(self.value)

    @property
    def clear(self) -> bool:
        """Whether both ends of the interval meet, or both miss, the aim."""
        if self.aim is None or self.low is None or self.high is None:
            return True
        return self.aim.met_by(self.low) == self.aim.met_by(self.high)


def summarise(samples: Sequence[float]) -> Summary:
    """Return the summary of at least one sample."""
    low, q1, median, q3, high = (float(x) for x in np.percentile(samples, [0, 25, 50, 75, 100]))
    return Summary(median, q1, q3, low, high, len(samples))


def compare(
    samples: dict[str, list[float]], of: str, to: str, aim: Aim | None = None, seed: int = 1
) -> Ratio:
    """Return the ratio of two sides measured in the same rounds, samples[side][round].

    The interval is a percentile bootstrap over rounds: both sides of a round are drawn together,
    because a disturbance often affects both.
    """
    top, bottom = np.asarray(samples[of]), np.asarray(samples[to])
    value = float(np.median(top) / np.median(bottom))
    if len(top) != len(bottom) or len(top) < ROUNDS_FOR_INTERVAL:
        return Ratio(of, to, value, None, None, aim)
    drawn = np.random.default_rng(seed).integers(0, len(top), (RESAMPLES, len(top)))
    ratios = np.median(top[drawn], axis=1) / np.median(bottom[drawn], axis=1)
    low, high = (float(x) for x in np.percentile(ratios, [2.5, 97.5]))
    return Ratio(of, to, value, low, high, aim)
