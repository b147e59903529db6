# SPDX-License-Identifier: Apache-2.0
"""The format of handoffs and exports."""
