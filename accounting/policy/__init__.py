# SPDX-License-Identifier: Apache-2.0
"""What to evict and what to keep: pure decisions."""
