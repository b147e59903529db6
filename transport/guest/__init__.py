# SPDX-License-Identifier: Apache-2.0
"""The library through which a guest uses an image."""
