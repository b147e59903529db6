# SPDX-License-Identifier: Apache-2.0
"""The command line's larger commands, each a file."""
