# SPDX-License-Identifier: Apache-2.0
"""The keeper, reloads, and a shutdown that turns nobody away."""
