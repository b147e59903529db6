# SPDX-License-Identifier: Apache-2.0
"""The images served: opened, found by name, digested, warmed, evicted."""
