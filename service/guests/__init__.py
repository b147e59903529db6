# SPDX-License-Identifier: Apache-2.0
"""Guests that map: their mappings, descriptors, heirs, and how many may come in."""
