# SPDX-License-Identifier: Apache-2.0
"""The HTTP server, the page that it shows, and the page's state."""
