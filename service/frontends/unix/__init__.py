# SPDX-License-Identifier: Apache-2.0
"""Guests that map by the unix socket, and operators."""
