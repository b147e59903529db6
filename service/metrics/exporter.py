# SPDX-License-Identifier: Apache-2.0
"""The exporter: reads the core's counters at each scrape, and keeps none of its own.

A scrape takes no lock that a fault, an attach or the daemon's loop could wait for: one call to the
core sums an image's accounts, one its extents. It does not settle; the Settler does so after each
scrape, so metrics of private pages lag by at most one scrape.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry, GCCollector, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from cowshed.accounting import (
    AccountState,
    AccountSums,
    Latency,
    LatencyKind,
    read_accounts,
    read_states,
    sum_accounts,
)
from cowshed.cache import Image, PageStore
from cowshed.cache._core import lib
from cowshed.cache.images import PAGE_BYTES
from cowshed.service.guests.guests import Guest, GuestTable
from cowshed.service.guests.states import STATE_WORDS, joint_state
from cowshed.service.images.evictor import Evictor
from cowshed.service.images.sampler import Sampler
from cowshed.service.images.warming import Warming
from cowshed.service.metrics.catalog import (
    BOUNDS,
    CATALOG,
    DRAIN_STATES,
    MAPPING_TRANSPORTS,
    NBD_COMMANDS,
    REFS,
    STATES,
    TRANSPORTS,
)
from cowshed.service.metrics.service_counters import ServiceCounters
from cowshed.service.overlays.overlays import OverlayGuest
from cowshed.service.persist.kept_counts import LOG_COUNTS, KeptCounts
from cowshed.service.runtime.version import VERSION
from cowshed.service.supervise.history import KEEPERS, RestartHistory
from cowshed.service.web.http_messages import Answer, HttpRequest
from cowshed.transport.nbd.serving import NbdCounters

__all__ = ["Exporter", "MetricsSources"]

# A family's values, by the values of its labels in the order of the catalog.
_Values = dict[tuple[str, ...], float]
# The core's histogram has four buckets per power of two nanoseconds: every fourth is exported.
_BOUNDS_NS: Final = [1 << exponent for exponent in range(10, 34)]
_BUCKETS: Final = [
    [lib.bucket_bound_ns(no) for no in range(lib.LATENCY_BUCKETS)].index(bound_ns)
    for bound_ns in _BOUNDS_NS
]


@dataclass(frozen=True)
class MetricsSources:
    """The exporter's sources. max_guests: how many guests may have series of their own."""

    store: PageStore
    evictor: Evictor
    guests: GuestTable
    counters: ServiceCounters
    max_guests: int = 0
    overlays: Iterable[OverlayGuest] = ()
    nbd: Callable[[], Iterable[tuple[Image, NbdCounters]]] = tuple
    warming: Warming = field(default_factory=Warming)
    history: RestartHistory = field(default_factory=RestartHistory)
    log_counts: KeptCounts = field(default_factory=lambda: KeptCounts(LOG_COUNTS))
    source_wait_seconds: Callable[[Image], float] = lambda _: 0.0
    unserved: Callable[[], list[tuple[str, str]]] = list
    sampler: Sampler | None = None


class Exporter(Collector):
    """Makes the text of a scrape, for any number of threads at once.

    on_scrape is called after each, in the same thread.
    """

    def __init__(
        self, sources: MetricsSources, on_scrape: Callable[[], None] = lambda: None
    ) -> None:
        self._sources = sources
        self._on_scrape = on_scrape
        self._started_at = time.time()
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)
        GCCollector(registry=self._registry)
        self._registry.register(self)

    def serve(self, request: HttpRequest) -> Answer:
        """Answer a request for the metrics in the format it prefers."""
        encode, content_type = choose_encoder(request.headers.get("accept", ""))
        text = encode(self._registry)
        self._on_scrape()
        return 200, content_type, text

    def describe(self) -> Iterable[Metric]:
        """Describe nothing at registration: that would read all counters just to find clashes."""
        return ()

    def collect(self) -> Iterator[Metric]:
        """Read everything once and yield the families of the catalog, in its order."""
        values: dict[str, _Values] = {name: {} for name in CATALOG}
        images = list(self._sources.store)
        sums = {image: sum_accounts(image) for image in images}
        self._read_backend(values)
        for image in images:
            _read_image(values, image)
            left_bytes = self._sources.warming.left_bytes(image)
            values["cowshed_warming_bytes"][_labels(image)] = left_bytes
            waits = self._sources.source_wait_seconds(image)
            values["cowshed_source_wait_seconds"][_labels(image)] = waits
            values["cowshed_image_unserved"][_labels(image)] = 0
            _read_sums(values, image, sums[image])
        for domain_and_name in self._sources.unserved():
            values["cowshed_image_unserved"][domain_and_name] = 1
        if self._sources.sampler is not None:
            _read_use(values, self._sources.sampler, images)
        self._read_users(values, images)
        self._read_nbd(values, images)
        self._read_guests(values, images)
        latencies = {
            kind: [of_image.latencies[kind] for of_image in sums.values()] for kind in LatencyKind
        }
        for metric in CATALOG.values():
            if metric.kind == "histogram":
                yield _histogram(metric.name, metric.meaning, latencies)
            elif values[metric.name] or not metric.of_guest:
                yield _family(metric.name, values[metric.name])

    def _read_backend(self, values: dict[str, _Values]) -> None:
        store, service = self._sources.store, self._sources.counters
        counters = store.counters()
        drain, history = service.drain, self._sources.history
        values["cowshed_build_info"][(VERSION,)] = 1
        for name, value in (
            ("start_timestamp_seconds", self._started_at),
            ("capacity_bytes", store.capacity_bytes),
            ("reserved_bytes", counters.reserved_extents * store.extent_bytes),
            ("standby_bytes", counters.standby_extents * store.extent_bytes),
            ("standby_limit_bytes", counters.standby_limit * store.extent_bytes),
            (
                "pinnable_bytes",
                max(0, self._sources.evictor.max_pinned_extents) * store.extent_bytes,
            ),
            ("waiting_loaders", counters.nr_waiting_loaders),
            ("queued_loads", counters.queued_loads),
            ("audit_timestamp_seconds", service.audited_at),
            ("drain_progress_ratio", drain.progress_ratio),
            ("drain_blockers", drain.nr_blockers),
            ("adoption_seconds", history.adoption_seconds),
            ("not_held_groups", history.nr_not_held),
        ):
            values[f"cowshed_{name}"][()] = value
        for by, counts in (
            ("connections_dropped_total", service.dropped),
            ("restarts_total", history.restarts),
            ("log_lines_lost_total", self._sources.log_counts.read()),
            ("keeper", {kind: int(kind == history.keeper) for kind in KEEPERS}),
            ("audit_mismatches", service.mismatches),
            ("drain_state", {state: int(state == drain.state) for state in DRAIN_STATES}),
        ):
            values[f"cowshed_{by}"].update({(what,): nr for what, nr in counts.items()})

    def _read_nbd(self, values: dict[str, _Values], images: list[Image]) -> None:
        counters = {image: NbdCounters() for image in images}
        for image, of_some in self._sources.nbd():
            counters[image] += of_some
        for image, of_all in counters.items():
            labels = _labels(image)
            for name, value in (
                ("connections_total", of_all.connections),
                ("errors_total", of_all.errors),
                ("hits_total", of_all.hits),
                ("misses_total", of_all.misses),
                ("waiting_requests", of_all.parked),
            ):
                values[f"cowshed_nbd_{name}"][labels] = value
            by_command = (
                of_all.reads,
                of_all.writes,
                of_all.trims,
                of_all.zeroes,
                of_all.flushes,
                of_all.caches,
                of_all.block_statuses,
            )
            for command, value in zip(NBD_COMMANDS, by_command, strict=True):
                values["cowshed_nbd_requests_total"][*labels, command] = value
            for direction, value in (("read", of_all.read_bytes), ("write", of_all.write_bytes)):
                values["cowshed_nbd_bytes_total"][*labels, direction] = value

    def _read_users(self, values: dict[str, _Values], images: list[Image]) -> None:
        """Count each image's guests, by transport and state."""
        guests, mappings = values["cowshed_guests"], values["cowshed_mappings"]
        states: dict[int, AccountState] = {}
        for image in images:
            labels = _labels(image)
            guests.update({(*labels, *how): 0 for how in itertools.product(TRANSPORTS, STATES)})
            mappings.update({(*labels, transport): 0 for transport in MAPPING_TRANSPORTS})
            states.update(read_states(image))
        for guest in self._sources.guests:
            theirs = [(each, states.get(each.account_no)) for each in list(guest.mappings)]
            known = [(each, state) for each, state in theirs if state is not None]
            if not known:
                continue  # it attached or left since
            labels = _labels(guest.image)
            for mapping, _ in known:
                mappings[*labels, mapping.transport] += 1
            joint = joint_state([state for _, state in known])
            word = STATE_WORDS[joint]
            if joint is AccountState.RUNNING and guest.is_parked:
                word = "parked"
            guests[*labels, known[0][0].transport, word] += 1
        for overlay in self._sources.overlays:
            is_frozen = states.get(overlay.account_no) is AccountState.FROZEN
            state = STATE_WORDS[AccountState.FROZEN] if is_frozen else overlay.state
            guests[*_labels(overlay.image), overlay.transport, state] += 1

    def _read_guests(self, values: dict[str, _Values], images: list[Image]) -> None:
        """Read the first max_guests guests, in order of attaching."""
        most = self._sources.max_guests
        attached = list(self._sources.guests) if most else []
        values["cowshed_guest_metrics_left_out"][()] = max(0, len(attached) - most)
        if not attached:
            return
        statuses = {no: status for image in images for no, status in read_accounts(image).items()}
        for guest in attached[:most]:
            status = guest.pick(statuses)
            if status is None:
                continue  # it left since
            counters = status.counters
            for name, value in (
                ("requests_total", counters.hits + counters.misses),
                ("hits_total", counters.hits),
                ("private_bytes", status.private_pages * PAGE_BYTES),
                ("quota_bytes", _quota_bytes(guest)),
                ("granted_bytes", guest.granted_bytes(status)),
                ("cow_pages_total", counters.charged_pages),
                ("quota_stops_total", counters.quota_stops),
                ("stopped", int(status.stopped_since_ns != 0)),
            ):
                labels = (_text(guest.name), *_labels(guest.image))
                values[f"cowshed_guest_{name}"][labels] = value


def _read_image(values: dict[str, _Values], image: Image) -> None:
    labels = _labels(image)
    source = _text(os.fsencode(image.source.path).decode(errors="replace"))
    statistics, counters = image.statistics(), image.counters()
    values["cowshed_image_info"][*labels, source, image.digest] = 1
    for metric, value in (
        ("image_size_bytes", image.size_bytes),
        ("resident_bytes", statistics.resident_bytes),
        ("granted_bytes", statistics.granted_bytes),
        ("saved_bytes", statistics.saved_bytes),
        ("pinned_bytes", statistics.pinned_bytes),
        ("working_set_bytes", statistics.touched_bytes),
        ("working_set_resident_bytes", statistics.touched_resident_bytes),
        ("source_changed", int(image.source_change is not None)),
        ("load_retries_total", counters.load_retries),
        ("strays_total", counters.strays),
        ("reloads_total", counters.reloads),
        ("guest_attaches_total", counters.attaches),
        ("collapse_failures_total", counters.collapse_failures),
    ):
        values[f"cowshed_{metric}"][labels] = value
    for metric, what, value in (
        ("loads_total", "demand", counters.demand_loads),
        ("loads_total", "prefetch", counters.prefetch_loads),
        ("load_bytes_total", "file", counters.load_bytes),
        ("load_errors_total", "file", counters.load_errors),
        ("evictions_total", "pressure", counters.evictions_pressure),
        ("evictions_total", "request", counters.evictions_request),
        ("standby_unmaps_total", "victim", counters.standby_unmaps),
        ("standby_unmaps_total", "sample", counters.standby_samples),
        ("soft_hits_total", "victim", counters.soft_hits - counters.sample_hits),
        ("soft_hits_total", "sample", counters.sample_hits),
        *(
            ("extents", refs, nr)
            for refs, nr in zip(REFS, statistics.resident_by_refs, strict=True)
        ),
    ):
        values[f"cowshed_{metric}"][*labels, what] = value


def _read_use(values: dict[str, _Values], sampler: Sampler, images: list[Image]) -> None:
    scopes = [("", (), sampler.use()), *(("image_", _labels(i), sampler.use(i)) for i in images)]
    for prefix, labels, uses in scopes:
        for use in uses:
            for factor, hit_rate in (use.hit_rate_at or {}).items():
                at_capacity = values["cowshed_hit_ratio_at_capacity"]
                at_capacity[f"{use.window_seconds}s", f"{factor:g}"] = hit_rate
            for metric, estimate in (
                ("hit_ratio", use.hit_rate),
                ("estimated_working_set_bytes", use.working_set_bytes),
            ):
                if estimate is None:
                    continue
                for bound in BOUNDS:
                    key = *labels, f"{use.window_seconds}s", bound
                    values[f"cowshed_{prefix}{metric}"][key] = getattr(estimate, bound)


def _read_sums(values: dict[str, _Values], image: Image, sums: AccountSums) -> None:
    labels = _labels(image)
    counters = sums.counters
    for metric, value in (
        ("private_bytes", sums.private_pages * PAGE_BYTES),
        ("requests_total", counters.hits + counters.misses),
        ("hits_total", counters.hits),
        ("cow_pages_total", sums.cow_pages),
        ("discarded_pages_total", counters.discarded_pages),
        ("poisoned_pages_total", counters.poisoned_pages),
        ("repaired_pages_total", counters.repaired_pages),
        ("mapped_pages_total", counters.mapped_pages),
        ("quota_stops_total", counters.quota_stops),
        ("quota_stopped_seconds_total", counters.stopped_ns / 1e9),
        ("retries_total", counters.retries),
        ("open_regions", sums.open_regions),
        ("lost_regions", sums.lost_regions),
        ("open_region_reserved_bytes", sums.reserved_pages * PAGE_BYTES),
        ("region_opens_total", sums.opens),
    ):
        values[f"cowshed_{metric}"][labels] = value
    for reason, nr in sums.closes.items():
        values["cowshed_region_closes_total"][*labels, reason.name.lower()] = nr
    faults = values["cowshed_faults_total"]
    for kind, outcome, nr in (
        ("missing", "hit", counters.missing_hit),
        ("missing", "loaded", counters.missing_loaded),
        ("missing", "failed", counters.missing_failed),
        ("minor", "hit", counters.minor_hit),
        ("minor", "loaded", counters.minor_loaded),
        ("minor", "failed", counters.minor_failed),
        ("write", "copied", counters.write_copied),
        ("write", "refused", counters.write_refused),
    ):
        faults[*labels, kind, outcome] = nr


def _family(name: str, values: _Values) -> Metric:
    metric = CATALOG[name]
    if metric.kind == "info":
        info = InfoMetricFamily(name.removesuffix("_info"), metric.meaning, labels=())
        for labels in values:
            info.add_metric((), dict(zip(metric.labels, labels, strict=True)))
        return info
    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(name, metric.meaning, labels=metric.labels)
    for labels, value in values.items():
        family.add_metric(labels, value)
    return family


def _histogram(
    name: str, meaning: str, latencies: Mapping[LatencyKind, Iterable[Latency]]
) -> Metric:
    family = HistogramMetricFamily(name, meaning, labels=("kind",))
    for kind, several in latencies.items():
        total = sum(several, Latency([0] * lib.LATENCY_BUCKETS, 0))
        buckets = [
            (repr(bound_ns / 1e9), float(sum(total.counts[: no + 1])))
            for bound_ns, no in zip(_BOUNDS_NS, _BUCKETS, strict=True)
        ]
        family.add_metric(
            (kind.name.lower(),), [*buckets, ("+Inf", float(total.count))], total.sum_ns / 1e9
        )
    return family


def _quota_bytes(guest: Guest) -> float:
    return float("inf") if guest.quota_bytes is None else guest.quota_bytes


def _labels(image: Image) -> tuple[str, str]:
    return image.domain, _text(image.name)


def _text(value: str) -> str:
    """Return a label's value, with bytes that are not UTF-8 (of a path, an argument) escaped."""
    return value.encode("utf-8", "backslashreplace").decode()
