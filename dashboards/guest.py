# SPDX-License-Identifier: Apache-2.0
"""Guest: quotas, faults, latency and memory of the guests chosen.

Rows about single guests need `guest_metrics` in the configuration; the others do not.
"""

from typing import Final

from grafana_foundation_sdk.builders import dashboard

from dashboards.boards import IMAGE_VARIABLES, Row, assemble, variable
from dashboards.panels import Column, bars, figure, graph, heat, listing
from dashboards.queries import (
    BACKEND,
    GUEST,
    IMAGE,
    counted,
    per_second,
    quantile,
    quotient,
    total,
    zero_if_none,
)

__all__ = ["board"]

_BY: Final = "guest, domain, image, instance"
_LEGEND: Final = "{{guest}} {{domain}}/{{image}} {{instance}}"
_OF_QUOTA: Final = quotient(
    total("cowshed_guest_private_bytes", GUEST, _BY), total("cowshed_guest_quota_bytes", GUEST, _BY)
)
_HITS: Final = quotient(
    per_second("cowshed_guest_hits_total", GUEST, _BY),
    per_second("cowshed_guest_requests_total", GUEST, _BY),
)

_STOPPED: Final = Row(
    "Who is stopped, and who soon will be?",
    [
        figure(
            "Stopped now",
            "Guests of these images whose write waits for a larger quota.",
            "short",
            total("cowshed_guests", IMAGE, where='state="stopped-quota"'),
            warn=1,
        ),
        figure(
            "Stops",
            "How often guests reached their quota in the time shown.",
            "short",
            counted("cowshed_quota_stops_total", IMAGE),
        ),
        figure(
            "Guests of these images",
            "Guests attached, with or without series of their own.",
            "short",
            total("cowshed_guests", IMAGE),
        ),
        figure(
            "Guests with figures",
            "Guests that have series of their own: guest_metrics in the daemon's "
            "configuration limits their number.",
            "short",
            zero_if_none(f"count(cowshed_guest_private_bytes{{{GUEST}}})"),
        ),
        figure(
            "Guests left out",
            "Guests without series of their own because guest_metrics is smaller than their "
            "number.",
            "short",
            zero_if_none(total("cowshed_guest_metrics_left_out", BACKEND)),
            warn=1,
        ),
        figure(
            "Detached but not gone",
            "Guests whose memory can no longer be served, and whose connection is still open.",
            "short",
            total("cowshed_guests", IMAGE, where='state="detached"'),
            warn=1,
        ),
        bars(
            "Private bytes, of the quota",
            "At 100 % the next write waits, raises SIGBUS or is only counted, by the guest's "
            "policy.",
            "percentunit",
            f"topk(20, {_OF_QUOTA})",
            _LEGEND,
            most=1,
            warn=0.8,
            bad=0.95,
        ),
        graph(
            "Private bytes",
            "Private copies that each guest's writes have made.",
            "bytes",
            {_LEGEND: total("cowshed_guest_private_bytes", GUEST, _BY)},
        ),
        listing(
            "Guests",
            "One line a guest.",
            [
                Column("Private", total("cowshed_guest_private_bytes", GUEST, _BY), "bytes"),
                Column("Quota", total("cowshed_guest_quota_bytes", GUEST, _BY), "bytes"),
                Column("Used", _OF_QUOTA, "percentunit"),
                Column("Stopped (1: yes)", total("cowshed_guest_stopped", GUEST, _BY), "short"),
                Column("Stops", counted("cowshed_guest_quota_stops_total", GUEST, _BY), "short"),
                Column("Granted", total("cowshed_guest_granted_bytes", GUEST, _BY), "bytes"),
            ],
        ),
    ],
)

_FAULTS: Final = Row(
    "Who faults, and is it served from memory?",
    [
        graph(
            "Faults of each guest",
            "Page faults per second.",
            "ops",
            {_LEGEND: per_second("cowshed_guest_requests_total", GUEST, _BY)},
        ),
        graph(
            "Fault hits of each guest",
            "Share of a guest's page faults that found their page resident. Pages that are mapped "
            "do not fault, so this is not the hit rate.",
            "percentunit",
            {_LEGEND: _HITS},
            most=1,
        ),
    ],
)

_LATENCY: Final = Row(
    "How long do the guests of these backends wait at a fault?",
    [
        graph(
            "Faults answered from memory",
            "Time from reading the fault to its answer, when the page was resident.",
            "s",
            {
                "half": quantile(0.5, f'{BACKEND}, kind="hit"'),
                "90 of 100": quantile(0.9, f'{BACKEND}, kind="hit"'),
                "99 of 100": quantile(0.99, f'{BACKEND}, kind="hit"'),
            },
            span=8,
        ),
        graph(
            "Faults that waited for a load",
            "The same time, when the page had to be read from the source.",
            "s",
            {
                "half": quantile(0.5, f'{BACKEND}, kind="miss"'),
                "90 of 100": quantile(0.9, f'{BACKEND}, kind="miss"'),
                "99 of 100": quantile(0.99, f'{BACKEND}, kind="miss"'),
            },
            span=8,
        ),
        graph(
            "Writes",
            "The same time, for first writes to shared pages.",
            "s",
            {
                "half": quantile(0.5, f'{BACKEND}, kind="write"'),
                "90 of 100": quantile(0.9, f'{BACKEND}, kind="write"'),
                "99 of 100": quantile(0.99, f'{BACKEND}, kind="write"'),
            },
            span=8,
        ),
        heat(
            "All faults by duration",
            "Faults per second in each bucket: normally two bands, memory and source.",
            "s",
            per_second("cowshed_fault_duration_seconds_bucket", BACKEND, "le"),
            span=24,
        ),
    ],
)

_WRITES: Final = Row(
    "Who writes, and how fast does that take memory?",
    [
        graph(
            "Pages copied for each guest",
            "Private copies made per second.",
            "ops",
            {_LEGEND: per_second("cowshed_guest_cow_pages_total", GUEST, _BY)},
        ),
        graph(
            "Granted to each guest",
            "Shared image bytes in extents that are mapped for each guest.",
            "bytes",
            {_LEGEND: total("cowshed_guest_granted_bytes", GUEST, _BY)},
        ),
    ],
)


def board() -> dashboard.Dashboard:
    """Build the dashboard."""
    about = "Quotas, faults, latency and memory of guests. Needs guest_metrics for single guests."
    scope = f"cowshed_guest_private_bytes{{{IMAGE}}}"
    return assemble(
        "Guest",
        about,
        [_STOPPED, _FAULTS, _LATENCY, _WRITES],
        [*IMAGE_VARIABLES, variable("guest", "Guest", scope)],
    )
