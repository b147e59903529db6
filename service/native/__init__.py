# SPDX-License-Identifier: Apache-2.0
"""The guests' own socket, and the conversation on it."""
