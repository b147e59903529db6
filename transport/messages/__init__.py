# SPDX-License-Identifier: Apache-2.0
"""Messages between two programs, their encoding and the rules of a conversation; no sockets."""
