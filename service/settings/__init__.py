# SPDX-License-Identifier: Apache-2.0
"""Parse and check the command line's options and the configuration file. Opens nothing else."""
