# SPDX-License-Identifier: Apache-2.0
"""What the daemon runs on: its loop, worker threads and log; the form of sizes and text."""
