# SPDX-License-Identifier: Apache-2.0
"""Each image's own socket, for virtual machine monitors."""
