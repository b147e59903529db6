# SPDX-License-Identifier: Apache-2.0
"""Images' own sockets, for Firecracker's and Nydus's clients."""
