# SPDX-License-Identifier: Apache-2.0
"""Image: hit rate, working set, eviction, source and writes of the images chosen."""

from typing import Final

from grafana_foundation_sdk.builders import dashboard

from dashboards.boards import IMAGE_VARIABLES, Row, assemble
from dashboards.panels import Column, bars, graph, listing
from dashboards.queries import IMAGE, estimate, per_second, quotient, total

__all__ = ["board"]

_EACH: Final = "domain, image, instance"

_SERVED: Final = Row(
    "How well is the image served?",
    [
        graph(
            "Hit rate by image",
            "Of the uses of its extents by guests in the last minute, those that found them in "
            "memory: an estimate from random probes.",
            "percentunit",
            {
                "{{domain}}/{{image}} {{instance}}": estimate(
                    "cowshed_image_hit_ratio", IMAGE, "domain, image, instance"
                )
            },
            span=8,
            most=1,
        ),
        graph(
            "Faults by kind",
            "missing: the page was not in memory; minor: it was, but not mapped; write: the "
            "first write to a shared page.",
            "ops",
            {"{{kind}}": per_second("cowshed_faults_total", IMAGE, "kind")},
            span=8,
        ),
        graph(
            "Faults by outcome",
            "hit: from memory; loaded: after a read of the source; failed: an I/O error for the "
            "guest; copied: a private page; refused: at the quota.",
            "ops",
            {"{{outcome}}": per_second("cowshed_faults_total", IMAGE, "outcome")},
            span=8,
            stacked=True,
        ),
        graph(
            "Pages mapped for each fault",
            "One fault maps a window of pages; larger windows mean fewer faults.",
            "short",
            {
                "{{domain}}/{{image}} {{instance}}": quotient(
                    per_second("cowshed_mapped_pages_total", IMAGE, "domain, image, instance"),
                    per_second("cowshed_requests_total", IMAGE, "domain, image, instance"),
                )
            },
        ),
        graph(
            "Faults tried again, and strays",
            "Answers that were retried because the guest's memory was changing; and frames "
            "that no load wrote, found and emptied. Neither is an error by itself.",
            "ops",
            {
                "tried again": per_second("cowshed_retries_total", IMAGE),
                "strays": per_second("cowshed_strays_total", IMAGE),
            },
        ),
    ],
)

_MEMORY: Final = Row(
    "How much of it is in memory, and how widely is it shared?",
    [
        graph(
            "In memory",
            "The working set is every extent that guests have requested since the start, and what "
            "they used in a minute is estimated; resident extents are in memory now.",
            "bytes",
            {
                "size": total("cowshed_image_size_bytes", IMAGE),
                "working set": total("cowshed_working_set_bytes", IMAGE),
                "used in a minute": (
                    f"sum({estimate('cowshed_image_estimated_working_set_bytes', IMAGE, _EACH)})"
                ),
                "resident": total("cowshed_resident_bytes", IMAGE),
                "pinned": total("cowshed_pinned_bytes", IMAGE),
            },
        ),
        bars(
            "Working set that is resident",
            "If this and the hit rate are low, the capacity is too small for the working set, "
            "or the image was not warmed.",
            "percentunit",
            quotient(
                total("cowshed_working_set_resident_bytes", IMAGE, "domain, image, instance"),
                total("cowshed_working_set_bytes", IMAGE, "domain, image, instance"),
            ),
            "{{domain}}/{{image}} {{instance}}",
            most=1,
        ),
        graph(
            "Resident extents by number of guests",
            "How many guests each resident extent is granted to. Extents without a grant are "
            "evicted first.",
            "short",
            {"{{refs}} guests": total("cowshed_extents", IMAGE, "refs")},
            stacked=True,
        ),
        graph(
            "Granted, saved and private",
            "Granted: extents times the guests they are granted to; saved: the memory that "
            "sharing saves; private: copies made by writes.",
            "bytes",
            {
                "granted": total("cowshed_granted_bytes", IMAGE),
                "saved": total("cowshed_saved_bytes", IMAGE),
                "private": total("cowshed_private_bytes", IMAGE),
            },
        ),
    ],
)

_EVICTION: Final = Row(
    "Is it evicted too early?",
    [
        graph(
            "Evicted extents",
            "pressure: another extent needed the room; request: cowshed evict.",
            "ops",
            {"{{reason}}": per_second("cowshed_evictions_total", IMAGE, "reason")},
            span=8,
        ),
        graph(
            "Loaded extents",
            "demand: a guest waited for it; prefetch: read ahead, or warmed.",
            "ops",
            {"{{reason}}": per_second("cowshed_loads_total", IMAGE, "reason")},
            span=8,
        ),
        graph(
            "Loads of just evicted extents",
            "Share of loads of extents that were evicted a short while before. A lasting high "
            "value is thrashing: the capacity is too small.",
            "percentunit",
            {
                "{{domain}}/{{image}} {{instance}}": quotient(
                    per_second("cowshed_reloads_total", IMAGE, "domain, image, instance"),
                    per_second("cowshed_loads_total", IMAGE, "domain, image, instance"),
                )
            },
            span=8,
            most=1,
        ),
        graph(
            "Second chances",
            "Unmapped: extents that went to the standby list, to make room. Soft hits: those that "
            "a guest touched in time.",
            "ops",
            {
                "unmapped": per_second(
                    "cowshed_standby_unmaps_total", IMAGE, where='reason="victim"'
                ),
                "soft hits": per_second("cowshed_soft_hits_total", IMAGE, where='reason="victim"'),
            },
        ),
        graph(
            "Probes",
            "Extents unmapped to learn what is used, at random, and again if a guest touched them. "
            "Too few make estimates wide.",
            "ops",
            {
                "begun": per_second("cowshed_standby_unmaps_total", IMAGE, where='reason="sample"'),
                "touched": per_second("cowshed_soft_hits_total", IMAGE, where='reason="sample"'),
            },
        ),
    ],
)

_REGIONS: Final = Row(
    "How much does the kernel map by itself?",
    [
        graph(
            "Open regions",
            "Parts of 2 MiB that guests read and write without a fault, summed over guests. Lost: "
            "they stay in memory until their guest ends.",
            "short",
            {
                "open": total("cowshed_open_regions", IMAGE),
                "lost": total("cowshed_lost_regions", IMAGE),
            },
        ),
        graph(
            "Reserved for open regions",
            "Charged to quotas beside the private pages. A guest that needs it gets it back.",
            "bytes",
            {"reserved": total("cowshed_open_region_reserved_bytes", IMAGE)},
        ),
        graph(
            "Regions opened and closed",
            "quota: a guest needed its quota; pressure: another extent needed the room; freeze: a "
            "drain; request: cowshed evict; sample: to learn whether it is used; guest: it changed "
            "its memory, or left.",
            "ops",
            {
                "opened": per_second("cowshed_region_opens_total", IMAGE),
                "closed: {{reason}}": per_second("cowshed_region_closes_total", IMAGE, "reason"),
            },
        ),
        graph(
            "Huge pages refused",
            "Times that the kernel made no huge page of a region's frames: free memory is "
            "fragmented, or a frame was in use.",
            "ops",
            {"refused": per_second("cowshed_collapse_failures_total", IMAGE)},
        ),
    ],
)

_SOURCE: Final = Row(
    "Is its source well?",
    [
        graph(
            "Read from the source",
            "Bytes per second, by kind of source.",
            "Bps",
            {"{{source}}": per_second("cowshed_load_bytes_total", IMAGE, "source")},
            span=8,
        ),
        graph(
            "Failed reads",
            "Tried again: a read failed and was repeated. Failed: all attempts failed.",
            "ops",
            {
                "tried again": per_second("cowshed_load_retries_total", IMAGE),
                "failed: {{source}}": per_second("cowshed_load_errors_total", IMAGE, "source"),
            },
            span=8,
        ),
        graph(
            "Pages that give I/O errors",
            "Pages poisoned because their load failed, and pages repaired by a later good load.",
            "ops",
            {
                "poisoned": per_second("cowshed_poisoned_pages_total", IMAGE),
                "repaired": per_second("cowshed_repaired_pages_total", IMAGE),
            },
            span=8,
        ),
        listing(
            "Sources",
            "The source of each image, and whether it was changed while it was served.",
            [
                Column(
                    "Changed (1: yes)",
                    f"max by (domain, image, instance) (cowshed_source_changed{{{IMAGE}}})",
                    "short",
                ),
                Column(
                    "Size",
                    total("cowshed_image_size_bytes", IMAGE, "domain, image, instance"),
                    "bytes",
                ),
                Column(
                    "Served",
                    "max by (domain, image, instance, source, digest) "
                    f"(cowshed_image_info{{{IMAGE}}})",
                    "short",
                ),
            ],
        ),
    ],
)

_WRITES: Final = Row(
    "What do writes cost?",
    [
        graph(
            "Private pages",
            "Pages copied at guests' writes, and private pages that guests discarded.",
            "ops",
            {
                "copied": per_second("cowshed_cow_pages_total", IMAGE),
                "discarded": per_second("cowshed_discarded_pages_total", IMAGE),
            },
            span=8,
        ),
        graph(
            "Writes that met a quota",
            "How often a guest was stopped at its quota, per second.",
            "ops",
            {
                "{{domain}}/{{image}} {{instance}}": per_second(
                    "cowshed_quota_stops_total", IMAGE, "domain, image, instance"
                )
            },
            span=8,
        ),
        graph(
            "Guests stopped at a quota",
            "Guests stopped, on average, between two points of the graph.",
            "short",
            {
                "{{domain}}/{{image}} {{instance}}": per_second(
                    "cowshed_quota_stopped_seconds_total", IMAGE, "domain, image, instance"
                )
            },
            span=8,
            stacked=True,
        ),
    ],
)


def board() -> dashboard.Dashboard:
    """Build the dashboard."""
    about = "Hit rate, working set, eviction, source and writes of each image."
    return assemble(
        "Image",
        about,
        [_SERVED, _MEMORY, _EVICTION, _REGIONS, _SOURCE, _WRITES],
        IMAGE_VARIABLES,
    )
