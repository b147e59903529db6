# SPDX-License-Identifier: Apache-2.0
"""`cowshed top`: its loop, history, state, view and screen."""
