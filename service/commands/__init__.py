# SPDX-License-Identifier: Apache-2.0
"""The larger commands of the command line, one file each."""
