# SPDX-License-Identifier: Apache-2.0
# Written by tools/core_stub.py from the headers' cdef sections; `make stubs` writes it anew.
# Each call of lib releases the GIL. Functions return >= 0 or -errno unless their header says
# otherwise; cache/calls.py turns that into exceptions.
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, Literal, Self, TypeVar, overload

from _typeshed import ReadableBuffer

_T = TypeVar("_T")
_C = TypeVar("_C", bound=CData)

class CData:
    def __enter__(self) -> Self: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
        /,
    ) -> None: ...

class Pointer(CData, Generic[_T]):
    @overload
    def __getitem__(self, index: int, /) -> _T: ...
    @overload
    def __getitem__(self, index: slice, /) -> Array[_T]: ...
    def __setitem__(self, index: int | slice, value: Any, /) -> None: ...
    def __add__(self, nr: int, /) -> Pointer[_T]: ...

class Array(Pointer[_T]):
    def __len__(self) -> int: ...
    def __iter__(self) -> Iterator[_T]: ...

class StructStore(CData): ...
class StructOrigin(CData): ...
class StructImage(CData): ...

class StructImageShape(CData):
    image_no: int
    extent_pages: int
    size_bytes: int
    map_bytes: int
    nr_pages: int
    nr_extents: int

class StructImageCounters(CData):
    loads: int
    load_bytes: int
    load_errors: int
    load_retries: int
    demand_loads: int
    prefetch_loads: int
    evictions: int
    evictions_pressure: int
    evictions_request: int
    soft_hits: int
    standby_unmaps: int
    standby_samples: int
    sample_hits: int
    strays: int
    nr_touched: int
    reloads: int
    attaches: int
    collapse_failures: int
    lent_regions: int

class StructImageStatistics(CData):
    resident_pages: int
    granted_pages: int
    saved_pages: int
    pinned_pages: int
    touched_pages: int
    touched_resident_pages: int
    resident_by_refs: Array[int]

class StructImageSource(CData):
    source_fd: int
    direct_fd: int
    origin: StructOrigin

class StructInheritedImage(CData):
    frames_fd: int
    guest_fd: int
    arrays_fd: int

class StructFetch(CData): ...

class StructFetchRequest(CData):
    image_no: int
    is_prefetch: int
    offset_bytes: int
    length_bytes: int

class StructOriginCounters(CData):
    queued_demand: int
    queued_prefetch: int
    fetches: int

class StructStoreCounters(CData):
    capacity_extents: int
    reserved_extents: int
    loading_extents: int
    standby_extents: int
    standby_limit: int
    standby_pages: int
    standby_moving: int
    room_extents: int
    pinned_extents: int
    read_ns: int
    read_extents: int
    fill_cpu_ns: int
    restore_cpu_ns: int
    nr_waiting_loaders: int
    queued_loads: int

class StructSampleEnd(CData):
    image_no: int
    extent: int
    unmapped_ns: int
    ended_ns: int
    touched: int

class StructQuota(CData): ...

class StructQuotaStatus(CData):
    quota_pages: int
    used_pages: int
    policy: int
    nr_accounts: int

class StructAccountRegion(CData):
    address: int
    first_page: int
    nr_pages: int

class StructRegionTable(CData):
    nr: int
    regions: Array[StructAccountRegion]

class StructAccount(CData): ...

class StructAccountCounters(CData):
    faults_missing: int
    faults_minor: int
    faults_write: int
    misses: int
    missing_hit: int
    missing_loaded: int
    missing_failed: int
    minor_hit: int
    minor_loaded: int
    minor_failed: int
    write_copied: int
    write_refused: int
    charged_pages: int
    uncharged_pages: int
    discarded_pages: int
    mapped_pages: int
    poisoned_pages: int
    repaired_pages: int
    quota_stops: int
    retries: int
    stopped_ns: int

class StructAccountStatus(CData):
    granted_extents: int
    private_pages: int
    quota_pages: int
    stopped_since_ns: int
    policy: int
    broken: int
    frozen: int
    spare: int
    preloaded_pages: int
    open_regions: int
    lost_regions: int
    reserved_pages: int
    account_no: int
    counters: StructAccountCounters

class StructAccountSums(CData):
    private_pages: int
    reserved_pages: int
    open_regions: int
    lost_regions: int
    opens: int
    closes: Array[int]
    cow_pages: int
    closed_cow_pages: int
    counters: StructAccountCounters
    latency_sum_ns: Array[int]
    latency: Array[Array[int]]

class StructOverlay(CData): ...

class StructOverlaySums(CData):
    counted_pages: int
    private_pages: int
    used_pages: int
    in_hand_pages: int

class StructWindowStream(CData):
    next_extent: int
    last_extent: int
    nr_extents: int
    used: int

class StructWindowState(CData):
    streams: Array[StructWindowStream]
    stamp: int
    write_next_page: int
    write_pages: int

class StructWindowPlan(CData):
    first_page: int
    nr_pages: int
    ahead_extent: int
    nr_ahead: int
    prefetch_extent: int
    nr_prefetch: int

class StructWindowShape(CData):
    nr_pages: int
    nr_extents: int
    extent_pages: int
    fixed_pages: int

class StructGuest(CData): ...

class StructFaultOptions(CData):
    window_pages: int
    write_window_pages: int
    spin_ns: int

class StructPopulateRegion(CData):
    address: int
    first_page: int
    nr_pages: int
    page_bytes: int

class StructPopulateOptions(CData):
    regions: StructPopulateRegion
    nr_regions: int
    zero_discarded: int
    order: Pointer[int]
    nr_order: int
    allowance: StructZerocopyAllowance
    max_pinned_extents: int
    zerocopy_resident: int

class StructZerocopyAllowance(CData):
    left_extents: int

class StructElf(CData):
    bits: int
    machine: int
    is_big_endian: bool
    is_loader: bool
    needs_first: bool
    linker: Array[bytes]
    soname: Array[bytes]

class StructGuestImage(CData):
    size_bytes: int
    map_bytes: int
    extent_bytes: int
    uffd_features: int
    memfd: int
    uffd_device: int
    digest: Array[bytes]
    generation: Array[bytes]
    guest: Array[bytes]

class StructHandshake(CData): ...

class StructRegion(CData):
    address: CData
    map_bytes: int
    uffd: int
    pagemap_fd: int
    mem_fd: int
    read_only: int
    epoch: int

class StructFollowStatus(CData):
    state: int
    nr_moves: int
    extent_bytes: int
    uri: Array[bytes]
    generation: Array[bytes]
    token: Array[bytes]
    why: Array[bytes]

class StructFollower(CData): ...
class StructNbdServer(CData): ...
class StructNbdExport(CData): ...

class StructNbdNegotiated(CData):
    structured: int
    extended: int
    read_only: int
    max_payload_bytes: int
    trim_zeroes: int
    context_ids: Array[int]

class StructNbdCounters(CData):
    connections: int
    reads: int
    writes: int
    trims: int
    zeroes: int
    flushes: int
    caches: int
    block_statuses: int
    errors: int
    read_bytes: int
    write_bytes: int
    hits: int
    misses: int
    parked: int

class StructNbdEnded(CData):
    connection_no: int
    err: int
    reason: int

class _Lib:
    ARRAYS_VERSION: int
    HUGE_EXTENT_PAGES: int
    REFS_BUCKETS: int
    OPEN_PAGES: int
    STANDBY_AGE_MAX: int
    QUOTA_LAYOUT: int
    REGIONS_MAX: int
    CLOSE_NR: int
    LATENCY_BUCKETS: int
    LEDGER_LAYOUT: int
    OPEN_REGIONS_LAYOUT: int
    OPEN_REGIONS_MAX: int
    PAGE_RUN_BYTES: int
    OVERLAY_IDENTITY_BYTES: int
    WINDOW_STREAMS: int
    WINDOW_GROWTH: int
    WINDOW_NOW_PAGES: int
    WINDOW_MAX_PAGES: int
    WINDOW_PREFETCH_MAX_PAGES: int
    WINDOW_WRITE_MAX_PAGES: int
    WINDOW_WRITE_DENSE_PAGES: int
    POINT_LOAD_READ: int
    POINT_LOAD_SHORT: int
    POINT_LOAD_FILL: int
    POINT_LOAD_PUBLISH: int
    POINT_LOAD_ANSWER: int
    POINT_FETCH_TAKEN: int
    POINT_FETCH_FILL: int
    POINT_EVICT_PUNCH: int
    POINT_PUNCHED: int
    POINT_EVICT_REVOKE: int
    POINT_STANDBY_FILL: int
    POINT_STANDBY_READ: int
    POINT_COLLAPSE: int
    POINT_COLLAPSED: int
    POINT_DISSOLVE: int
    POINT_OPEN_CHARGED: int
    POINT_OPEN_BARE: int
    POINT_OPEN_DONE: int
    POINT_CLOSE_GUARDED: int
    POINT_CLOSE_PROTECTED: int
    POINT_FAULT_READ: int
    POINT_FAULT_HELD: int
    POINT_FRAMES_READ: int
    POINT_WRITE_TAKEN: int
    POINT_WRITE_CHARGED: int
    POINT_SETTLE_PROTECTED: int
    POINT_TRACK_CLEARED: int
    POINT_PRELOAD_PUSH: int
    POINT_OVERLAY_OPEN: int
    POINT_OVERLAY_TAKEN: int
    POINT_OVERLAY_WRITTEN: int
    POINT_OVERLAY_ZEROED: int
    POINT_OVERLAY_TRIMMED: int
    POINT_OVERLAY_FLUSH: int
    POINT_OVERLAY_SYNCED: int
    POINT_OVERLAY_MAPPED: int
    POINT_WAKE_EVICTOR: int
    POINT_WAKE_SERVICE: int
    POINT_WAKE_GUEST: int
    POINT_WAKE_NBD: int
    POINT_WAKE_NBD_ENDED: int
    POINT_GUEST_THREAD: int
    POINT_NR: int
    POINT_OFF: int
    POINT_STOP: int
    POINT_FAIL: int
    POINT_KILL: int
    POINT_DELAY: int
    EXTENT_ABSENT: int
    EXTENT_LOADING: int
    EXTENT_RESIDENT: int
    EXTENT_EVICTING: int
    EVICT_PRESSURE: int
    EVICT_REQUEST: int
    EVICT_STANDBY: int
    EVICT_SAMPLE: int
    EVENT_LOADED: int
    EVENT_SOFT_HIT: int
    EVENT_DROPPED: int
    QUOTA_STOP: int
    QUOTA_KILL: int
    QUOTA_ALLOW: int
    CLOSE_QUOTA: int
    CLOSE_PRESSURE: int
    CLOSE_FREEZE: int
    CLOSE_REQUEST: int
    CLOSE_SAMPLE: int
    CLOSE_GUEST: int
    LATENCY_HIT: int
    LATENCY_MISS: int
    LATENCY_WRITE: int
    LATENCY_NR: int
    ACCOUNT_RUNNING: int
    ACCOUNT_STOPPED: int
    ACCOUNT_FROZEN: int
    ACCOUNT_BROKEN: int
    PAGE_LOOK_ABSENT: int
    PAGE_LOOK_SHARED: int
    PAGE_LOOK_OPEN: int
    PAGE_LOOK_PRIVATE: int
    REGION_STAGE_NONE: int
    REGION_STAGE_COPY: int
    REGION_STAGE_MAP: int
    REGION_STAGE_UFFD: int
    REGION_STAGE_API: int
    REGION_STAGE_REGISTER: int
    REGION_STAGE_PROC: int
    FOLLOW_LISTENS: int
    FOLLOW_MOVES: int
    FOLLOW_BYTES: int
    FOLLOW_ENDED: int
    NBD_CONTEXT_ALLOCATION: int
    NBD_CONTEXT_RESIDENT: int
    NBD_CONTEXT_PRIVATE: int
    NBD_CONTEXTS: int
    NBD_LATENCY_HIT: int
    NBD_LATENCY_MISS: int
    NBD_LATENCY_WRITE: int
    NBD_LATENCY_FLUSH: int
    NBD_LATENCY_NR: int
    NBD_END_DISC: int
    NBD_END_EOF: int
    NBD_END_DETACHED: int
    NBD_END_PROTOCOL: int
    NBD_END_IO: int
    NBD_END_MEMORY: int
    def point_arm(self, point: int, action: int, arg: int, nr_times: int, /) -> int: ...
    def point_arm_some(
        self, point: int, action: int, arg: int, nr_times: int, permille: int, seed: int, /
    ) -> int: ...
    def point_wait(self, point: int, nr_threads: int, timeout_ms: int, /) -> int: ...
    def point_release(self, point: int, /) -> int: ...
    def shared_count_add(self, words: Pointer[int], no: int, nr: int, /) -> None: ...
    def frames_probe_huge(self) -> int: ...
    def image_open(
        self,
        store: StructStore | Array[StructStore],
        source: StructImageSource | Array[StructImageSource],
        size_bytes: int,
        extent_pages: int,
        image_out: Pointer[StructImage],
        /,
    ) -> int: ...
    def image_adopt(
        self,
        store: StructStore | Array[StructStore],
        source: StructImageSource | Array[StructImageSource],
        size_bytes: int,
        extent_pages: int,
        inherited: StructInheritedImage | Array[StructInheritedImage],
        image_out: Pointer[StructImage],
        /,
    ) -> int: ...
    def image_note_reloads(self, image: StructImage | Array[StructImage], nr: int, /) -> None: ...
    def image_note_attach(self, image: StructImage | Array[StructImage], /) -> None: ...
    def image_close(self, image: StructImage | Array[StructImage], /) -> int: ...
    def image_shape(
        self,
        image: StructImage | Array[StructImage],
        shape_out: StructImageShape | Array[StructImageShape],
        /,
    ) -> None: ...
    def image_count(
        self,
        image: StructImage | Array[StructImage],
        counters_out: StructImageCounters | Array[StructImageCounters],
        /,
    ) -> None: ...
    def image_frames_fd(self, image: StructImage | Array[StructImage], /) -> int: ...
    def image_guest_fd(self, image: StructImage | Array[StructImage], /) -> int: ...
    def image_arrays_fd(self, image: StructImage | Array[StructImage], /) -> int: ...
    def image_read_wait_ns(self, image: StructImage | Array[StructImage], /) -> int: ...
    def image_resident_pages(self, image: StructImage | Array[StructImage], /) -> int: ...
    def image_states(
        self,
        image: StructImage | Array[StructImage],
        first: int,
        nr: int,
        states_out: bytes | Pointer[bytes] | Pointer[int],
        /,
    ) -> int: ...
    def image_refs(
        self,
        image: StructImage | Array[StructImage],
        first: int,
        nr: int,
        refs_out: Pointer[int],
        /,
    ) -> int: ...
    def image_pins(
        self,
        image: StructImage | Array[StructImage],
        first: int,
        nr: int,
        pins_out: Pointer[int],
        /,
    ) -> int: ...
    def image_holds(
        self,
        image: StructImage | Array[StructImage],
        first: int,
        nr: int,
        holds_out: Pointer[int],
        /,
    ) -> int: ...
    def image_measure(
        self,
        image: StructImage | Array[StructImage],
        statistics_out: StructImageStatistics | Array[StructImageStatistics],
        /,
    ) -> None: ...
    def image_touches(
        self,
        image: StructImage | Array[StructImage],
        first: int,
        nr: int,
        touches_out: bytes | Pointer[bytes] | Pointer[int],
        /,
    ) -> int: ...
    def image_take_touches(
        self, image: StructImage | Array[StructImage], extent: int, /
    ) -> int: ...
    def image_extent_refs(self, image: StructImage | Array[StructImage], extent: int, /) -> int: ...
    def image_extent_idle(self, image: StructImage | Array[StructImage], extent: int, /) -> int: ...
    def image_walk_resident(
        self,
        image: StructImage | Array[StructImage],
        at: Pointer[int],
        stride: int,
        nr_steps: int,
        /,
    ) -> int: ...
    def image_generation(self, image: StructImage | Array[StructImage], /) -> int: ...
    def image_first_touches(
        self, image: StructImage | Array[StructImage], extents_out: Pointer[int], nr_max: int, /
    ) -> int: ...
    def image_collapse(
        self, image: StructImage | Array[StructImage], region_no: int, max_pinned: int, /
    ) -> int: ...
    def image_is_collapsed(
        self, image: StructImage | Array[StructImage], region_no: int, /
    ) -> int: ...
    def image_pinned_regions(
        self, image: StructImage | Array[StructImage], regions_out: Pointer[int], nr_max: int, /
    ) -> int: ...
    def origin_open(
        self, store: StructStore | Array[StructStore], origin_out: Pointer[StructOrigin], /
    ) -> int: ...
    def origin_close(self, origin: StructOrigin | Array[StructOrigin], /) -> int: ...
    def origin_stop(self, origin: StructOrigin | Array[StructOrigin], /) -> None: ...
    def origin_count(
        self,
        origin: StructOrigin | Array[StructOrigin],
        counters_out: StructOriginCounters | Array[StructOriginCounters],
        /,
    ) -> None: ...
    def store_take_fetch(
        self,
        origin: StructOrigin | Array[StructOrigin],
        demand_only: int,
        timeout_ms: int,
        fetch_out: Pointer[StructFetch],
        request_out: StructFetchRequest | Array[StructFetchRequest],
        /,
    ) -> int: ...
    def store_fill(
        self, fetch: StructFetch | Array[StructFetch], bytes: CData | bytes, length_bytes: int, /
    ) -> int: ...
    def store_fetch_end(self, fetch: StructFetch | Array[StructFetch], err: int, /) -> None: ...
    def store_set_standby(
        self, store: StructStore | Array[StructStore], limit_extents: int, low_free: int, /
    ) -> int: ...
    def store_drop_standby(
        self, image: StructImage | Array[StructImage], first: int, nr: int, /
    ) -> int: ...
    def store_in_standby(
        self,
        image: StructImage | Array[StructImage],
        flags_out: bytes | Pointer[bytes] | Pointer[int],
        /,
    ) -> None: ...
    def store_init(
        self,
        capacity_extents: int,
        extent_pages: int,
        nr_loaders: int,
        low_free: int,
        standby_max: int,
        store_out: Pointer[StructStore],
        /,
    ) -> int: ...
    def store_cancel_loads(self, store: StructStore | Array[StructStore], /) -> None: ...
    def store_stop(self, store: StructStore | Array[StructStore], timeout_ms: int, /) -> int: ...
    def store_deinit(self, store: StructStore | Array[StructStore], /) -> int: ...
    def store_count(
        self,
        store: StructStore | Array[StructStore],
        counters_out: StructStoreCounters | Array[StructStoreCounters],
        /,
    ) -> None: ...
    def store_pressure_fd(self, store: StructStore | Array[StructStore], /) -> int: ...
    def store_notice_fd(self, store: StructStore | Array[StructStore], /) -> int: ...
    def store_wanted_fd(self, store: StructStore | Array[StructStore], /) -> int: ...
    def store_standby_fd(self, store: StructStore | Array[StructStore], /) -> int: ...
    def store_take_events(
        self, store: StructStore | Array[StructStore], events_out: Pointer[int], nr_max: int, /
    ) -> int: ...
    def store_take_sample_ends(
        self,
        store: StructStore | Array[StructStore],
        ends_out: StructSampleEnd | Array[StructSampleEnd],
        nr_max: int,
        /,
    ) -> int: ...
    def store_prefetch(
        self, image: StructImage | Array[StructImage], first: int, nr: int, /
    ) -> int: ...
    def store_restore(self, image: StructImage | Array[StructImage], extent: int, /) -> int: ...
    def store_wait_loaded(
        self, image: StructImage | Array[StructImage], first: int, nr: int, timeout_ms: int, /
    ) -> int: ...
    def store_pin(
        self, image: StructImage | Array[StructImage], first: int, nr: int, max_pinned: int, /
    ) -> int: ...
    def store_unpin(
        self, image: StructImage | Array[StructImage], first: int, nr: int, /
    ) -> int: ...
    def store_lend(
        self, image: StructImage | Array[StructImage], first: int, nr: int, max_pinned: int, /
    ) -> int: ...
    def store_end_loan(
        self, image: StructImage | Array[StructImage], first: int, nr: int, /
    ) -> int: ...
    def store_scrub(self, image: StructImage | Array[StructImage], /) -> int: ...
    def store_check(self, store: StructStore | Array[StructStore], /) -> Pointer[bytes]: ...
    def quota_open(
        self, quota_pages: int, policy: int, quota_out: Pointer[StructQuota], /
    ) -> int: ...
    def quota_adopt(self, fd: int, quota_out: Pointer[StructQuota], /) -> int: ...
    def quota_close(self, quota: StructQuota | Array[StructQuota], /) -> None: ...
    def quota_set(
        self, quota: StructQuota | Array[StructQuota], quota_pages: int, policy: int, /
    ) -> int: ...
    def quota_read(
        self,
        quota: StructQuota | Array[StructQuota],
        status_out: StructQuotaStatus | Array[StructQuotaStatus],
        /,
    ) -> None: ...
    def quota_fd(self, quota: StructQuota | Array[StructQuota], /) -> int: ...
    def regions_make(
        self,
        regions: StructAccountRegion | Array[StructAccountRegion],
        nr: int,
        nr_image_pages: int,
        table_out: StructRegionTable | Array[StructRegionTable],
        /,
    ) -> int: ...
    def regions_move(
        self,
        table: StructRegionTable | Array[StructRegionTable],
        from_: int,
        to: int,
        length: int,
        /,
    ) -> int: ...
    def account_open(
        self,
        image: StructImage | Array[StructImage],
        quota: StructQuota | Array[StructQuota],
        account_out: Pointer[StructAccount],
        /,
    ) -> int: ...
    def account_adopt(
        self,
        image: StructImage | Array[StructImage],
        quota: StructQuota | Array[StructQuota],
        ledger_fd: int,
        account_out: Pointer[StructAccount],
        /,
    ) -> int: ...
    def account_fd(self, account: StructAccount | Array[StructAccount], /) -> int: ...
    def account_number(self, account: StructAccount | Array[StructAccount], /) -> int: ...
    def account_close(self, account: StructAccount | Array[StructAccount], /) -> int: ...
    def account_place(
        self,
        account: StructAccount | Array[StructAccount],
        uffd: int,
        pagemap_fd: int,
        regions: StructAccountRegion | Array[StructAccountRegion],
        nr_regions: int,
        /,
    ) -> int: ...
    def account_regions(
        self,
        account: StructAccount | Array[StructAccount],
        table_out: StructRegionTable | Array[StructRegionTable],
        /,
    ) -> None: ...
    def account_read(
        self,
        account: StructAccount | Array[StructAccount],
        status_out: StructAccountStatus | Array[StructAccountStatus],
        /,
    ) -> None: ...
    def account_latency(
        self,
        account: StructAccount | Array[StructAccount],
        kind: int,
        counts_out: Pointer[int],
        sum_ns_out: Pointer[int],
        /,
    ) -> int: ...
    def bucket_bound_ns(self, bucket: int, /) -> int: ...
    def account_sum(
        self,
        image: StructImage | Array[StructImage],
        sums_out: StructAccountSums | Array[StructAccountSums],
        /,
    ) -> None: ...
    def account_read_all(
        self,
        image: StructImage | Array[StructImage],
        statuses_out: StructAccountStatus | Array[StructAccountStatus],
        nr_max: int,
        /,
    ) -> int: ...
    def account_states(
        self,
        image: StructImage | Array[StructImage],
        account_nos_out: Pointer[int],
        states_out: bytes | Pointer[bytes] | Pointer[int],
        nr_max: int,
        /,
    ) -> int: ...
    def account_quota_pages(
        self, account: StructAccount | Array[StructAccount], used_out: Pointer[int], /
    ) -> int: ...
    def account_add_grants(
        self,
        account: StructAccount | Array[StructAccount],
        first: int,
        nr: int,
        refs_out: Pointer[int],
        /,
    ) -> int: ...
    def account_bitmap(
        self,
        account: StructAccount | Array[StructAccount],
        unsettled: int,
        words_out: Pointer[int],
        nr_words: int,
        /,
    ) -> int: ...
    def account_check(self, account: StructAccount | Array[StructAccount], /) -> Pointer[bytes]: ...
    def account_open_region(
        self,
        account: StructAccount | Array[StructAccount],
        region_no: int,
        nr_spare: int,
        max_pinned: int,
        /,
    ) -> int: ...
    def account_close_region(
        self, account: StructAccount | Array[StructAccount], region_no: int, reason: int, /
    ) -> int: ...
    def account_close_regions(
        self, account: StructAccount | Array[StructAccount], first: int, nr: int, reason: int, /
    ) -> int: ...
    def account_open_bitmap(
        self,
        account: StructAccount | Array[StructAccount],
        words_out: Pointer[int],
        nr_words: int,
        /,
    ) -> int: ...
    def account_reserved_bitmap(
        self,
        account: StructAccount | Array[StructAccount],
        words_out: Pointer[int],
        nr_words: int,
        /,
    ) -> int: ...
    def account_shrink(self, account: StructAccount | Array[StructAccount], /) -> int: ...
    def account_set_read_only(
        self, account: StructAccount | Array[StructAccount], on: int, /
    ) -> int: ...
    def account_finish_opening(self, account: StructAccount | Array[StructAccount], /) -> int: ...
    def account_take_wanted(
        self,
        account: StructAccount | Array[StructAccount],
        regions_out: Pointer[int],
        nr_max: int,
        /,
    ) -> int: ...
    def account_settle(self, account: StructAccount | Array[StructAccount], /) -> int: ...
    def account_adopt_private(self, account: StructAccount | Array[StructAccount], /) -> int: ...
    def account_look(
        self,
        account: StructAccount | Array[StructAccount],
        first: int,
        nr: int,
        looks_out: bytes | Pointer[bytes] | Pointer[int],
        /,
    ) -> int: ...
    def account_find_present(
        self, account: StructAccount | Array[StructAccount], nr_max: int, page_io: Pointer[int], /
    ) -> int: ...
    def account_preload(
        self,
        account: StructAccount | Array[StructAccount],
        source_fd: int,
        words: Pointer[int],
        nr_words: int,
        /,
    ) -> int: ...
    def account_adopt_preloaded(
        self, account: StructAccount | Array[StructAccount], source_fd: int, /
    ) -> int: ...
    def account_copy_preload_fd(self, account: StructAccount | Array[StructAccount], /) -> int: ...
    def account_track(self, account: StructAccount | Array[StructAccount], on: int, /) -> int: ...
    def account_take_dirty(
        self,
        account: StructAccount | Array[StructAccount],
        words_out: Pointer[int],
        nr_words: int,
        /,
    ) -> int: ...
    def account_freeze(self, account: StructAccount | Array[StructAccount], /) -> int: ...
    def account_thaw(self, account: StructAccount | Array[StructAccount], /) -> None: ...
    def page_runs_make(
        self,
        words: Pointer[int],
        nr_words: int,
        from_: int,
        max_pages: int,
        runs_out: bytes | Pointer[bytes] | Pointer[int],
        next_out: Pointer[int],
        /,
    ) -> int: ...
    def page_runs_check(
        self, runs: bytes | Pointer[bytes] | Pointer[int], nr_runs: int, nr_pages: int, /
    ) -> int: ...
    def account_load(
        self,
        account: StructAccount | Array[StructAccount],
        mem_fd: int,
        runs: bytes | Pointer[bytes] | Pointer[int],
        nr_runs: int,
        is_frozen: int,
        to: bytes | Pointer[bytes] | Pointer[int],
        unread: bytes | Pointer[bytes] | Pointer[int],
        /,
    ) -> int: ...
    def evict_extents(
        self,
        image: StructImage | Array[StructImage],
        extents: Pointer[int],
        nr: int,
        reason: int,
        /,
    ) -> int: ...
    def overlay_open(
        self, account: StructAccount | Array[StructAccount], overlay_out: Pointer[StructOverlay], /
    ) -> int: ...
    def overlay_open_files(
        self,
        account: StructAccount | Array[StructAccount],
        data_fd: int,
        map_fd: int,
        identity: bytes | Pointer[bytes] | Pointer[int],
        overlay_out: Pointer[StructOverlay],
        /,
    ) -> int: ...
    def overlay_adopt(
        self,
        account: StructAccount | Array[StructAccount],
        data_fd: int,
        overlay_out: Pointer[StructOverlay],
        /,
    ) -> int: ...
    def overlay_adopt_files(
        self,
        account: StructAccount | Array[StructAccount],
        data_fd: int,
        map_fd: int,
        identity: bytes | Pointer[bytes] | Pointer[int],
        overlay_out: Pointer[StructOverlay],
        /,
    ) -> int: ...
    def overlay_close(self, overlay: StructOverlay | Array[StructOverlay], /) -> int: ...
    def overlay_discard(self, overlay: StructOverlay | Array[StructOverlay], /) -> int: ...
    def overlay_stored(
        self,
        overlay: StructOverlay | Array[StructOverlay],
        words_out: Pointer[int],
        nr_words: int,
        /,
    ) -> int: ...
    def overlay_fd(self, overlay: StructOverlay | Array[StructOverlay], /) -> int: ...
    def overlay_track(self, overlay: StructOverlay | Array[StructOverlay], on: int, /) -> int: ...
    def overlay_take_dirty(
        self,
        overlay: StructOverlay | Array[StructOverlay],
        words_out: Pointer[int],
        nr_words: int,
        /,
    ) -> int: ...
    def overlay_freeze(self, overlay: StructOverlay | Array[StructOverlay], /) -> None: ...
    def overlay_thaw(self, overlay: StructOverlay | Array[StructOverlay], /) -> None: ...
    def overlay_strays(
        self,
        overlay: StructOverlay | Array[StructOverlay],
        words_out: Pointer[int],
        nr_words: int,
        /,
    ) -> int: ...
    def overlay_sums(
        self,
        overlay: StructOverlay | Array[StructOverlay],
        sums_out: StructOverlaySums | Array[StructOverlaySums],
        /,
    ) -> None: ...
    def overlay_load(
        self,
        overlay: StructOverlay | Array[StructOverlay],
        first: int,
        nr: int,
        to: bytes | Pointer[bytes] | Pointer[int],
        /,
    ) -> int: ...
    def overlay_load_runs(
        self,
        overlay: StructOverlay | Array[StructOverlay],
        runs: bytes | Pointer[bytes] | Pointer[int],
        nr_runs: int,
        to: bytes | Pointer[bytes] | Pointer[int],
        /,
    ) -> int: ...
    def overlay_store(
        self,
        overlay: StructOverlay | Array[StructOverlay],
        first: int,
        nr: int,
        bytes: bytes | Pointer[bytes] | Pointer[int],
        /,
    ) -> int: ...
    def overlay_store_runs(
        self,
        overlay: StructOverlay | Array[StructOverlay],
        runs: bytes | Pointer[bytes] | Pointer[int],
        nr_runs: int,
        bytes: bytes | Pointer[bytes] | Pointer[int],
        /,
    ) -> int: ...
    def overlay_drop(
        self, overlay: StructOverlay | Array[StructOverlay], first: int, nr: int, /
    ) -> int: ...
    def overlay_expect(
        self, overlay: StructOverlay | Array[StructOverlay], first: int, nr: int, /
    ) -> int: ...
    def overlay_arrive(
        self,
        overlay: StructOverlay | Array[StructOverlay],
        first: int,
        nr: int,
        bytes: bytes | Pointer[bytes] | Pointer[int],
        /,
    ) -> int: ...
    def overlay_missing(
        self,
        overlay: StructOverlay | Array[StructOverlay],
        words_out: Pointer[int],
        nr_words: int,
        /,
    ) -> int: ...
    def overlay_take_wanted(
        self,
        overlay: StructOverlay | Array[StructOverlay],
        words_out: Pointer[int],
        nr_words: int,
        /,
    ) -> int: ...
    def overlay_missing_fd(self, overlay: StructOverlay | Array[StructOverlay], /) -> int: ...
    def overlay_lose(
        self, overlay: StructOverlay | Array[StructOverlay], first: int, nr: int, /
    ) -> int: ...
    def overlay_nr_lost(self, overlay: StructOverlay | Array[StructOverlay], /) -> int: ...
    def overlay_find(self, overlay: StructOverlay | Array[StructOverlay], /) -> None: ...
    def overlay_flush_now(self, overlay: StructOverlay | Array[StructOverlay], /) -> int: ...
    def window_plan_fault(
        self,
        state: StructWindowState | Array[StructWindowState],
        shape: StructWindowShape | Array[StructWindowShape],
        granted: Pointer[int],
        page: int,
        plan_out: StructWindowPlan | Array[StructWindowPlan],
        /,
    ) -> None: ...
    def window_clip(
        self,
        plan: StructWindowPlan | Array[StructWindowPlan],
        shape: StructWindowShape | Array[StructWindowShape],
        first_page: int,
        nr_pages: int,
        /,
    ) -> None: ...
    def window_plan_write(
        self,
        state: StructWindowState | Array[StructWindowState],
        shape: StructWindowShape | Array[StructWindowShape],
        charged: Pointer[int],
        page: int,
        first_out: Pointer[int],
        nr_out: Pointer[int],
        /,
    ) -> None: ...
    def guest_start(
        self,
        account: StructAccount | Array[StructAccount],
        uffd: int,
        pidfd: int,
        options: StructFaultOptions | Array[StructFaultOptions],
        guest_out: Pointer[StructGuest],
        /,
    ) -> int: ...
    def guest_stop(self, guest: StructGuest | Array[StructGuest], /) -> int: ...
    def guest_poison_absent(self, guest: StructGuest | Array[StructGuest], /) -> int: ...
    def guest_resume(self, guest: StructGuest | Array[StructGuest], /) -> None: ...
    def guest_freeze(self, guest: StructGuest | Array[StructGuest], /) -> int: ...
    def guest_thaw(self, guest: StructGuest | Array[StructGuest], /) -> None: ...
    def guest_uffd_features(self) -> int: ...
    def populate_start(
        self,
        account: StructAccount | Array[StructAccount],
        uffd: int,
        pidfd: int,
        options: StructFaultOptions | Array[StructFaultOptions],
        terms: StructPopulateOptions | Array[StructPopulateOptions],
        guest_out: Pointer[StructGuest],
        /,
    ) -> int: ...
    def zerocopy_fd(self, guest: StructGuest | Array[StructGuest], /) -> int: ...
    def zerocopy_take(
        self,
        guest: StructGuest | Array[StructGuest],
        firsts_out: Pointer[int],
        nrs_out: Pointer[int],
        nr_max: int,
        /,
    ) -> int: ...
    def elf_read(self, fd: int, elf_out: StructElf | Array[StructElf], /) -> int: ...
    def handshake_close(self, handshake: StructHandshake | Array[StructHandshake], /) -> int: ...
    def region_init(
        self,
        r: StructRegion | Array[StructRegion],
        memfd: int,
        map_bytes: int,
        uffd_device: int,
        features: int,
        stage_out: Pointer[int],
        /,
    ) -> int: ...
    def region_deinit(self, r: StructRegion | Array[StructRegion], /) -> int: ...
    def region_forget(self, r: StructRegion | Array[StructRegion], /) -> None: ...
    def region_read(
        self, r: StructRegion | Array[StructRegion], offset: int, to: CData | bytes, length: int, /
    ) -> int: ...
    def region_write(
        self,
        r: StructRegion | Array[StructRegion],
        offset: int,
        from_: CData | bytes,
        length: int,
        /,
    ) -> int: ...
    def region_discard(
        self, r: StructRegion | Array[StructRegion], offset: int, length: int, /
    ) -> int: ...
    def region_replace(
        self, r: StructRegion | Array[StructRegion], with_: StructRegion | Array[StructRegion], /
    ) -> int: ...
    def region_revoke(self, r: StructRegion | Array[StructRegion], /) -> int: ...
    def handshake_new(self, fd: int, limit_ms: int, /) -> StructHandshake: ...
    def handshake_free(self, handshake: StructHandshake | Array[StructHandshake], /) -> None: ...
    def handshake_reply(
        self, handshake: StructHandshake | Array[StructHandshake], nr_bytes_out: Pointer[int], /
    ) -> Pointer[bytes]: ...
    def guest_attach(
        self,
        handshake: StructHandshake | Array[StructHandshake],
        request: bytes | Pointer[bytes],
        more: bytes | Pointer[bytes],
        region: StructRegion | Array[StructRegion],
        image_out: StructGuestImage | Array[StructGuestImage],
        stage_out: Pointer[int],
        /,
    ) -> int: ...
    def region_failure(self, stage: int, /) -> Pointer[bytes]: ...
    def region_cure(self, stage: int, /) -> Pointer[bytes]: ...
    def follower_start(
        self,
        region: StructRegion | Array[StructRegion],
        connection_fd: int,
        follows: bool,
        guest: bytes | Pointer[bytes],
        open_request: bytes | Pointer[bytes],
        digest: bytes | Pointer[bytes],
        follower_out: Pointer[StructFollower],
        /,
    ) -> int: ...
    def follower_stop(self, follower: StructFollower | Array[StructFollower], /) -> None: ...
    def follower_forget(self, follower: StructFollower | Array[StructFollower], /) -> None: ...
    def follower_state(self, follower: StructFollower | Array[StructFollower], /) -> int: ...
    def follower_read(
        self,
        follower: StructFollower | Array[StructFollower],
        status_out: StructFollowStatus | Array[StructFollowStatus],
        /,
    ) -> None: ...
    def follower_begin_view(self, follower: StructFollower | Array[StructFollower], /) -> int: ...
    def follower_end_view(self, follower: StructFollower | Array[StructFollower], /) -> None: ...
    def nbd_server_init(self, nr_workers: int, server_out: Pointer[StructNbdServer], /) -> int: ...
    def nbd_server_drain(self, server: StructNbdServer | Array[StructNbdServer], /) -> None: ...
    def nbd_server_deinit(self, server: StructNbdServer | Array[StructNbdServer], /) -> int: ...
    def nbd_export_init(
        self,
        server: StructNbdServer | Array[StructNbdServer],
        image: StructImage | Array[StructImage],
        overlay: StructOverlay | Array[StructOverlay],
        export_out: Pointer[StructNbdExport],
        /,
    ) -> int: ...
    def nbd_export_deinit(self, export: StructNbdExport | Array[StructNbdExport], /) -> int: ...
    def nbd_export_count(
        self,
        export: StructNbdExport | Array[StructNbdExport],
        counters_out: StructNbdCounters | Array[StructNbdCounters],
        /,
    ) -> None: ...
    def nbd_image_count(
        self,
        server: StructNbdServer | Array[StructNbdServer],
        image: StructImage | Array[StructImage],
        counters_out: StructNbdCounters | Array[StructNbdCounters],
        /,
    ) -> None: ...
    def nbd_export_latency(
        self,
        export: StructNbdExport | Array[StructNbdExport],
        kind: int,
        counts_out: Pointer[int],
        sum_ns_out: Pointer[int],
        /,
    ) -> int: ...
    def nbd_attach(
        self,
        server: StructNbdServer | Array[StructNbdServer],
        export: StructNbdExport | Array[StructNbdExport],
        fd: int,
        negotiated: StructNbdNegotiated | Array[StructNbdNegotiated],
        early: bytes | Pointer[bytes] | Pointer[int],
        nr_early: int,
        connection_no_out: Pointer[int],
        /,
    ) -> int: ...
    def nbd_detach(
        self, server: StructNbdServer | Array[StructNbdServer], connection_no: int, /
    ) -> int: ...
    def nbd_event_fd(self, server: StructNbdServer | Array[StructNbdServer], /) -> int: ...
    def nbd_take_ended(
        self,
        server: StructNbdServer | Array[StructNbdServer],
        ended_out: StructNbdEnded | Array[StructNbdEnded],
        nr_max: int,
        /,
    ) -> int: ...

lib: _Lib

class _Ffi:
    NULL: Any
    @overload
    def new(
        self, cdecl: Literal["struct store **"], init: Any = ..., /
    ) -> Pointer[StructStore]: ...
    @overload
    def new(
        self, cdecl: Literal["struct origin **"], init: Any = ..., /
    ) -> Pointer[StructOrigin]: ...
    @overload
    def new(
        self, cdecl: Literal["struct image **"], init: Any = ..., /
    ) -> Pointer[StructImage]: ...
    @overload
    def new(
        self, cdecl: Literal["struct image_shape **"], init: Any = ..., /
    ) -> Pointer[StructImageShape]: ...
    @overload
    def new(
        self, cdecl: Literal["struct image_shape *"], init: Any = ..., /
    ) -> StructImageShape: ...
    @overload
    def new(
        self, cdecl: Literal["struct image_shape[]"], init: Any = ..., /
    ) -> Array[StructImageShape]: ...
    @overload
    def new(
        self, cdecl: Literal["struct image_counters **"], init: Any = ..., /
    ) -> Pointer[StructImageCounters]: ...
    @overload
    def new(
        self, cdecl: Literal["struct image_counters *"], init: Any = ..., /
    ) -> StructImageCounters: ...
    @overload
    def new(
        self, cdecl: Literal["struct image_counters[]"], init: Any = ..., /
    ) -> Array[StructImageCounters]: ...
    @overload
    def new(
        self, cdecl: Literal["struct image_statistics **"], init: Any = ..., /
    ) -> Pointer[StructImageStatistics]: ...
    @overload
    def new(
        self, cdecl: Literal["struct image_statistics *"], init: Any = ..., /
    ) -> StructImageStatistics: ...
    @overload
    def new(
        self, cdecl: Literal["struct image_statistics[]"], init: Any = ..., /
    ) -> Array[StructImageStatistics]: ...
    @overload
    def new(
        self, cdecl: Literal["struct image_source **"], init: Any = ..., /
    ) -> Pointer[StructImageSource]: ...
    @overload
    def new(
        self, cdecl: Literal["struct image_source *"], init: Any = ..., /
    ) -> StructImageSource: ...
    @overload
    def new(
        self, cdecl: Literal["struct image_source[]"], init: Any = ..., /
    ) -> Array[StructImageSource]: ...
    @overload
    def new(
        self, cdecl: Literal["struct inherited_image **"], init: Any = ..., /
    ) -> Pointer[StructInheritedImage]: ...
    @overload
    def new(
        self, cdecl: Literal["struct inherited_image *"], init: Any = ..., /
    ) -> StructInheritedImage: ...
    @overload
    def new(
        self, cdecl: Literal["struct inherited_image[]"], init: Any = ..., /
    ) -> Array[StructInheritedImage]: ...
    @overload
    def new(
        self, cdecl: Literal["struct fetch **"], init: Any = ..., /
    ) -> Pointer[StructFetch]: ...
    @overload
    def new(
        self, cdecl: Literal["struct fetch_request **"], init: Any = ..., /
    ) -> Pointer[StructFetchRequest]: ...
    @overload
    def new(
        self, cdecl: Literal["struct fetch_request *"], init: Any = ..., /
    ) -> StructFetchRequest: ...
    @overload
    def new(
        self, cdecl: Literal["struct fetch_request[]"], init: Any = ..., /
    ) -> Array[StructFetchRequest]: ...
    @overload
    def new(
        self, cdecl: Literal["struct origin_counters **"], init: Any = ..., /
    ) -> Pointer[StructOriginCounters]: ...
    @overload
    def new(
        self, cdecl: Literal["struct origin_counters *"], init: Any = ..., /
    ) -> StructOriginCounters: ...
    @overload
    def new(
        self, cdecl: Literal["struct origin_counters[]"], init: Any = ..., /
    ) -> Array[StructOriginCounters]: ...
    @overload
    def new(
        self, cdecl: Literal["struct store_counters **"], init: Any = ..., /
    ) -> Pointer[StructStoreCounters]: ...
    @overload
    def new(
        self, cdecl: Literal["struct store_counters *"], init: Any = ..., /
    ) -> StructStoreCounters: ...
    @overload
    def new(
        self, cdecl: Literal["struct store_counters[]"], init: Any = ..., /
    ) -> Array[StructStoreCounters]: ...
    @overload
    def new(
        self, cdecl: Literal["struct sample_end **"], init: Any = ..., /
    ) -> Pointer[StructSampleEnd]: ...
    @overload
    def new(self, cdecl: Literal["struct sample_end *"], init: Any = ..., /) -> StructSampleEnd: ...
    @overload
    def new(
        self, cdecl: Literal["struct sample_end[]"], init: Any = ..., /
    ) -> Array[StructSampleEnd]: ...
    @overload
    def new(
        self, cdecl: Literal["struct quota **"], init: Any = ..., /
    ) -> Pointer[StructQuota]: ...
    @overload
    def new(
        self, cdecl: Literal["struct quota_status **"], init: Any = ..., /
    ) -> Pointer[StructQuotaStatus]: ...
    @overload
    def new(
        self, cdecl: Literal["struct quota_status *"], init: Any = ..., /
    ) -> StructQuotaStatus: ...
    @overload
    def new(
        self, cdecl: Literal["struct quota_status[]"], init: Any = ..., /
    ) -> Array[StructQuotaStatus]: ...
    @overload
    def new(
        self, cdecl: Literal["struct account_region **"], init: Any = ..., /
    ) -> Pointer[StructAccountRegion]: ...
    @overload
    def new(
        self, cdecl: Literal["struct account_region *"], init: Any = ..., /
    ) -> StructAccountRegion: ...
    @overload
    def new(
        self, cdecl: Literal["struct account_region[]"], init: Any = ..., /
    ) -> Array[StructAccountRegion]: ...
    @overload
    def new(
        self, cdecl: Literal["struct region_table **"], init: Any = ..., /
    ) -> Pointer[StructRegionTable]: ...
    @overload
    def new(
        self, cdecl: Literal["struct region_table *"], init: Any = ..., /
    ) -> StructRegionTable: ...
    @overload
    def new(
        self, cdecl: Literal["struct region_table[]"], init: Any = ..., /
    ) -> Array[StructRegionTable]: ...
    @overload
    def new(
        self, cdecl: Literal["struct account **"], init: Any = ..., /
    ) -> Pointer[StructAccount]: ...
    @overload
    def new(
        self, cdecl: Literal["struct account_counters **"], init: Any = ..., /
    ) -> Pointer[StructAccountCounters]: ...
    @overload
    def new(
        self, cdecl: Literal["struct account_counters *"], init: Any = ..., /
    ) -> StructAccountCounters: ...
    @overload
    def new(
        self, cdecl: Literal["struct account_counters[]"], init: Any = ..., /
    ) -> Array[StructAccountCounters]: ...
    @overload
    def new(
        self, cdecl: Literal["struct account_status **"], init: Any = ..., /
    ) -> Pointer[StructAccountStatus]: ...
    @overload
    def new(
        self, cdecl: Literal["struct account_status *"], init: Any = ..., /
    ) -> StructAccountStatus: ...
    @overload
    def new(
        self, cdecl: Literal["struct account_status[]"], init: Any = ..., /
    ) -> Array[StructAccountStatus]: ...
    @overload
    def new(
        self, cdecl: Literal["struct account_sums **"], init: Any = ..., /
    ) -> Pointer[StructAccountSums]: ...
    @overload
    def new(
        self, cdecl: Literal["struct account_sums *"], init: Any = ..., /
    ) -> StructAccountSums: ...
    @overload
    def new(
        self, cdecl: Literal["struct account_sums[]"], init: Any = ..., /
    ) -> Array[StructAccountSums]: ...
    @overload
    def new(
        self, cdecl: Literal["struct overlay **"], init: Any = ..., /
    ) -> Pointer[StructOverlay]: ...
    @overload
    def new(
        self, cdecl: Literal["struct overlay_sums **"], init: Any = ..., /
    ) -> Pointer[StructOverlaySums]: ...
    @overload
    def new(
        self, cdecl: Literal["struct overlay_sums *"], init: Any = ..., /
    ) -> StructOverlaySums: ...
    @overload
    def new(
        self, cdecl: Literal["struct overlay_sums[]"], init: Any = ..., /
    ) -> Array[StructOverlaySums]: ...
    @overload
    def new(
        self, cdecl: Literal["struct window_stream **"], init: Any = ..., /
    ) -> Pointer[StructWindowStream]: ...
    @overload
    def new(
        self, cdecl: Literal["struct window_stream *"], init: Any = ..., /
    ) -> StructWindowStream: ...
    @overload
    def new(
        self, cdecl: Literal["struct window_stream[]"], init: Any = ..., /
    ) -> Array[StructWindowStream]: ...
    @overload
    def new(
        self, cdecl: Literal["struct window_state **"], init: Any = ..., /
    ) -> Pointer[StructWindowState]: ...
    @overload
    def new(
        self, cdecl: Literal["struct window_state *"], init: Any = ..., /
    ) -> StructWindowState: ...
    @overload
    def new(
        self, cdecl: Literal["struct window_state[]"], init: Any = ..., /
    ) -> Array[StructWindowState]: ...
    @overload
    def new(
        self, cdecl: Literal["struct window_plan **"], init: Any = ..., /
    ) -> Pointer[StructWindowPlan]: ...
    @overload
    def new(
        self, cdecl: Literal["struct window_plan *"], init: Any = ..., /
    ) -> StructWindowPlan: ...
    @overload
    def new(
        self, cdecl: Literal["struct window_plan[]"], init: Any = ..., /
    ) -> Array[StructWindowPlan]: ...
    @overload
    def new(
        self, cdecl: Literal["struct window_shape **"], init: Any = ..., /
    ) -> Pointer[StructWindowShape]: ...
    @overload
    def new(
        self, cdecl: Literal["struct window_shape *"], init: Any = ..., /
    ) -> StructWindowShape: ...
    @overload
    def new(
        self, cdecl: Literal["struct window_shape[]"], init: Any = ..., /
    ) -> Array[StructWindowShape]: ...
    @overload
    def new(
        self, cdecl: Literal["struct guest **"], init: Any = ..., /
    ) -> Pointer[StructGuest]: ...
    @overload
    def new(
        self, cdecl: Literal["struct fault_options **"], init: Any = ..., /
    ) -> Pointer[StructFaultOptions]: ...
    @overload
    def new(
        self, cdecl: Literal["struct fault_options *"], init: Any = ..., /
    ) -> StructFaultOptions: ...
    @overload
    def new(
        self, cdecl: Literal["struct fault_options[]"], init: Any = ..., /
    ) -> Array[StructFaultOptions]: ...
    @overload
    def new(
        self, cdecl: Literal["struct populate_region **"], init: Any = ..., /
    ) -> Pointer[StructPopulateRegion]: ...
    @overload
    def new(
        self, cdecl: Literal["struct populate_region *"], init: Any = ..., /
    ) -> StructPopulateRegion: ...
    @overload
    def new(
        self, cdecl: Literal["struct populate_region[]"], init: Any = ..., /
    ) -> Array[StructPopulateRegion]: ...
    @overload
    def new(
        self, cdecl: Literal["struct populate_options **"], init: Any = ..., /
    ) -> Pointer[StructPopulateOptions]: ...
    @overload
    def new(
        self, cdecl: Literal["struct populate_options *"], init: Any = ..., /
    ) -> StructPopulateOptions: ...
    @overload
    def new(
        self, cdecl: Literal["struct populate_options[]"], init: Any = ..., /
    ) -> Array[StructPopulateOptions]: ...
    @overload
    def new(
        self, cdecl: Literal["struct zerocopy_allowance **"], init: Any = ..., /
    ) -> Pointer[StructZerocopyAllowance]: ...
    @overload
    def new(
        self, cdecl: Literal["struct zerocopy_allowance *"], init: Any = ..., /
    ) -> StructZerocopyAllowance: ...
    @overload
    def new(
        self, cdecl: Literal["struct zerocopy_allowance[]"], init: Any = ..., /
    ) -> Array[StructZerocopyAllowance]: ...
    @overload
    def new(self, cdecl: Literal["struct elf **"], init: Any = ..., /) -> Pointer[StructElf]: ...
    @overload
    def new(self, cdecl: Literal["struct elf *"], init: Any = ..., /) -> StructElf: ...
    @overload
    def new(self, cdecl: Literal["struct elf[]"], init: Any = ..., /) -> Array[StructElf]: ...
    @overload
    def new(
        self, cdecl: Literal["struct guest_image **"], init: Any = ..., /
    ) -> Pointer[StructGuestImage]: ...
    @overload
    def new(
        self, cdecl: Literal["struct guest_image *"], init: Any = ..., /
    ) -> StructGuestImage: ...
    @overload
    def new(
        self, cdecl: Literal["struct guest_image[]"], init: Any = ..., /
    ) -> Array[StructGuestImage]: ...
    @overload
    def new(
        self, cdecl: Literal["struct handshake **"], init: Any = ..., /
    ) -> Pointer[StructHandshake]: ...
    @overload
    def new(
        self, cdecl: Literal["struct region **"], init: Any = ..., /
    ) -> Pointer[StructRegion]: ...
    @overload
    def new(self, cdecl: Literal["struct region *"], init: Any = ..., /) -> StructRegion: ...
    @overload
    def new(self, cdecl: Literal["struct region[]"], init: Any = ..., /) -> Array[StructRegion]: ...
    @overload
    def new(
        self, cdecl: Literal["struct follow_status **"], init: Any = ..., /
    ) -> Pointer[StructFollowStatus]: ...
    @overload
    def new(
        self, cdecl: Literal["struct follow_status *"], init: Any = ..., /
    ) -> StructFollowStatus: ...
    @overload
    def new(
        self, cdecl: Literal["struct follow_status[]"], init: Any = ..., /
    ) -> Array[StructFollowStatus]: ...
    @overload
    def new(
        self, cdecl: Literal["struct follower **"], init: Any = ..., /
    ) -> Pointer[StructFollower]: ...
    @overload
    def new(
        self, cdecl: Literal["struct nbd_server **"], init: Any = ..., /
    ) -> Pointer[StructNbdServer]: ...
    @overload
    def new(
        self, cdecl: Literal["struct nbd_export **"], init: Any = ..., /
    ) -> Pointer[StructNbdExport]: ...
    @overload
    def new(
        self, cdecl: Literal["struct nbd_negotiated **"], init: Any = ..., /
    ) -> Pointer[StructNbdNegotiated]: ...
    @overload
    def new(
        self, cdecl: Literal["struct nbd_negotiated *"], init: Any = ..., /
    ) -> StructNbdNegotiated: ...
    @overload
    def new(
        self, cdecl: Literal["struct nbd_negotiated[]"], init: Any = ..., /
    ) -> Array[StructNbdNegotiated]: ...
    @overload
    def new(
        self, cdecl: Literal["struct nbd_counters **"], init: Any = ..., /
    ) -> Pointer[StructNbdCounters]: ...
    @overload
    def new(
        self, cdecl: Literal["struct nbd_counters *"], init: Any = ..., /
    ) -> StructNbdCounters: ...
    @overload
    def new(
        self, cdecl: Literal["struct nbd_counters[]"], init: Any = ..., /
    ) -> Array[StructNbdCounters]: ...
    @overload
    def new(
        self, cdecl: Literal["struct nbd_ended **"], init: Any = ..., /
    ) -> Pointer[StructNbdEnded]: ...
    @overload
    def new(self, cdecl: Literal["struct nbd_ended *"], init: Any = ..., /) -> StructNbdEnded: ...
    @overload
    def new(
        self, cdecl: Literal["struct nbd_ended[]"], init: Any = ..., /
    ) -> Array[StructNbdEnded]: ...
    @overload
    def new(
        self,
        cdecl: Literal[
            "int *",
            "int8_t *",
            "int16_t *",
            "int32_t *",
            "int64_t *",
            "uint8_t *",
            "uint16_t *",
            "uint32_t *",
            "uint64_t *",
        ],
        init: int = ...,
        /,
    ) -> Pointer[int]: ...
    @overload
    def new(
        self,
        cdecl: Literal[
            "int[]",
            "int8_t[]",
            "int16_t[]",
            "int32_t[]",
            "int64_t[]",
            "uint8_t[]",
            "uint16_t[]",
            "uint32_t[]",
            "uint64_t[]",
        ],
        init: int | Sequence[int],
        /,
    ) -> Array[int]: ...
    @overload
    def from_buffer(
        self,
        cdecl: Literal[
            "int[]",
            "int8_t[]",
            "int16_t[]",
            "int32_t[]",
            "int64_t[]",
            "uint8_t[]",
            "uint16_t[]",
            "uint32_t[]",
            "uint64_t[]",
        ],
        buffer: ReadableBuffer,
        require_writable: bool = ...,
    ) -> Array[int]: ...
    @overload
    def from_buffer(
        self, buffer: ReadableBuffer, *, require_writable: bool = ...
    ) -> Array[bytes]: ...
    @overload
    def cast(self, cdecl: Literal["uintptr_t"], source: CData, /) -> int: ...
    @overload
    def cast(self, cdecl: Literal["char *"], source: int | CData, /) -> Pointer[bytes]: ...
    def gc(self, cdata: _C, destructor: Any, size: int = ...) -> _C: ...
    def buffer(self, cdata: CData, size: int = ..., /) -> memoryview: ...
    def string(self, cdata: Pointer[bytes], maxlen: int = ..., /) -> bytes: ...
    def release(self, cdata: CData, /) -> None: ...

ffi: _Ffi
