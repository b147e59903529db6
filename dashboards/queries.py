# SPDX-License-Identifier: Apache-2.0
"""PromQL as the dashboards write it: every query is narrowed by the variables at the top.

A scope is the selector between the braces. Rates run over $__rate_interval, which Grafana makes at
least four scrapes long; increases over the whole time shown run over $__range. Quotients leave out
the series whose divisor is 0, so that an idle image shows no rate instead of NaN.
"""

from typing import Final

__all__ = [
    "BACKEND",
    "BACKEND_OR_NONE",
    "GUEST",
    "IMAGE",
    "added",
    "counted",
    "estimate",
    "per_second",
    "quantile",
    "quotient",
    "total",
    "zero_if_none",
]

BACKEND: Final = 'job=~"$job", instance=~"$instance"'
IMAGE: Final = f'{BACKEND}, domain=~"$domain", image=~"$image"'
GUEST: Final = f'{IMAGE}, guest=~"$guest"'
# Alerts about a backend that is gone carry no instance.
BACKEND_OR_NONE: Final = 'job=~"$job", instance=~"$instance|"'


def _by(labels: str) -> str:
    return f" by ({labels})" if labels else ""


def total(name: str, scope: str, by: str = "", where: str = "") -> str:
    """Add up a gauge over everything but the labels in by; where narrows the scope."""
    return f"sum{_by(by)} ({name}{{{_and(scope, where)}}})"


def per_second(name: str, scope: str, by: str = "", where: str = "") -> str:
    """Return the rate of a counter."""
    return f"sum{_by(by)} (rate({name}{{{_and(scope, where)}}}[$__rate_interval]))"


def counted(name: str, scope: str, by: str = "", where: str = "") -> str:
    """Return a counter's increase in the time shown."""
    return f"sum{_by(by)} (increase({name}{{{_and(scope, where)}}}[$__range]))"


def quotient(part: str, whole: str) -> str:
    """Divide; leaves out series whose divisor is 0."""
    return f"{part} / ({whole} > 0)"


def added(*terms: str) -> str:
    """Add up terms that have the same labels."""
    return " + ".join(terms)


def estimate(name: str, scope: str, by: str, bound: str = "value") -> str:
    """Return an estimate over the last minute, or one of its bounds; by must name its series."""
    return f'max by ({by}) ({name}{{{scope}, window="60s", bound="{bound}"}})'


def quantile(q: float, scope: str, by: str = "kind") -> str:
    """Return a quantile of the durations of faults."""
    buckets = per_second("cowshed_fault_duration_seconds_bucket", scope, f"le, {by}")
    return f"histogram_quantile({q}, {buckets})"


def zero_if_none(expr: str) -> str:
    """Turn the empty result of a query without labels into 0."""
    return f"({expr}) or vector(0)"


def _and(scope: str, where: str) -> str:
    return f"{scope}, {where}" if where else scope
