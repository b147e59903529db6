# SPDX-License-Identifier: Apache-2.0
"""Overview: is the cache healthy, what does it save, who uses it, is there room."""

from typing import Final

from grafana_foundation_sdk.builders import dashboard

from dashboards.boards import Row, assemble
from dashboards.panels import Column, figure, graph, listing
from dashboards.queries import (
    BACKEND,
    BACKEND_OR_NONE,
    added,
    counted,
    estimate,
    per_second,
    quantile,
    quotient,
    total,
    zero_if_none,
)

__all__ = ["board"]

_ALERTS: Final = f'ALERTS{{alertname=~"Cowshed.+", {BACKEND_OR_NONE}}}'
_FIRING: Final = f'ALERTS{{alertname=~"Cowshed.+", alertstate="firing", {BACKEND_OR_NONE}}}'
_IMAGE_URL: Final = (
    "/d/cowshed-image?var-datasource=${datasource}&var-domain=${__data.fields.domain}"
    "&var-image=${__value.raw}&${__url_time_range}"
)

_HEALTH: Final = Row(
    "Is anything wrong right now?",
    [
        figure(
            "Backends down",
            "Backends that Prometheus cannot scrape. Their guests go on with mapped pages and "
            "wait at their next fault.",
            "short",
            zero_if_none(f"count(up{{{BACKEND}}} == 0)"),
            bad=1,
        ),
        figure(
            "Alerts firing",
            "Alerts of cowshed's rules that fire now; the table below lists them. Each has a "
            "page in docs/runbooks.",
            "short",
            zero_if_none(f"count({_FIRING})"),
            bad=1,
        ),
        figure(
            "Guests stopped",
            "Guests whose write waits for a larger quota: cowshed quota GUEST SIZE.",
            "short",
            total("cowshed_guests", BACKEND, where='state="stopped-quota"'),
            warn=1,
        ),
        figure(
            "Audit mismatches",
            "Differences between the ledger and the kernel that the last audit found. Expected: "
            "none, ever.",
            "short",
            total("cowshed_audit_mismatches", BACKEND),
            bad=1,
        ),
        figure(
            "Load errors",
            "Loads that failed after all retries in the time shown; guests that touched those "
            "pages got I/O errors.",
            "short",
            counted("cowshed_load_errors_total", BACKEND),
            bad=1,
        ),
        figure(
            "Sources changed",
            "Images whose source was modified while it was served. Extents loaded from now on "
            "may not match resident ones.",
            "short",
            total("cowshed_source_changed", BACKEND),
            bad=1,
        ),
        listing(
            "Alerts",
            "Alerts that fire, or will if their condition lasts (pending).",
            [Column("Active (1: yes)", _ALERTS, "short")],
            hide=["__name__", "job"],
        ),
    ],
)

_WORKING: Final = Row(
    "Is the cache working?",
    [
        graph(
            "Hit rate",
            "Of the uses of extents by guests in the last minute, those that found them in memory: "
            "an estimate from random probes, with its 95 % bounds.",
            "percentunit",
            {
                "{{instance}}": estimate("cowshed_hit_ratio", BACKEND, "instance"),
                "{{instance}} low": estimate("cowshed_hit_ratio", BACKEND, "instance", "low"),
                "{{instance}} high": estimate("cowshed_hit_ratio", BACKEND, "instance", "high"),
            },
            span=8,
            most=1,
        ),
        graph(
            "Would more memory help?",
            "What guests used in the last minute, estimated with its 95 % bounds, beside the "
            "capacity. A scan uses more than fits and needs nothing again: the next panel says "
            "what more memory would bring.",
            "bytes",
            {
                "used {{instance}}": estimate(
                    "cowshed_estimated_working_set_bytes", BACKEND, "instance"
                ),
                "used, low {{instance}}": estimate(
                    "cowshed_estimated_working_set_bytes", BACKEND, "instance", "low"
                ),
                "used, high {{instance}}": estimate(
                    "cowshed_estimated_working_set_bytes", BACKEND, "instance", "high"
                ),
                "capacity {{instance}}": total("cowshed_capacity_bytes", BACKEND, "instance"),
            },
            span=8,
        ),
        graph(
            "Hit rate by capacity",
            "The hit rate of the last five minutes with half of today's capacity, with all of it "
            "and with twice as much, estimated. Where the lines lie close together, memory does "
            "not decide.",
            "percentunit",
            {
                "{{capacity}} x {{instance}}": "max by (capacity, instance) "
                f'(cowshed_hit_ratio_at_capacity{{{BACKEND}, window="300s"}})'
            },
            span=8,
            most=1,
        ),
        graph(
            "Standby list",
            "Bytes of extents that were unmapped and not dropped yet, and the most that they may "
            "take of the capacity.",
            "bytes",
            {
                "in standby {{instance}}": total("cowshed_standby_bytes", BACKEND, "instance"),
                "limit {{instance}}": total("cowshed_standby_limit_bytes", BACKEND, "instance"),
            },
        ),
        graph(
            "How long faults take, 99 of 100",
            "Time from reading the fault to its answer: pages that were in memory (hit), pages "
            "that had to be loaded (miss), and writes.",
            "s",
            {"{{kind}} {{instance}}": quantile(0.99, BACKEND, "kind, instance")},
        ),
        graph(
            "Page faults",
            "Faults that requested a page, per second, and those that found it resident.",
            "ops",
            {
                "requested": per_second("cowshed_requests_total", BACKEND),
                "found resident": per_second("cowshed_hits_total", BACKEND),
            },
        ),
        graph(
            "Read from sources",
            "Bytes per second read by loads of images.",
            "Bps",
            {"{{instance}}": per_second("cowshed_load_bytes_total", BACKEND, "instance")},
        ),
    ],
)

_SAVES: Final = Row(
    "What does it save?",
    [
        figure(
            "Saved by sharing",
            "Memory that guests would need with frames of their own, minus what they need now.",
            "bytes",
            total("cowshed_saved_bytes", BACKEND),
        ),
        figure(
            "Resident",
            "Image bytes in memory, once for all guests.",
            "bytes",
            total("cowshed_resident_bytes", BACKEND),
        ),
        figure(
            "Private",
            "Copies that guests made by writing; charged to their quotas.",
            "bytes",
            total("cowshed_private_bytes", BACKEND),
        ),
        figure(
            "Mappings per byte",
            "The average number of guests that a resident byte is granted to.",
            "short",
            quotient(
                total("cowshed_granted_bytes", BACKEND), total("cowshed_resident_bytes", BACKEND)
            ),
        ),
        figure(
            "Guests",
            "Guests attached now.",
            "short",
            total("cowshed_guests", BACKEND),
        ),
        figure(
            "Fault hits",
            "Page faults in the time shown that found their page resident.",
            "short",
            counted("cowshed_hits_total", BACKEND),
        ),
        graph(
            "Memory with sharing and without",
            "Without: every guest has its own frames for its granted extents, and its private "
            "copies. With: resident extents, and the private copies.",
            "bytes",
            {
                "without sharing": added(
                    total("cowshed_granted_bytes", BACKEND),
                    total("cowshed_private_bytes", BACKEND),
                ),
                "with sharing": added(
                    total("cowshed_resident_bytes", BACKEND),
                    total("cowshed_private_bytes", BACKEND),
                ),
            },
        ),
        graph(
            "Saved by image",
            "The same difference, image by image.",
            "bytes",
            {
                "{{domain}}/{{image}} {{instance}}": total(
                    "cowshed_saved_bytes", BACKEND, "domain, image, instance"
                )
            },
            stacked=True,
        ),
    ],
)

_USERS: Final = Row(
    "Who is using it?",
    [
        listing(
            "Images",
            "One line for each image, domain and backend; the name links to the image's dashboard.",
            [
                Column(
                    "Guests", total("cowshed_guests", BACKEND, "domain, image, instance"), "short"
                ),
                Column(
                    "Faults",
                    per_second("cowshed_requests_total", BACKEND, "domain, image, instance"),
                    "ops",
                ),
                Column(
                    "Hit rate",
                    estimate("cowshed_image_hit_ratio", BACKEND, "domain, image, instance"),
                    "percentunit",
                ),
                Column(
                    "Resident",
                    total("cowshed_resident_bytes", BACKEND, "domain, image, instance"),
                    "bytes",
                ),
                Column(
                    "Saved",
                    total("cowshed_saved_bytes", BACKEND, "domain, image, instance"),
                    "bytes",
                ),
                Column(
                    "Private",
                    total("cowshed_private_bytes", BACKEND, "domain, image, instance"),
                    "bytes",
                ),
            ],
            link=("image", "Show this image", _IMAGE_URL),
        ),
        listing(
            "Sharing domains",
            "One line for each domain and backend. Guests share memory only within a domain; "
            "private copies are extra.",
            [
                Column("Guests", total("cowshed_guests", BACKEND, "domain, instance"), "short"),
                Column(
                    "Resident",
                    total("cowshed_resident_bytes", BACKEND, "domain, instance"),
                    "bytes",
                ),
                Column("Saved", total("cowshed_saved_bytes", BACKEND, "domain, instance"), "bytes"),
                Column(
                    "Private", total("cowshed_private_bytes", BACKEND, "domain, instance"), "bytes"
                ),
                Column(
                    "Evictions",
                    per_second("cowshed_evictions_total", BACKEND, "domain, instance"),
                    "ops",
                ),
            ],
        ),
        graph(
            "Guests by state",
            "running; stopped-quota: a write waits for a larger quota; frozen: writes wait "
            "for the end of a handoff; parked: the connection is lost, the mappings are not; "
            "away: not connected, its private pages are kept; detached: its memory can no "
            "longer be served.",
            "short",
            {"{{state}}": total("cowshed_guests", BACKEND, "state")},
            stacked=True,
        ),
        graph(
            "Guests by transport",
            "The transport of each guest's connection, or of its last one.",
            "short",
            {"{{transport}}": total("cowshed_guests", BACKEND, "transport")},
            stacked=True,
        ),
        graph(
            "Mappings by transport",
            "Connections with memory mapped or populated; a guest may have several. Guests over "
            "NBD and networks have none.",
            "short",
            {"{{transport}}": total("cowshed_mappings", BACKEND, "transport")},
            stacked=True,
        ),
        graph(
            "New guests, and refused connections",
            "Attaches per second, and connections that the backend dropped, by reason.",
            "ops",
            {
                "attached": per_second("cowshed_guest_attaches_total", BACKEND),
                "dropped: {{reason}}": per_second(
                    "cowshed_connections_dropped_total", BACKEND, "reason"
                ),
            },
        ),
    ],
)

_ROOM: Final = Row(
    "Is there room?",
    [
        graph(
            "Capacity",
            "Reserved: loaded or being loaded; it never exceeds the capacity. Pinned: never "
            "evicted; bounded by the limit for pins.",
            "bytes",
            {
                "capacity": total("cowshed_capacity_bytes", BACKEND),
                "reserved": total("cowshed_reserved_bytes", BACKEND),
                "pinned": total("cowshed_pinned_bytes", BACKEND),
                "limit for pins": total("cowshed_pinnable_bytes", BACKEND),
            },
        ),
        graph(
            "Evictions",
            "Extents evicted per second, by reason, and extents read again soon after that "
            "(thrashing).",
            "ops",
            {
                "evicted: {{reason}}": per_second("cowshed_evictions_total", BACKEND, "reason"),
                "read again": per_second("cowshed_reloads_total", BACKEND),
            },
        ),
        graph(
            "Loads that wait",
            "Loads in the queue, and loaders that wait for room. If loaders wait for long, "
            "eviction cannot keep up.",
            "short",
            {
                "queued loads": total("cowshed_queued_loads", BACKEND),
                "waiting loaders": total("cowshed_waiting_loaders", BACKEND),
            },
        ),
        graph(
            "Still to be warmed",
            "Bytes that autowarm and cowshed warm have not reached yet; guests' loads go "
            "first. cowshed warm --abort ends it.",
            "bytes",
            {
                "{{domain}}/{{image}} {{instance}}": total(
                    "cowshed_warming_bytes", BACKEND, "domain, image, instance"
                )
            },
            stacked=True,
        ),
    ],
)

_NBD: Final = Row(
    "How are NBD clients served?",
    [
        graph(
            "NBD requests",
            "Requests answered per second, by command, and those answered with an error.",
            "reqps",
            {
                "{{command}}": per_second("cowshed_nbd_requests_total", BACKEND, "command"),
                "errors": per_second("cowshed_nbd_errors_total", BACKEND),
            },
            span=12,
        ),
        graph(
            "NBD bytes",
            "Bytes that clients read and wrote per second.",
            "Bps",
            {"{{direction}}": per_second("cowshed_nbd_bytes_total", BACKEND, "direction")},
            span=12,
        ),
        graph(
            "NBD reads, resident or not",
            "Extents that reads found resident, and extents that they waited for.",
            "short",
            {
                "resident": per_second("cowshed_nbd_hits_total", BACKEND),
                "waited for": per_second("cowshed_nbd_misses_total", BACKEND),
            },
            span=12,
        ),
        graph(
            "New NBD connections, and requests that wait",
            "Connections made per second. Requests wait for a load or a disk; others go on.",
            "short",
            {
                "connections": per_second("cowshed_nbd_connections_total", BACKEND),
                "waiting requests": total("cowshed_nbd_waiting_requests", BACKEND),
            },
            span=12,
        ),
    ],
)

_PROCESS: Final = Row(
    "Is the backend process itself well?",
    [
        graph(
            "CPU",
            "CPUs that the backend uses.",
            "short",
            {"{{instance}}": per_second("process_cpu_seconds_total", BACKEND, "instance")},
            span=8,
        ),
        graph(
            "Memory",
            "The resident set of the process itself.",
            "bytes",
            {"{{instance}}": total("process_resident_memory_bytes", BACKEND, "instance")},
            span=8,
        ),
        graph(
            "Open descriptors, share of the limit",
            "Each guest needs a few; at 100 % no guest can attach.",
            "percentunit",
            {
                "{{instance}}": quotient(
                    total("process_open_fds", BACKEND, "instance"),
                    total("process_max_fds", BACKEND, "instance"),
                )
            },
            span=8,
        ),
        listing(
            "Backends",
            "For each backend: uptime; restarts in the time shown, after crashes and on "
            "purpose (reload, takeover); how long the adoption took; whether it has no "
            "keeper; groups of descriptors not held for a successor; log lines lost; the age "
            "of the last audit; and the version.",
            [
                Column(
                    "Up for",
                    f"time() - max by (instance) (cowshed_start_timestamp_seconds{{{BACKEND}}})",
                    "s",
                ),
                Column(
                    "Restarts",
                    "sum by (instance) "
                    f"(changes(cowshed_start_timestamp_seconds{{{BACKEND}}}[$__range]))",
                    "short",
                ),
                Column(
                    "After crashes",
                    counted("cowshed_restarts_total", BACKEND, "instance", 'how="crash"'),
                    "short",
                ),
                Column(
                    "On purpose",
                    counted("cowshed_restarts_total", BACKEND, "instance", 'how!="crash"'),
                    "short",
                ),
                Column(
                    "Adoption took",
                    f"max by (instance) (cowshed_adoption_seconds{{{BACKEND}}})",
                    "s",
                ),
                Column(
                    "No keeper (1: yes)",
                    f'max by (instance) (cowshed_keeper{{{BACKEND}, kind="none"}})',
                    "short",
                ),
                Column(
                    "Not held",
                    f"max by (instance) (cowshed_not_held_groups{{{BACKEND}}})",
                    "short",
                ),
                Column(
                    "Log lines lost",
                    counted("cowshed_log_lines_lost_total", BACKEND, "instance"),
                    "short",
                ),
                Column(
                    "Since the last audit",
                    "time() - max by (instance) "
                    f"(cowshed_audit_timestamp_seconds{{{BACKEND}}} > 0)",
                    "s",
                ),
                Column(
                    "Running (1: yes)",
                    f"max by (instance, version) (cowshed_build_info{{{BACKEND}}})",
                    "short",
                ),
            ],
        ),
    ],
)


def board() -> dashboard.Dashboard:
    """Build the dashboard."""
    about = "Is the cache healthy, what does it save, who uses it, and is there room?"
    return assemble("Overview", about, [_HEALTH, _WORKING, _SAVES, _USERS, _ROOM, _NBD, _PROCESS])
