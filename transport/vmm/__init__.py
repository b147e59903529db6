# SPDX-License-Identifier: Apache-2.0
"""The handshakes of virtual machine monitors, without a socket."""
