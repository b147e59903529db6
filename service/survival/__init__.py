# SPDX-License-Identifier: Apache-2.0
"""What outlives a backend: the keeper, what it holds, and the records that say of what."""
