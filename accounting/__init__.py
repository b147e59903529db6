# SPDX-License-Identifier: Apache-2.0
"""What the backend knows and decides about its pages: who holds them, and which to give up."""

from cowshed.accounting.eviction import EvictionPolicy, ExtentKey, Heat
from cowshed.accounting.watermarks import Watermarks
from cowshed.accounting.workingset import (
    FirstTouches,
    WorkingSet,
    read_working_set,
    write_working_set,
)

__all__ = [
    "EvictionPolicy",
    "ExtentKey",
    "FirstTouches",
    "Heat",
    "Watermarks",
    "WorkingSet",
    "read_working_set",
    "write_working_set",
]
