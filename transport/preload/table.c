/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "transport/preload/table.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/resource.h>

#include "transport/core/guest/guard.h"
#include "transport/preload/orphans.h"
#include "transport/preload/real.h"
#include "transport/preload/wire.h"

/* Our descriptors are numbered from here if the limit allows: programs use low numbers, and shells keep some under 256.
   Never take those of the standard streams, which a program may have closed. */
#define HIDING_FD 900
#define LOWEST_FD 3

struct range table_ranges[TABLE_MAX_RANGES];
unsigned table_nr_ranges;
struct link table_links[TABLE_MAX_LINKS];

/* Bounds of all ranges and descriptors, read without the lock: they may be too wide, never too narrow. */
static _Atomic uintptr_t lowest_address = UINTPTR_MAX, highest_address;
static atomic_uint lowest_fd = UINT_MAX, highest_fd;

bool table_may_touch(uintptr_t start, uintptr_t end)
{
	return start < atomic_load(&highest_address) && end > atomic_load(&lowest_address);
}

bool table_may_own(unsigned first_fd, unsigned last_fd)
{
	return first_fd <= atomic_load(&highest_fd) && last_fd >= atomic_load(&lowest_fd);
}

void table_update_bounds(void)
{
	unsigned low_fd = UINT_MAX, high_fd = 0;

	for (unsigned i = 0; i < TABLE_MAX_LINKS; i++) {
		const int fds[2] = {table_links[i].connection_fd, table_links[i].uffd};

		for (unsigned k = 0; table_links[i].nr_ranges > 0 && k < 2; k++) {
			low_fd = (unsigned)fds[k] < low_fd ? (unsigned)fds[k] : low_fd;
			high_fd = (unsigned)fds[k] > high_fd ? (unsigned)fds[k] : high_fd;
		}
	}
	atomic_store(&lowest_fd, low_fd);
	atomic_store(&highest_fd, high_fd);
	atomic_store(&lowest_address, table_nr_ranges ? table_ranges[0].start : UINTPTR_MAX);
	atomic_store(&highest_address, table_nr_ranges ? table_ranges[table_nr_ranges - 1].end : 0);
	orphans_look();
}

bool table_touches(uintptr_t start, uintptr_t end)
{
	for (unsigned i = 0; i < table_nr_ranges; i++)
		if (start < table_ranges[i].end && end > table_ranges[i].start)
			return true;
	return false;
}

int table_reserve(unsigned nr_ranges, unsigned nr_links)
{
	unsigned nr_free = 0;

	for (unsigned i = 0; i < TABLE_MAX_LINKS; i++)
		nr_free += table_links[i].nr_ranges == 0;
	if (nr_free < nr_links || table_nr_ranges + nr_ranges > TABLE_MAX_RANGES)
		return -ENOMEM;
	return 0;
}

void table_hide_fd(int *fd)
{
	struct rlimit limit;
	int from = HIDING_FD, moved;

	if (getrlimit(RLIMIT_NOFILE, &limit) == 0 && limit.rlim_cur < HIDING_FD + 64)
		from = (int)(limit.rlim_cur - limit.rlim_cur / 4);
	moved = fcntl(*fd, F_DUPFD_CLOEXEC, from);
	if (moved < 0)
		moved = fcntl(*fd, F_DUPFD_CLOEXEC, LOWEST_FD);
	if (moved < 0)
		return;
	real_close(*fd);
	*fd = moved;
}

uint16_t table_add_link(int connection_fd, int uffd)
{
	uint16_t link_no = 0;

	while (table_links[link_no].nr_ranges > 0)
		link_no++;
	assert(link_no < TABLE_MAX_LINKS);
	table_links[link_no] = (struct link){.connection_fd = connection_fd, .uffd = uffd};
	table_hide_fd(&table_links[link_no].connection_fd);
	table_hide_fd(&table_links[link_no].uffd);
	return link_no;
}

void table_add(struct range range)
{
	unsigned at = table_nr_ranges;

	assert(table_nr_ranges < TABLE_MAX_RANGES);
	for (; at > 0 && table_ranges[at - 1].start > range.start; at--)
		table_ranges[at] = table_ranges[at - 1];
	table_ranges[at] = range;
	table_nr_ranges++;
	if (range.link_no != TABLE_NO_LINK)
		table_links[range.link_no].nr_ranges++;
	table_update_bounds();
}

static void link_close(struct link *link)
{
	real_close(link->connection_fd);
	real_close(link->uffd);
}

static void remove_range(unsigned range_no)
{
	uint16_t link_no = table_ranges[range_no].link_no;

	memmove(&table_ranges[range_no], &table_ranges[range_no + 1],
	        (--table_nr_ranges - range_no) * sizeof(table_ranges[0]));
	if (link_no != TABLE_NO_LINK && --table_links[link_no].nr_ranges == 0)
		link_close(&table_links[link_no]);
}

void table_cut(uintptr_t start, uintptr_t end)
{
	for (unsigned i = 0; i < table_nr_ranges;) {
		struct range *range = &table_ranges[i];
		struct range after = *range;

		if (start >= range->end || end <= range->start) {
			i++;
			continue;
		}
		after.start = end;
		after.offset_bytes += end - range->start;
		if (range->start < start) {
			range->end = start;
			if (after.start < after.end)
				table_add(after);
			i++;
		} else if (end < range->end) {
			*range = after;
			i++;
		} else {
			remove_range(i);
		}
	}
	table_update_bounds();
}

void table_reassign(uintptr_t start, uintptr_t end, uint16_t link_no, struct frames frames)
{
	struct range *range = table_find(start, end);
	uint16_t before_no;

	assert(range && range->link_no != TABLE_NO_LINK);
	before_no = range->link_no;
	if (range->end > end) {
		struct range after = *range;

		after.start = end;
		after.offset_bytes += end - range->start;
		range->end = end;
		table_add(after);
	}
	if (range->start < start) {
		struct range middle = *range;

		middle.start = start;
		middle.offset_bytes += start - range->start;
		range->end = start;
		table_add(middle);
		range = table_find(start, end);
	}
	range->link_no = link_no;
	range->frames = frames;
	table_links[link_no].nr_ranges++;
	if (--table_links[before_no].nr_ranges == 0)
		link_close(&table_links[before_no]);
	table_update_bounds();
}

static bool is_all_inside(uint16_t link_no, uintptr_t start, uintptr_t end)
{
	for (unsigned i = 0; i < table_nr_ranges; i++)
		if (table_ranges[i].link_no == link_no && (table_ranges[i].start < start || table_ranges[i].end > end))
			return false;
	return true;
}

static void protect_ranges(uint16_t link_no)
{
	for (unsigned i = 0; i < table_nr_ranges; i++)
		if (table_ranges[i].link_no == link_no)
			real_mprotect((void *)table_ranges[i].start, table_ranges[i].end - table_ranges[i].start,
			              PROT_NONE);
}

int table_retire(uintptr_t start, uintptr_t end)
{
	int err = 0;

	for (unsigned i = 0; i < table_nr_ranges;) {
		uint16_t link_no = table_ranges[i].link_no;

		if (table_ranges[i].start >= end || table_ranges[i].end <= start || link_no == TABLE_NO_LINK ||
		    !is_all_inside(link_no, start, end)) {
			i++;
			continue;
		}
		/* Before the farewell, after which nobody serves the pages: a handler of the program that runs while
		   we wait must get SIGSEGV, not wait for ever or read unguarded pages. */
		protect_ranges(link_no);
		orphans_let_go(link_no);
		/* A late answer of the backend must not hit another mapping at this address. */
		err = wire_farewell(table_links[link_no].connection_fd);
		if (err < 0)
			break;
		for (unsigned k = table_nr_ranges; k-- > 0;) {
			struct range range = table_ranges[k];

			if (range.link_no != link_no)
				continue;
			guard_lift(table_links[link_no].uffd, (void *)range.start, range.end - range.start);
			remove_range(k);
		}
		i = 0;
	}
	table_update_bounds();
	return err;
}

struct range *table_find(uintptr_t start, uintptr_t end)
{
	for (unsigned i = 0; i < table_nr_ranges; i++) {
		struct range *range = &table_ranges[i];

		if (range->start <= start && end <= range->end)
			return range;
	}
	return NULL;
}

int *table_find_fd(int fd)
{
	for (unsigned i = 0; i < TABLE_MAX_LINKS; i++) {
		if (table_links[i].nr_ranges == 0)
			continue;
		if (table_links[i].connection_fd == fd)
			return &table_links[i].connection_fd;
		if (table_links[i].uffd == fd)
			return &table_links[i].uffd;
	}
	return NULL;
}

void table_forget_ranges(void)
{
	table_nr_ranges = 0;
	table_update_bounds();
}

void table_drop_links(void)
{
	for (unsigned i = 0; i < TABLE_MAX_LINKS; i++) {
		if (table_links[i].nr_ranges > 0)
			link_close(&table_links[i]);
		table_links[i].nr_ranges = 0;
	}
	table_update_bounds();
}
