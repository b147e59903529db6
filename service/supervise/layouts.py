# SPDX-License-Identifier: Apache-2.0
"""The layouts of the memory that a program and its successor share, on which they must agree."""

from __future__ import annotations

from typing import Final

from cowshed.cache._core import lib

__all__ = ["LAYOUTS"]

LAYOUTS: Final = f"{lib.ARRAYS_VERSION}.{lib.LEDGER_LAYOUT}.{lib.QUOTA_LAYOUT}"
