# SPDX-License-Identifier: Apache-2.0
"""What the backend knows and decides about its pages: who holds them, and which to give up."""

from cowshed.accounting.audit import AuditReport, Mismatch, audit
from cowshed.accounting.eviction import EvictionPolicy, ExtentKey, Heat
from cowshed.accounting.ledger import (
    Account,
    AccountCounters,
    AccountStatus,
    Latency,
    LatencyKind,
    QuotaPolicy,
    evict,
    read_latency,
)
from cowshed.accounting.watermarks import Watermarks
from cowshed.accounting.workingset import (
    FirstTouches,
    WorkingSet,
    read_working_set,
    write_working_set,
)

__all__ = [
    "Account",
    "AccountCounters",
    "AccountStatus",
    "AuditReport",
    "EvictionPolicy",
    "ExtentKey",
    "FirstTouches",
    "Heat",
    "Latency",
    "LatencyKind",
    "Mismatch",
    "QuotaPolicy",
    "Watermarks",
    "WorkingSet",
    "audit",
    "evict",
    "read_latency",
    "read_working_set",
    "write_working_set",
]
