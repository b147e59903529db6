# SPDX-License-Identifier: Apache-2.0
"""The operators' requests to a running daemon, and their client."""
