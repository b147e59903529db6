/* SPDX-License-Identifier: Apache-2.0 */
#include "faults/core/uffd.h"

#include "cache/core/abi.h"

#include <errno.h>
#include <stddef.h>

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
		if (order.mapped > 0) { /* partial: the next call reports what stopped it */
			step = (uint64_t)order.mapped;
			*mapped_out += step;
		} else if (err == EEXIST) {
			/* EEXIST wakes no thread, and one may wait for just this page. */
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

int uffd_copy(int uffd, uint64_t address, const void *from, uint64_t length, bool protect, uint64_t *done_out)
{
	uint64_t done = 0;
	int err = 0;

	while (done < length && !err) {
		struct uffdio_copy order = {
			.dst = address + done,
			.src = (uint64_t)(uintptr_t)from + done,
			.len = length - done,
			.mode = protect ? UFFDIO_COPY_MODE_WP : 0,
		};

		err = ioctl(uffd, UFFDIO_COPY, &order) < 0 ? -errno : 0;
		if (!err) {
			done = length;
		} else if (order.copy > 0) { /* partial: the next call reports what stopped it */
			done += (uint64_t)order.copy;
			err = 0;
		} else if (err == -EEXIST) {
			/* EEXIST wakes no thread, and one may wait for just this page. */
			err = uffd_wake(uffd, address + done, PAGE_BYTES);
			done += err ? 0 : PAGE_BYTES;
		}
	}
	*done_out = done;
	return err;
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

/* One ioctl: 0, or -errno; *done_out is what the kernel did before it stopped. */
static int populate_once(int uffd, uint64_t address, const char *from, uint64_t length, uint64_t *done_out)
{
	int64_t done;
	int err;

	if (from) {
		struct uffdio_copy order = {.dst = address, .src = (uint64_t)(uintptr_t)from, .len = length};

		err = ioctl(uffd, UFFDIO_COPY, &order) < 0 ? -errno : 0;
		done = order.copy;
	} else {
		struct uffdio_zeropage order = {.range = {.start = address, .len = length}};

		err = ioctl(uffd, UFFDIO_ZEROPAGE, &order) < 0 ? -errno : 0;
		done = order.zeropage;
	}
	*done_out = err ? (done > 0 ? (uint64_t)done : 0) : length;
	return err;
}

int uffd_install(int uffd, uint64_t address, const void *from, uint64_t length, uint64_t page_bytes, uint64_t *done_out)
{
	uint64_t done = 0, step;
	int err = 0;

	while (done < length && !err) {
		err = populate_once(uffd, address + done, from ? (const char *)from + done : NULL, length - done,
		                    &step);
		if (err == -EEXIST && !step) {
			/* EEXIST wakes no thread, and one may wait for just this page. */
			err = uffd_wake(uffd, address + done, page_bytes);
			step = err ? 0 : page_bytes;
		} else if (step) {
			err = 0; /* partial: the next call reports what stopped it */
		}
		done += step;
	}
	*done_out = done;
	return err;
}

int uffd_poison_range(int uffd, uint64_t address, uint64_t length)
{
	struct uffdio_poison order = {.range = {.start = address, .len = length}};

	return ioctl(uffd, UFFDIO_POISON, &order) < 0 ? -errno : 0;
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
	if (err == -EEXIST) /* no marker, but a page that was mapped just now: it must not stay open */
		ioctl(uffd, UFFDIO_WRITEPROTECT, &protect);
	return err;
}
