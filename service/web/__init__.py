# SPDX-License-Identifier: Apache-2.0
"""The HTTP server, the page that it serves, and the page's state."""
