# SPDX-License-Identifier: Apache-2.0
"""The library that a guest uses an image with."""
