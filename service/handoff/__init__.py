# SPDX-License-Identifier: Apache-2.0
"""Drain, export and import: state read out, sent, received and admitted."""
