# SPDX-License-Identifier: Apache-2.0
"""The images served: opening, access, digests, warming, eviction."""
