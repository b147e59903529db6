# SPDX-License-Identifier: Apache-2.0
"""What a program and its successor must agree about: the layouts of the memory they share."""

from __future__ import annotations

from typing import Final

from cowshed.cache._core import lib

__all__ = ["LAYOUTS"]

LAYOUTS: Final = f"{lib.ARRAYS_VERSION}.{lib.LEDGER_LAYOUT}.{lib.QUOTA_LAYOUT}"
