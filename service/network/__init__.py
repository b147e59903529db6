# SPDX-License-Identifier: Apache-2.0
"""Guests from elsewhere: listeners by URI, and their conversation."""
