# SPDX-License-Identifier: Apache-2.0
"""Connections that carry messages: unix, tcp, tls and vsock."""
