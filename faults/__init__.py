# SPDX-License-Identifier: Apache-2.0
"""The userfaultfd handler: answers faults and charges and opens pages for private copies."""

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
