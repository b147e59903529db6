# SPDX-License-Identifier: Apache-2.0
"""The layouts of the memory that a program and its successor share, on which they must agree.

A release that adds to the end of a memfd adopts one without the addition. It answers the LAYOUTS
of the releases before, which compare these, and ALL_LAYOUTS beside them, so that a daemon of its
own does not give way to a program that does not know the addition.
"""

from __future__ import annotations

from typing import Final

from cowshed.cache._core import lib

__all__ = ["ALL_LAYOUTS", "LAYOUTS"]

LAYOUTS: Final = f"{lib.ARRAYS_VERSION}.{lib.LEDGER_LAYOUT}.{lib.QUOTA_LAYOUT}"
ALL_LAYOUTS: Final = f"{LAYOUTS}+{lib.OPEN_REGIONS_LAYOUT}"
