# SPDX-License-Identifier: Apache-2.0
"""What the command line and the configuration file may say. Opens nothing."""
