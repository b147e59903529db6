/* SPDX-License-Identifier: Apache-2.0 */
#include "faults/core/uffd.h"

#include "cache/core/abi.h"

#include <errno.h>

int uffd_wake(int uffd, uint64_t address, uint64_t length)
{
	struct uffdio_range range = {.start = address, .len = length};

	return ioctl(uffd, UFFDIO_WAKE, &range) < 0 ? -errno : 0;
}

int uffd_continue(int uffd, uint64_t address, uint64_t length, uint32_t max_skips, uint64_t *mapped_out)
{
	*mapped_out = 0;
	while (length) {
		struct uffdio_continue order = {
			.range = {.start = address, .len = length},
			.mode = UFFDIO_CONTINUE_MODE_WP,
		};

		if (ioctl(uffd, UFFDIO_CONTINUE, &order) == 0) {
			*mapped_out += length;
			return 0;
		}
		int err = errno;
		uint64_t step;
		if (order.mapped > 0) { /* partial: what stopped it is said by the next call */
			step = (uint64_t)order.mapped;
			*mapped_out += step;
		} else if (err == EEXIST) {
			/* EEXIST wakes nobody, and a thread may wait for just this page. */
			int woken = uffd_wake(uffd, address, PAGE_BYTES);

			if (woken < 0)
				return woken;
			if (max_skips-- == 0)
				return -EEXIST;
			step = PAGE_BYTES;
		} else {
			return -err;
		}
		address += step;
		length -= step;
	}
	return 0;
}

int uffd_copy_page(int uffd, uint64_t address, const void *from)
{
	struct uffdio_copy order = {.dst = address, .src = (uint64_t)(uintptr_t)from, .len = PAGE_BYTES};

	if (ioctl(uffd, UFFDIO_COPY, &order) == 0)
		return 0;
	int err = errno;
	if (err == EEXIST) {
		int woken = uffd_wake(uffd, address, PAGE_BYTES);

		if (woken < 0)
			return woken;
	}
	return -err;
}

int uffd_open(int uffd, uint64_t address, uint64_t length)
{
	struct uffdio_writeprotect order = {.range = {.start = address, .len = length}, .mode = 0};

	return ioctl(uffd, UFFDIO_WRITEPROTECT, &order) < 0 ? -errno : 0;
}

static int poison(int uffd, uint64_t address)
{
	struct uffdio_poison order = {.range = {.start = address, .len = PAGE_BYTES}};

	return ioctl(uffd, UFFDIO_POISON, &order) < 0 ? -errno : 0;
}

int uffd_poison_page(int uffd, uint64_t address, bool marked)
{
	struct uffdio_writeprotect protect = {
		.range = {.start = address, .len = PAGE_BYTES},
		.mode = UFFDIO_WRITEPROTECT_MODE_WP,
	};
	int err = poison(uffd, address);

	if (err != -EEXIST || !marked)
		return err;
	err = uffd_open(uffd, address, PAGE_BYTES);
	if (!err)
		err = poison(uffd, address);
	if (err == -EEXIST) /* not the marker after all but a page, mapped just now: it must not stay open */
		ioctl(uffd, UFFDIO_WRITEPROTECT, &protect);
	return err;
}
