# SPDX-License-Identifier: Apache-2.0
"""Drain: a drain's progress, blockers, time left, and its effect on guests."""

from typing import Final

from grafana_foundation_sdk.builders import dashboard

from dashboards.boards import Row, assemble
from dashboards.panels import figure, graph, state
from dashboards.queries import BACKEND, added, estimate, per_second, quantile, total

__all__ = ["board"]

_PROGRESS: Final = f"cowshed_drain_progress_ratio{{{BACKEND}}}"
_DRAINING: Final = f'(cowshed_drain_state{{{BACKEND}, state="draining"}} == 1)'
# The rest divided by the rate: +Inf for a drain without progress; 0 without a drain.
_LEFT: Final = (
    f"((1 - {_PROGRESS}) / clamp_min(deriv(cowshed_drain_progress_ratio{{{BACKEND}}}[5m]), 0) "
    f"and on (job, instance) {_DRAINING}) or (0 * {_PROGRESS})"
)
_STATES: Final = {"none": "blue", "draining": "yellow", "done": "green", "failed": "red"}
# A backend's state as its index in _STATES.
_NUMBERED: Final = added(
    *(
        f"{number} * " + total("cowshed_drain_state", BACKEND, "instance", f'state="{name}"')
        for number, name in enumerate(_STATES)
    )
)

_STATE: Final = Row(
    "How far is the drain?",
    [
        state(
            "State",
            "none: no drain since the start; draining; done: everything was handed over; "
            "failed: it ended without a handoff, and the backend goes on.",
            _NUMBERED,
            "{{instance}}",
            _STATES,
            span=6,
        ),
        figure(
            "Handed over",
            "Share of the state that the target has.",
            "percentunit",
            f"min({_PROGRESS})",
            span=6,
        ),
        figure(
            "Time left",
            "At the speed of the last five minutes. Endless: no progress. 0: no drain.",
            "s",
            f"max({_LEFT})",
            span=6,
        ),
        figure(
            "Blockers",
            "Reasons why the drain cannot end; cowshed status names them.",
            "short",
            total("cowshed_drain_blockers", BACKEND),
            span=6,
            warn=1,
        ),
        graph(
            "Handed over, over time",
            "A flat line below 100 % means that the drain is stuck.",
            "percentunit",
            {"{{instance}}": f"max by (instance) ({_PROGRESS})"},
            most=1,
        ),
        graph(
            "Time left, over time",
            "Should fall by a second each second.",
            "s",
            {"{{instance}}": f"max by (instance) ({_LEFT})"},
        ),
    ],
)

_BLOCKERS: Final = Row(
    "What holds it up?",
    [
        graph(
            "Blockers over time",
            "Reasons why the drain cannot end.",
            "short",
            {"{{instance}}": total("cowshed_drain_blockers", BACKEND, "instance")},
            span=8,
        ),
        graph(
            "Guests",
            "A guest that is stopped at its quota in the middle of a write blocks the drain.",
            "short",
            {"{{state}}": total("cowshed_guests", BACKEND, "state")},
            span=8,
            stacked=True,
        ),
        graph(
            "Loads in progress",
            "Guests' loads go on during a drain.",
            "short",
            {
                "queued loads": total("cowshed_queued_loads", BACKEND),
                "waiting loaders": total("cowshed_waiting_loaders", BACKEND),
            },
            span=8,
        ),
    ],
)

_LEFT_OVER: Final = Row(
    "What is there to hand over?",
    [
        graph(
            "Private bytes to move",
            "Only private copies must be sent; the target can load image bytes from its source.",
            "bytes",
            {"{{domain}}/{{image}}": total("cowshed_private_bytes", BACKEND, "domain, image")},
            stacked=True,
        ),
        graph(
            "Shared bytes in use",
            "Resident image bytes, and the working set that the target should load first.",
            "bytes",
            {
                "resident": total("cowshed_resident_bytes", BACKEND),
                "working set": total("cowshed_working_set_bytes", BACKEND),
            },
        ),
    ],
)

_PAIN: Final = Row(
    "Do guests feel it?",
    [
        graph(
            "Faults, 99 of 100",
            "How long faults take, by kind.",
            "s",
            {"{{kind}}": quantile(0.99, BACKEND)},
            span=8,
        ),
        graph(
            "Hit rate while draining",
            "Of the uses of extents by guests, those that found them in memory, estimated.",
            "percentunit",
            {"{{instance}}": estimate("cowshed_hit_ratio", BACKEND, "instance")},
            span=8,
            most=1,
        ),
        graph(
            "New guests, and errors",
            "A draining backend admits no new guests.",
            "ops",
            {
                "attached": per_second("cowshed_guest_attaches_total", BACKEND),
                "load errors": per_second("cowshed_load_errors_total", BACKEND),
                "dropped connections": per_second("cowshed_connections_dropped_total", BACKEND),
            },
            span=8,
        ),
    ],
)


def board() -> dashboard.Dashboard:
    """Build the dashboard."""
    about = (
        "How far a drain is, what holds it up, when it will be done, and whether guests feel it."
    )
    return assemble("Drain", about, [_STATE, _BLOCKERS, _LEFT_OVER, _PAIN])
