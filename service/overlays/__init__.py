# SPDX-License-Identifier: Apache-2.0
"""Overlays: the private pages of guests that map nothing, in memory or in files."""
