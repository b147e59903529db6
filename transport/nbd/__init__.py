# SPDX-License-Identifier: Apache-2.0
"""NBD: its handshake and wire, the server that the C core is, and the client of the library."""
