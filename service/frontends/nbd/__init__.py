# SPDX-License-Identifier: Apache-2.0
"""The NBD server, its sessions and exports."""
