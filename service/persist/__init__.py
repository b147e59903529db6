# SPDX-License-Identifier: Apache-2.0
"""State that outlives the backend: groups of descriptors, records, counters."""
