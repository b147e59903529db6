/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "accounting/core/region_guard.h"

#include "cache/core/abi.h"

#include <errno.h>

#define ALL_MODES (UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_MINOR | UFFDIO_REGISTER_MODE_WP)

bool guard_next_piece(const struct account *account, uint64_t first, uint64_t end, struct account_span *piece_out)
{
	while (account_span(account, first, end, piece_out)) {
		uint64_t span_end = piece_out->page + piece_out->nr_pages;
		uint64_t there = bits_next_clear(account->unmapped, piece_out->page, span_end);

		if (there < span_end) {
			piece_out->address += (there - piece_out->page) << PAGE_SHIFT;
			piece_out->page = there;
			piece_out->nr_pages = bits_next(account->unmapped, there, span_end) - there;
			return true;
		}
		first = span_end;
	}
	return false;
}

int guard_register(int uffd, const struct account_span *piece, int modes)
{
	struct uffdio_register order = {
		.range = {.start = piece->address, .len = piece->nr_pages << PAGE_SHIFT},
		.mode = modes == GUARD_ALL ? ALL_MODES : UFFDIO_REGISTER_MODE_MISSING,
	};

	return ioctl(uffd, UFFDIO_REGISTER, &order) < 0 ? -errno : 0;
}

int guard_unregister(int uffd, const struct account_span *piece)
{
	struct uffdio_range range = {.start = piece->address, .len = piece->nr_pages << PAGE_SHIFT};

	return ioctl(uffd, UFFDIO_UNREGISTER, &range) < 0 ? -errno : 0;
}

/*
 * How the range is registered, by an order that the kernel refuses once it has found the mapping: -EINVAL: all of it is
 * one mapping, without write protection; -ENOENT: it is not, or not registered; -EAGAIN: an event is unread. Where it
 * is registered for all faults the order is carried out, and maps shared pages, protected, as a fault does.
 * (mfill_atomic() in mm/userfaultfd.c, Linux 6.4 to 6.18.)
 */
static int probe(int uffd, uint64_t address, uint64_t nr_pages)
{
	struct uffdio_continue order = {
		.range = {.start = address, .len = nr_pages << PAGE_SHIFT},
		.mode = UFFDIO_CONTINUE_MODE_WP,
	};

	return ioctl(uffd, UFFDIO_CONTINUE, &order) < 0 ? -errno : 0;
}

bool guard_is_whole(int uffd, const struct account_span *span)
{
	int err = probe(uffd, span->address, span->nr_pages);

	return !err || err == -EEXIST;
}

bool account_is_bare(const struct account *account, uint64_t page)
{
	uint64_t address = account_address(account, page);

	return address && probe(account->uffd, address, 1) == -EINVAL;
}

int guard_map_page(int uffd, uint64_t address)
{
	struct uffdio_continue order = {.range = {.start = address, .len = PAGE_BYTES}, .mode = 0};

	return ioctl(uffd, UFFDIO_CONTINUE, &order) < 0 && errno != EEXIST ? -errno : 0;
}

int guard_check_all(const struct account *account, const struct account_span *span)
{
	int err = probe(account->uffd, span->address, span->nr_pages);

	if (err != -ENOENT)
		return err == -EINVAL ? 0 : err;
	err = 0;
	for (uint64_t i = 0; !err && i < span->nr_pages; i++)
		err = guard_map_page(account->uffd, span->address + (i << PAGE_SHIFT));
	return err == -EINVAL || err == -EFAULT ? -ENOENT : err;
}
