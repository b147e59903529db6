# SPDX-License-Identifier: Apache-2.0
"""The userfaultfd handler: answers faults from the store and supplies private copies on write."""

from cowshed.faults.handler import FaultHandler, Orders, uffd_features

__all__ = ["FaultHandler", "Orders", "uffd_features"]
