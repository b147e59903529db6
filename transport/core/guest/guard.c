/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "transport/core/guest/guard.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "cache/core/abi.h"

int guard_open(int uffd_device)
{
	int flags = O_CLOEXEC | O_NONBLOCK;
	int uffd = -1, own;

	if (uffd_device >= 0)
		uffd = ioctl(uffd_device, USERFAULTFD_IOC_NEW, flags);
	if (uffd < 0) {
		own = open("/dev/userfaultfd", O_RDWR | O_CLOEXEC);
		if (own >= 0) {
			uffd = ioctl(own, USERFAULTFD_IOC_NEW, flags);
			close(own);
		}
	}
	/* Not with UFFD_USER_MODE_ONLY: that is always allowed, and does not handle faults inside system calls. */
	if (uffd < 0)
		uffd = (int)syscall(SYS_userfaultfd, flags);
	return uffd < 0 ? -errno : uffd;
}

int guard_agree(int uffd, uint64_t features)
{
	struct uffdio_api api = {.api = UFFD_API, .features = features};

	if (ioctl(uffd, UFFDIO_API, &api) < 0)
		return -errno;
	return (api.features & features) == features ? 0 : -EOPNOTSUPP;
}

int guard_range(int uffd, void *address, uint64_t nr_bytes)
{
	const uint64_t needed = (uint64_t)1 << _UFFDIO_CONTINUE | (uint64_t)1 << _UFFDIO_WRITEPROTECT |
	                        (uint64_t)1 << _UFFDIO_COPY | (uint64_t)1 << _UFFDIO_WAKE;
	struct uffdio_register reg = {
		.range = {.start = (uintptr_t)address, .len = nr_bytes},
		.mode = UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_WP,
	};

	if (ioctl(uffd, UFFDIO_REGISTER, &reg) < 0)
		return -errno;
	return (reg.ioctls & needed) == needed ? 0 : -EOPNOTSUPP;
}

int guard_lift(int uffd, void *address, uint64_t nr_bytes)
{
	struct uffdio_range range = {.start = (uintptr_t)address, .len = nr_bytes};

	return ioctl(uffd, UFFDIO_UNREGISTER, &range) < 0 ? -errno : 0;
}
