# SPDX-License-Identifier: Apache-2.0
"""Messages between two programs as bytes and as conversations, without a socket."""
