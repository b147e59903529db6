# SPDX-License-Identifier: Apache-2.0
"""`cowshed top`: what it asks, remembers and draws."""
