# SPDX-License-Identifier: Apache-2.0
"""The NBD server: who asks for which export, up to the transmission, which is the core's."""
