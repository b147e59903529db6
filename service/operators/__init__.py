# SPDX-License-Identifier: Apache-2.0
"""What operators may ask of a running daemon, and the asking end."""
