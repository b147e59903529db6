# SPDX-License-Identifier: Apache-2.0
"""Guests that map nothing: their private pages, in memory or in files."""
