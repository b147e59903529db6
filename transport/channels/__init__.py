# SPDX-License-Identifier: Apache-2.0
"""Messages with somebody at the other end, waited for or awaited."""
