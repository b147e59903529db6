# SPDX-License-Identifier: Apache-2.0
"""Guests that map: their mappings, descriptors, records, and how many may come in."""
