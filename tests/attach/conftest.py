# SPDX-License-Identifier: Apache-2.0
"""The fixtures of tests/support/attached.py, for every test here."""

from attached import attached, mapper, shared, start_reader

__all__ = ["attached", "mapper", "shared", "start_reader"]
