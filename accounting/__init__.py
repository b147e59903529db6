# SPDX-License-Identifier: Apache-2.0
"""Accounting: grants, private pages, quotas, the audit, and the choice of what to evict."""

from cowshed.accounting.audit import AuditReport, Mismatch, audit
from cowshed.accounting.ledger import (
    MAX_REGIONS,
    OPEN_PAGES,
    Account,
    AccountCounters,
    AccountState,
    AccountStatus,
    CloseReason,
    EvictReason,
    LatencyKind,
    Region,
    evict,
)
from cowshed.accounting.missing_pages import MissingPages
from cowshed.accounting.overlay import Overlay, OverlaySums
from cowshed.accounting.policy.eviction import EvictionPolicy, ExtentKey, Heat
from cowshed.accounting.policy.opening import OpeningPolicy, RegionKey
from cowshed.accounting.policy.sampling import (
    MOST_TOUCHES,
    Estimate,
    Exposure,
    Probe,
)
from cowshed.accounting.policy.standby_size import StandbySize
from cowshed.accounting.policy.use import (
    CAPACITY_FACTORS,
    STAY_PARTS,
    WINDOWS_SECONDS,
    Counts,
    Observed,
    Seen,
    Use,
    estimate_use,
)
from cowshed.accounting.policy.watermarks import Watermarks
from cowshed.accounting.policy.workingset import (
    FirstTouches,
    WorkingSet,
    read_working_set,
    write_working_set,
)
from cowshed.accounting.quota import NO_QUOTA_BYTES, Quota, QuotaPolicy, QuotaStatus
from cowshed.accounting.sums import (
    AccountSums,
    Latency,
    add_statuses,
    read_accounts,
    read_latency,
    read_states,
    sum_accounts,
)

__all__ = [
    "CAPACITY_FACTORS",
    "MAX_REGIONS",
    "MOST_TOUCHES",
    "NO_QUOTA_BYTES",
    "OPEN_PAGES",
    "STAY_PARTS",
    "WINDOWS_SECONDS",
    "Account",
    "AccountCounters",
    "AccountState",
    "AccountStatus",
    "AccountSums",
    "AuditReport",
    "CloseReason",
    "Counts",
    "Estimate",
    "EvictReason",
    "EvictionPolicy",
    "Exposure",
    "ExtentKey",
    "FirstTouches",
    "Heat",
    "Latency",
    "LatencyKind",
    "Mismatch",
    "MissingPages",
    "Observed",
    "OpeningPolicy",
    "Overlay",
    "OverlaySums",
    "Probe",
    "Quota",
    "QuotaPolicy",
    "QuotaStatus",
    "Region",
    "RegionKey",
    "Seen",
    "StandbySize",
    "Use",
    "Watermarks",
    "WorkingSet",
    "add_statuses",
    "audit",
    "estimate_use",
    "evict",
    "read_accounts",
    "read_latency",
    "read_states",
    "read_working_set",
    "sum_accounts",
    "write_working_set",
]
