# SPDX-License-Identifier: Apache-2.0
"""Reports of guests and images: the status, its text, and changes of state in the log."""
