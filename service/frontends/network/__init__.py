# SPDX-License-Identifier: Apache-2.0
"""The server of guests by tcp, tls and vsock."""
