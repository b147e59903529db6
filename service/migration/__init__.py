# SPDX-License-Identifier: Apache-2.0
"""Migration of guests: drains, exports, imports, and their targets."""
