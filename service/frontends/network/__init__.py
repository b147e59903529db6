# SPDX-License-Identifier: Apache-2.0
"""Guests by tcp, tls and vsock."""
