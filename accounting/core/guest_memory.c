/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "accounting/core/guest_memory.h"

#include "accounting/core/page_runs.h"
#include "cache/core/abi.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

struct loading {
	int mem_fd;
	bool is_frozen;
	uint8_t *to, *unread; /* of the next page */
	int64_t nr_unread;
};

/* Copies nr pages from one address on. */
static int load_span(struct loading *loading, uint64_t address, uint64_t nr)
{
	for (uint64_t left = nr << PAGE_SHIFT, at = address; left;) {
		ssize_t got = pread(loading->mem_fd, loading->to, left, (off_t)at);
		uint64_t in_page = at % PAGE_BYTES;

		if (got < 0 && errno == EINTR)
			continue;
		if (got == 0)
			return -ESRCH;
		if (got < 0) {
			if (errno != EIO || loading->is_frozen)
				return -errno;
			got = (ssize_t)(PAGE_BYTES - in_page); /* the guest discarded the page */
			memset(loading->to, 0, (size_t)got);
			loading->nr_unread += !loading->unread[0];
			loading->unread[0] = 1;
		}
		loading->to += got;
		loading->unread += (in_page + (uint64_t)got) >> PAGE_SHIFT;
		at += (uint64_t)got;
		left -= (uint64_t)got;
	}
	return 0;
}

/* Copies a run, which may be in several regions. */
static int load_run(struct loading *loading, const struct region_table *table, struct page_run run)
{
	uint64_t page = run.first, end = run.first + run.nr;
	int err = 0;

	for (uint64_t i = 0; i < table->nr && page < end && !err; i++) {
		const struct account_region *region = &table->regions[i];
		uint64_t region_end = region->first_page + region->nr_pages;
		uint64_t stop = end < region_end ? end : region_end;

		if (page < region->first_page || page >= region_end)
			continue;
		err = load_span(loading, region->address + ((page - region->first_page) << PAGE_SHIFT), stop - page);
		page = stop;
	}
	return !err && page < end ? -ENXIO : err;
}

static bool is_same(const struct region_table *a, const struct region_table *b)
{
	return a->nr == b->nr && memcmp(a->regions, b->regions, a->nr * sizeof a->regions[0]) == 0;
}

int64_t account_load(const struct account *account, int mem_fd, const uint8_t *runs, uint64_t nr_runs, int is_frozen,
                     uint8_t *to, uint8_t *unread)
{
	struct loading loading = {.mem_fd = mem_fd, .is_frozen = is_frozen, .to = to, .unread = unread};
	struct region_table before, after;
	int err = 0;

	account_regions(account, &before);
	for (uint64_t no = 0; no < nr_runs && !err; no++)
		err = load_run(&loading, &before, page_run_at(runs, no));
	if (err)
		return err;
	account_regions(account, &after);
	if (is_same(&before, &after))
		return loading.nr_unread;
	memset(unread, 1, (size_t)(loading.unread - unread)); /* the guest moved some of it meanwhile */
	return loading.unread - unread;
}
