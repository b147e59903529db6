# SPDX-License-Identifier: Apache-2.0
"""Guests that map: their mappings, descriptors and records, and the admission of connections."""
