# SPDX-License-Identifier: Apache-2.0
"""The userfaultfd handler: answers faults from the store and supplies private copies."""

from cowshed.faults.handler import FaultHandler, FaultOptions, uffd_features
from cowshed.faults.supply import ShareAllowance, SupplyHandler, SupplyRegion, SupplyTerms

__all__ = [
    "FaultHandler",
    "FaultOptions",
    "ShareAllowance",
    "SupplyHandler",
    "SupplyRegion",
    "SupplyTerms",
    "uffd_features",
]
