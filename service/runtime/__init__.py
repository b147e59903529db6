# SPDX-License-Identifier: Apache-2.0
"""What the whole daemon stands on: its loop, worker threads, log; how sizes and text look."""
