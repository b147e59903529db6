# SPDX-License-Identifier: Apache-2.0
"""Guests that move: drains, exports, imports, and the target of each."""
