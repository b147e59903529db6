# SPDX-License-Identifier: Apache-2.0
"""The keeper, reloads, and a shutdown that refuses no peer."""
