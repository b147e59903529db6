# SPDX-License-Identifier: Apache-2.0
"""The plot of a run: ratios against their aims, latencies of single faults, memory of crowds."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
from cases import CaseResult
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from stats import Ratio

__all__ = ["draw"]

MET, MISSED, FREE, AIM = "#2a7f62", "#b5482f", "#5b6770", "#111111"


def draw(results: dict[str, CaseResult], title: str, to: list[Path]) -> None:
    """Draw the cases that were run into each file of `to`, in the format its name ends with."""
    ratios = [
        (f"{name}: {row.name}, {ratio.of} / {ratio.to}", ratio)
        for name, result in results.items()
        for row in result.rows
        for ratio in row.ratios
    ]
    curves = {name: result for name, result in results.items() if result.curves}
    height = 1.5 + 0.24 * len(ratios)
    heights = [height] + [4.0] * len(curves)
    figure, axes = plt.subplots(
        len(heights),
        1,
        figsize=(12, sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    _draw_ratios(axes[0][0], ratios)
    for axis, (name, result) in zip(axes[1:, 0], curves.items(), strict=True):
        _draw_curves(axis, name, result)
    figure.suptitle(title, fontsize=8)
    for path in to:
        figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_ratios(axis: Axes, ratios: list[tuple[str, Ratio]]) -> None:
    for place, (_, ratio) in enumerate(ratios):
        colour = FREE if ratio.met is None else MET if ratio.met else MISSED
        axis.barh(place, ratio.value, color=colour, height=0.7)
        if ratio.low is not None and ratio.high is not None:
            axis.plot([ratio.low, ratio.high], [place, place], color=AIM, linewidth=1)
        if ratio.aim is not None:
            axis.plot([ratio.aim.value] * 2, [place - 0.45, place + 0.45], color=AIM, linewidth=2)
        end = max(ratio.value, ratio.high or 0)
        axis.text(end * 1.03, place, f"{ratio.value:.3g}", va="center", fontsize=7)
    axis.axvline(1, color=FREE, linewidth=0.6)
    axis.set_xscale("log")
    axis.set_yticks(range(len(ratios)), [label for label, _ in ratios], fontsize=7)
    axis.margins(y=0.01)
    axis.invert_yaxis()
    axis.set_xlabel(
        "ratio, log scale; thick mark: aim; line: 95 % interval; green met, red missed",
        fontsize=7,
    )


def _draw_curves(axis: Axes, name: str, result: CaseResult) -> None:
    for label, xs, ys in result.curves:
        axis.plot(xs, ys, label=label, marker="." if len(xs) < 10 else None)
    axis.set_xscale("log")
    if name == "fault":
        axis.set_xlabel("us for one round trip")
        axis.set_ylabel("% of them")
    else:
        axis.set_xlabel("processes")
        axis.set_ylabel("MiB, page tables included")
        axis.set_ylim(bottom=0)
    axis.set_title(result.title, fontsize=8)
    axis.legend(fontsize=7)
