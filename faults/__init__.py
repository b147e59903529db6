# SPDX-License-Identifier: Apache-2.0
"""The userfaultfd handler: answers faults; charges and opens pages that guests write."""

from cowshed.faults.handler import FaultHandler, FaultOptions, uffd_features
from cowshed.faults.populate import (
    PopulateHandler,
    PopulateOptions,
    PopulateRegion,
    ZerocopyAllowance,
)

__all__ = [
    "FaultHandler",
    "FaultOptions",
    "PopulateHandler",
    "PopulateOptions",
    "PopulateRegion",
    "ZerocopyAllowance",
    "uffd_features",
]
