# SPDX-License-Identifier: Apache-2.0
"""NBD: its handshake and wire format, the server in the C core, and the guest library's client."""
