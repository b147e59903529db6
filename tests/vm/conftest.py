# SPDX-License-Identifier: Apache-2.0
"""What the machines' tests share: the kit, fetched before the first test's time limit runs."""

import pytest
from guest_kernel import VmError
from machines import Kit, vm_kit


@pytest.fixture(scope="session")
def kit() -> Kit:
    """Machines' parts, with mke2fs in their /bin."""
    try:
        return vm_kit(programs=["mke2fs"])
    except VmError as error:
        pytest.skip(f"needs QEMU, busybox and Debian's kernel: {error}")
