# SPDX-License-Identifier: Apache-2.0
"""Every metric the daemon exports: name, type, labels with their values, and meaning.

The exporter makes its families from this list, and docs/metrics.md is generated from it, so that
the documentation and the exported metrics agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from cowshed.service.persist.kept_counts import LOG_COUNTS
from cowshed.service.supervise.history import HOWS, KEEPERS

__all__ = ["CATALOG", "LIBRARY", "Metric"]

Kind = Literal["info", "gauge", "counter", "histogram"]

REFS: Final = ("0", "1", "2-3", "4-7", "8-15", "16-31", "32+")
STATES: Final = ("running", "stopped-quota", "frozen", "parked", "detached", "away")
# Of guests with memory mapped or populated; TRANSPORTS adds those of guests without.
MAPPING_TRANSPORTS: Final = ("unix", "firecracker", "nydus")
TRANSPORTS: Final = (*MAPPING_TRANSPORTS, "nbd", "tcp", "tls", "vsock")
NBD_COMMANDS: Final = ("read", "write", "trim", "zero", "flush", "cache", "status")
ACCESS_OUTCOMES: Final = ("hit", "loaded", "failed")
WRITE_OUTCOMES: Final = ("copied", "refused")
LOAD_REASONS: Final = ("demand", "prefetch")
SOURCES: Final = ("file",)
EVICT_REASONS: Final = ("pressure", "request")
CLOSE_REASONS: Final = ("quota", "pressure", "freeze", "request", "sample", "guest")
WINDOWS: Final = ("10s", "60s", "300s")
BOUNDS: Final = ("value", "low", "high")
CAPACITIES: Final = ("0.5", "1", "2")
STANDBY_REASONS: Final = ("victim", "sample")
CHECKS: Final = ("refs", "private", "granted", "resident", "standby")
DRAIN_STATES: Final = ("none", "draining", "done", "failed")
DROP_REASONS: Final = ("handshake", "protocol", "limit", "broken")
DURATION_KINDS: Final = ("hit", "miss", "write")


@dataclass(frozen=True)
class Metric:
    """One metric. values has the values that a label can take, if they are known beforehand.

    name is as in queries: with _total, _info. of_guest: only with guest_metrics. is_estimate:
    absent while it is not known, where others are 0.
    """

    name: str
    kind: Kind
    meaning: str
    labels: tuple[str, ...] = ()
    values: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    of_guest: bool = False
    is_estimate: bool = False


def _image(name: str, kind: Kind, meaning: str, /, **values: tuple[str, ...]) -> Metric:
    return Metric(f"cowshed_{name}", kind, meaning, ("domain", "image", *values), values)


def _one(name: str, kind: Kind, meaning: str, /, **values: tuple[str, ...]) -> Metric:
    return Metric(f"cowshed_{name}", kind, meaning, tuple(values), values)


def _estimate(name: str, meaning: str, /, *labels: str, **values: tuple[str, ...]) -> Metric:
    return Metric(f"cowshed_{name}", "gauge", meaning, (*labels, *values), values, is_estimate=True)


def _guest(name: str, kind: Kind, meaning: str) -> Metric:
    return Metric(
        f"cowshed_guest_{name}", kind, meaning, ("guest", "domain", "image"), of_guest=True
    )


_BACKEND: Final = (
    Metric("cowshed_build_info", "info", "The version that runs; always 1.", ("version",)),
    _one("start_timestamp_seconds", "gauge", "When the daemon began, in Unix time."),
    _one(
        "restarts_total",
        "counter",
        "Backends that succeeded another, by what ended that one. crash: it "
        "died; reload: SIGHUP, or systemd; takeover: cowshed serve --takeover.",
        how=HOWS,
    ),
    _one(
        "adoption_seconds",
        "gauge",
        "Time from this backend's start until it served everything it inherited; 0 if it "
        "inherited nothing.",
    ),
    _one(
        "keeper",
        "gauge",
        "The keeper, which holds descriptors for the next backend and starts it: 1 for the kind "
        "in use, 0 for the others. own: cowshed's own; none: the backend's death is final.",
        kind=KEEPERS,
    ),
    _one(
        "not_held_groups",
        "gauge",
        "Groups of descriptors that should be held for the next backend and are not: their "
        "images, guests, overlays or listeners would end with this one. 0 without a keeper.",
    ),
    _one(
        "log_lines_lost_total",
        "counter",
        "Log lines lost because they could not be written at once: of this backend and its "
        "predecessors, and of their keepers.",
        process=LOG_COUNTS,
    ),
    _one("capacity_bytes", "gauge", "Memory that the frames of all images may take together."),
    _one(
        "reserved_bytes",
        "gauge",
        "The part of the capacity taken by extents that are resident, being loaded or evicted.",
    ),
    _one(
        "standby_bytes",
        "gauge",
        "The part of the capacity taken by the standby list: extents that were unmapped and not "
        "dropped yet.",
    ),
    _one("standby_limit_bytes", "gauge", "The most that the standby list may take."),
    _estimate(
        "hit_ratio",
        "Of the uses of extents in the window, by guests of all images, those that found their "
        "extent in memory: an estimate from random probes, with its 95 % bounds. Absent while it "
        "is not known.",
        window=WINDOWS,
        bound=BOUNDS,
    ),
    _estimate(
        "estimated_working_set_bytes",
        "What guests of all images used at least once in the window: an estimate from random "
        "probes, with its 95 % bounds. Absent while it is not known.",
        window=WINDOWS,
        bound=BOUNDS,
    ),
    _estimate(
        "hit_ratio_at_capacity",
        "The hit ratio that the window would have had with half of the capacity (0.5), with all "
        "of it (1) or with twice as much (2): an estimate. Absent while it is not known.",
        window=WINDOWS,
        capacity=CAPACITIES,
    ),
    _one("pinnable_bytes", "gauge", "The most that pins of all images may take together."),
    _one("waiting_loaders", "gauge", "Loader threads that have work and no room for it."),
    _one("queued_loads", "gauge", "Runs of extents that wait for a loader."),
    _one(
        "connections_dropped_total",
        "counter",
        "Connections that the daemon ended or turned away. handshake: not finished in time, or for "
        "an image that the peer may not use; protocol: the peer violated it; limit: no place or "
        "no descriptor was left; broken: the guest's memory can no longer be served.",
        reason=DROP_REASONS,
    ),
    _one(
        "audit_mismatches",
        "gauge",
        "Differences between the ledger and the kernel that the last audit found; 0 before the "
        "first.",
        check=CHECKS,
    ),
    _one(
        "audit_timestamp_seconds",
        "gauge",
        "When the last audit ended, in Unix time; 0 before the first.",
    ),
    _one("drain_state", "gauge", "1 for the state the drain is in, else 0.", state=DRAIN_STATES),
    _one("drain_progress_ratio", "gauge", "How much of the drain is done, 0 to 1."),
    _one("drain_blockers", "gauge", "Reasons that block the drain: of guests, images, the target."),
    _one(
        "fault_duration_seconds",
        "histogram",
        "From the moment a fault is read to its answer. hit: answered from memory, a resident "
        "extent or the standby list; miss: after a load, failed ones too; write: opened for a "
        "private copy. A fault that waits at its quota is in none.",
        kind=DURATION_KINDS,
    ),
    _one(
        "guest_metrics_left_out",
        "gauge",
        "Guests without series of their own because guest_metrics allows no more; 0 while they "
        "are off.",
    ),
)

_IMAGES: Final = (
    Metric(
        "cowshed_image_info",
        "info",
        'An image\'s source and digest; always 1. The digest is "" until it has been computed.',
        ("domain", "image", "source", "digest"),
    ),
    _image("image_size_bytes", "gauge", "The image's size."),
    _image("resident_bytes", "gauge", "Frames in resident extents."),
    _image(
        "granted_bytes",
        "gauge",
        "Bytes that guests may map, summed over guests: each counts the extents granted to it.",
    ),
    _image(
        "private_bytes",
        "gauge",
        "Pages charged to attached guests as private copies. Ahead of the kernel by pages that "
        "were opened and not written yet, until the settling that follows each scrape.",
    ),
    _image(
        "saved_bytes",
        "gauge",
        "Memory the grants would take if every guest had its own frames, less what they take.",
    ),
    _image("pinned_bytes", "gauge", "Extents under at least one pin, resident or not."),
    _image(
        "open_regions",
        "gauge",
        "Regions of 2 MiB that the kernel maps for a guest by itself, summed over guests.",
    ),
    _image(
        "lost_regions",
        "gauge",
        "Regions that stay in memory until their guest ends, because it moved a part of one away "
        "while it was being opened.",
    ),
    _image(
        "open_region_reserved_bytes",
        "gauge",
        "Charged to guests' quotas for open regions beside their private pages; given back when "
        "these are closed.",
    ),
    _image("region_opens_total", "counter", "Regions opened."),
    _image(
        "region_closes_total",
        "counter",
        "Regions closed. quota: a guest's quota ran short; pressure: room did; freeze: private "
        "pages are moved; request: an operator's command; sample: to learn whether it is used; "
        "guest: it changed its memory, or left.",
        reason=CLOSE_REASONS,
    ),
    _image(
        "collapse_failures_total",
        "counter",
        "Times that the kernel made no huge page of a region's frames, which then is not opened.",
    ),
    _image(
        "working_set_bytes",
        "gauge",
        "Extents that any guest was ever granted since the daemon began.",
    ),
    _image("working_set_resident_bytes", "gauge", "The resident part of the working set."),
    _image(
        "warming_bytes",
        "gauge",
        "Bytes that autowarm and cowshed warm still have to load or skip; 0 while nothing is "
        "warmed.",
    ),
    _image(
        "extents",
        "gauge",
        "Resident extents by the number of guests that were granted them.",
        refs=REFS,
    ),
    _image(
        "guests",
        "gauge",
        "Attached guests. unix: by the library or cowshed attach; nbd: over a unix socket, TCP or "
        "TLS; tcp, tls, vsock: by the library, over a network. stopped-quota: a write waits for a "
        "larger quota; frozen: writes wait for the end of a handoff; parked: it closed its "
        "connection and still has the image mapped; detached: its memory is no longer served, "
        "and it is about to be dropped; away: it is not connected, and its private pages are kept.",
        transport=TRANSPORTS,
        state=STATES,
    ),
    _image(
        "mappings",
        "gauge",
        "Connections that have memory of the image mapped or populated: a guest may have several.",
        transport=MAPPING_TRANSPORTS,
    ),
    _image("source_changed", "gauge", "1 if the source changed while it is served, else 0."),
    _image(
        "source_wait_seconds",
        "gauge",
        "How long the oldest read or check of the source has been unanswered; 0 if it answers.",
    ),
    _image(
        "image_unserved",
        "gauge",
        "1 for an image of the configuration that is not served, because its source cannot be "
        "opened; 0 for one that is.",
    ),
    _image(
        "requests_total",
        "counter",
        "Faults that asked for a page: hits, and those that began to wait for a load.",
    ),
    _image("hits_total", "counter", "Of the requests, those answered from a resident extent."),
    Metric(
        "cowshed_faults_total",
        "counter",
        "Faults answered, by kind and outcome. missing and minor: hit (resident, or in the standby "
        "list), loaded, failed (its source could not be read); write: copied (the page was opened "
        "for a private copy), refused (at the quota; first touches that were writes too).",
        ("domain", "image", "kind", "outcome"),
        {
            "kind": ("missing", "minor", "write"),
            "outcome": (*ACCESS_OUTCOMES, *WRITE_OUTCOMES),
        },
    ),
    _image(
        "loads_total",
        "counter",
        "Extents read from their source. demand: a guest waited when the load ended; prefetch: "
        "none did (readahead, warm and pin).",
        reason=LOAD_REASONS,
    ),
    _image("load_bytes_total", "counter", "Bytes read from the source.", source=SOURCES),
    _image(
        "load_errors_total",
        "counter",
        "Extents that could not be loaded, after the retries.",
        source=SOURCES,
    ),
    _image("load_retries_total", "counter", "Reads of the source that were tried again."),
    _image(
        "evictions_total",
        "counter",
        "Extents evicted. pressure: to make room; request: by an operator's command.",
        reason=EVICT_REASONS,
    ),
    _image(
        "soft_hits_total",
        "counter",
        "Extents that a guest's touch brought back from the standby list, without a read of the "
        "source. Reasons: as in cowshed_standby_unmaps_total.",
        reason=STANDBY_REASONS,
    ),
    _image(
        "standby_unmaps_total",
        "counter",
        "Extents unmapped into the standby list. victim: to make room; sample: at random, and "
        "again if they were touched, to learn what is used.",
        reason=STANDBY_REASONS,
    ),
    _estimate(
        "image_hit_ratio",
        "As cowshed_hit_ratio, of this image.",
        "domain",
        "image",
        window=WINDOWS,
        bound=BOUNDS,
    ),
    _estimate(
        "image_estimated_working_set_bytes",
        "As cowshed_estimated_working_set_bytes, of this image.",
        "domain",
        "image",
        window=WINDOWS,
        bound=BOUNDS,
    ),
    _image(
        "reloads_total",
        "counter",
        "Loads of recently evicted extents, as far back as the eviction policy remembers: many of "
        "them mean thrashing. Counted up to a second late.",
    ),
    _image(
        "cow_pages_total",
        "counter",
        "Private copies ever made, including those of guests that left. Ahead of the kernel like "
        "cowshed_private_bytes.",
    ),
    _image("discarded_pages_total", "counter", "Private pages that guests gave back (madvise)."),
    _image("poisoned_pages_total", "counter", "Pages made SIGBUS because no load succeeded."),
    _image("repaired_pages_total", "counter", "Poisoned pages that a later load repaired."),
    _image("mapped_pages_total", "counter", "Pages mapped into guests, on demand or ahead."),
    _image("quota_stops_total", "counter", "Times that a guest came to a stop at its quota."),
    _image(
        "quota_stopped_seconds_total",
        "counter",
        "Time that guests spent stopped at their quota, up to this moment.",
    ),
    _image("guest_attaches_total", "counter", "Times that a guest was attached."),
    _image("nbd_connections_total", "counter", "NBD clients that finished their handshake."),
    _image(
        "nbd_requests_total",
        "counter",
        "NBD requests answered, of the image and of guests' overlays of it.",
        command=NBD_COMMANDS,
    ),
    _image(
        "nbd_bytes_total",
        "counter",
        "Bytes that NBD clients read and wrote.",
        direction=("read", "write"),
    ),
    _image("nbd_errors_total", "counter", "NBD requests that were answered with an error."),
    _image("nbd_hits_total", "counter", "Extents that NBD reads found resident."),
    _image("nbd_misses_total", "counter", "Extents that NBD reads waited for."),
    _image("nbd_waiting_requests", "gauge", "NBD requests that wait for a load or a disk."),
    _image(
        "strays_total",
        "counter",
        "Extents that had frames no load wrote (a guest read a mapping without userfaultfd), and "
        "that were emptied.",
    ),
    _image(
        "retries_total",
        "counter",
        "Answers deferred because the guest's memory was changing at that moment.",
    ),
)

_GUESTS: Final = (
    _guest("requests_total", "counter", "Faults of the guest that asked for a page."),
    _guest("hits_total", "counter", "Of these, those answered from a resident extent."),
    _guest("private_bytes", "gauge", "Pages charged to the guest; see cowshed_private_bytes."),
    _guest("quota_bytes", "gauge", "Private bytes it may have; +Inf without a quota."),
    _guest("granted_bytes", "gauge", "Extents it was granted."),
    _guest(
        "cow_pages_total",
        "counter",
        "Pages charged to it, including those that it never wrote and whose charge was given back.",
    ),
    _guest("quota_stops_total", "counter", "Times it came to a stop at its quota."),
    _guest("stopped", "gauge", "1 while it is stopped at its quota, else 0."),
)

CATALOG: Final[Mapping[str, Metric]] = {
    metric.name: metric for metric in (*_BACKEND, *_IMAGES, *_GUESTS)
}

_GENERATION: Final = {"generation": ("0", "1", "2")}
# The metrics that prometheus_client adds itself.
LIBRARY: Final[Mapping[str, Metric]] = {
    metric.name: metric
    for metric in (
        Metric("process_virtual_memory_bytes", "gauge", "Address space; images count in full."),
        Metric(
            "process_resident_memory_bytes",
            "gauge",
            "Memory of the daemon itself; the frames of images are not mapped in it.",
        ),
        Metric("process_start_time_seconds", "gauge", "When the process began, in Unix time."),
        Metric("process_cpu_seconds_total", "counter", "CPU time, fault threads and loaders too."),
        Metric("process_open_fds", "gauge", "Open descriptors: several for each guest."),
        Metric("process_max_fds", "gauge", "The limit of open descriptors."),
        *(
            Metric(f"python_gc_{name}_total", "counter", meaning, ("generation",), _GENERATION)
            for name, meaning in (
                ("objects_collected", "Objects that Python's garbage collector freed."),
                ("objects_uncollectable", "Objects that it could not free."),
                ("collections", "Times that it ran."),
            )
        ),
    )
}
