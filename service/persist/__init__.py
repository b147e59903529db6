# SPDX-License-Identifier: Apache-2.0
"""What outlives the backend: groups of descriptors, records, counters."""
