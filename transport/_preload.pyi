# SPDX-License-Identifier: Apache-2.0
# Written by tools/core_stub.py. This extension is a library for `cowshed attach` to preload into
# programs. It holds no Python: an import of it fails, so there is nothing to declare.
