# SPDX-License-Identifier: Apache-2.0
"""The unix socket: guests that map, and operators."""
