# SPDX-License-Identifier: Apache-2.0
"""Request and reply messages between two programs, blocking or for asyncio."""
