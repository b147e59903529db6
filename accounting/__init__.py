# SPDX-License-Identifier: Apache-2.0
"""Accounting: grants, private pages, quotas, the audit, and the choice of what to evict."""

from cowshed.accounting.audit import AuditReport, Mismatch, audit
from cowshed.accounting.ledger import (
    MAX_REGIONS,
    Account,
    AccountCounters,
    AccountState,
    AccountStatus,
    EvictReason,
    LatencyKind,
    Region,
    evict,
)
from cowshed.accounting.missing_pages import MissingPages
from cowshed.accounting.overlay import Overlay, OverlaySums
from cowshed.accounting.policy.eviction import EvictionPolicy, ExtentKey, Heat
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
    "MAX_REGIONS",
    "NO_QUOTA_BYTES",
    "Account",
    "AccountCounters",
    "AccountState",
    "AccountStatus",
    "AccountSums",
    "AuditReport",
    "EvictReason",
    "EvictionPolicy",
    "ExtentKey",
    "FirstTouches",
    "Heat",
    "Latency",
    "LatencyKind",
    "Mismatch",
    "MissingPages",
    "Overlay",
    "OverlaySums",
    "Quota",
    "QuotaPolicy",
    "QuotaStatus",
    "Region",
    "Watermarks",
    "WorkingSet",
    "add_statuses",
    "audit",
    "evict",
    "read_accounts",
    "read_latency",
    "read_states",
    "read_working_set",
    "sum_accounts",
    "write_working_set",
]
