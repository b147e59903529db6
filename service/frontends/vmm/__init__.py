# SPDX-License-Identifier: Apache-2.0
"""Virtual machine monitors at an image's own socket."""
