/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Makes guest mappings.  No instruction of the program may find a page of the frames unguarded: it
 * would read zeros, silently.  So a new mapping is PROT_NONE until all of this has been done, in this order:
 *
 *   the backend has opened the image for us, a userfaultfd is there;
 *   mmap of the frames, PROT_NONE (in a process that did mlockall(MCL_FUTURE), mmap touches every page of
 *   what it may read), without MAP_POPULATE and MAP_LOCKED;
 *   MADV_DONTFORK: a child made by a bare clone(2) finds nothing there;
 *   UFFDIO_REGISTER; the backend has taken the range on;
 *   mprotect to what was asked for.
 *
 * After fork the child has copies of the page-table entries, without the guard.  It keeps its private
 * pages as of the fork; they are the kernel's own copy-on-write from there.  All others are dropped,
 * so that the child takes them from the backend anew.
 */
#define _GNU_SOURCE
#include "transport/preload/mapping.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#include "cache/core/abi.h"
#include "transport/core/guest/guard.h"
#include "transport/preload/carry.h"
#include "transport/preload/leave.h"
#include "transport/preload/orphans.h"
#include "transport/preload/real.h"
#include "transport/preload/config.h"
#include "transport/preload/wire.h"

#define HUGE_BYTES ((uint64_t)2 << 20)
#define KEPT_FLAGS (MAP_FIXED | MAP_FIXED_NOREPLACE | MAP_32BIT)

uint64_t mapping_covered(uint64_t offset_bytes, size_t length)
{
	uint64_t left = offset_bytes < config.map_bytes ? config.map_bytes - offset_bytes : 0;

	return length < left ? length : left;
}

/* Undoes a mapping that failed. The program may have reserved a MAP_FIXED target, and must not find zeros there. */
static void give_up(uintptr_t address, size_t length, int uffd, uint64_t guarded_bytes, bool was_fixed)
{
	real_mprotect((void *)address, length, PROT_NONE);
	guard_lift(uffd, (void *)address, guarded_bytes);
	if (was_fixed)
		real_mmap((void *)address, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
		          -1, 0);
	else
		real_munmap((void *)address, length);
}

/* Ends old guest mappings there first: their handlers must be done with these addresses. */
static int clear_target(uintptr_t address, size_t length)
{
	uintptr_t end = address + length;
	void *reserved;

	if (!table_touches(address, end))
		return 0;
	/* The program must not run while there is neither the old mapping nor the new. */
	lock_insist();
	table_retire(address, end);
	reserved = real_mmap((void *)address, length, PROT_NONE,
	                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
	if (reserved == MAP_FAILED)
		return -errno;
	table_cut(address, end);
	return 0;
}

/*
 * Where the program leaves the address to the kernel and can use it: one that is congruent to the offset modulo 2 MiB,
 * where an open region takes one page-table entry.
 */
static void *map_aligned(void *address, size_t length, int flags, int fd, uint64_t offset_bytes)
{
	const int kind = MAP_PRIVATE | MAP_NORESERVE;

	if (!address && !flags && length >= HUGE_BYTES) {
		char *reserved = real_mmap(NULL, length + HUGE_BYTES, PROT_NONE, kind | MAP_ANONYMOUS, -1, 0);

		if (reserved != MAP_FAILED) {
			uint64_t before = (offset_bytes - (uintptr_t)reserved) % HUGE_BYTES;

			if (before)
				real_munmap(reserved, before);
			real_munmap(reserved + before + length, HUGE_BYTES - before);
			address = reserved + before;
			flags = MAP_FIXED;
		}
	}
	void *mapped = real_mmap(address, length, PROT_NONE, kind | flags, fd, (off_t)offset_bytes);

	if (mapped == MAP_FAILED && flags == MAP_FIXED && address) {
		int err = errno;

		real_munmap(address, length);
		errno = err;
	}
	return mapped;
}

static intptr_t map_guarded(const struct leave *leave, uintptr_t address, size_t length, int prot, int flags,
                            uint64_t offset_bytes)
{
	uint64_t guarded_bytes = mapping_covered(offset_bytes, length);
	uintptr_t at;
	void *mapped;
	int err;

	mapped = map_aligned((void *)address, length, flags & KEPT_FLAGS, leave->memfd, offset_bytes);
	if (mapped == MAP_FAILED)
		return -errno;
	at = (uintptr_t)mapped;
	err = real_madvise(mapped, guarded_bytes, MADV_DONTFORK) < 0 ? -errno : 0;
	if (err == 0)
		err = guard_range(leave->uffd, mapped, guarded_bytes);
	if (err < 0)
		report("no mapping of the image: the kernel does not guard it by userfaultfd (%s); use Linux 6.7 "
		       "or newer",
		       strerrordesc_np(-err));
	if (err == 0)
		err = leave_use(leave, at, guarded_bytes, false);
	if (err == 0 && real_mprotect(mapped, length, prot) < 0)
		err = -errno;
	if (err < 0) {
		give_up(at, length, leave->uffd, guarded_bytes, (flags & MAP_FIXED) != 0);
		return err;
	}
	return (intptr_t)at;
}

static intptr_t make_once(struct leave *leave, uintptr_t address, size_t length, int prot, int flags,
                          uint64_t offset_bytes)
{
	intptr_t at = leave_find(leave, offset_bytes, mapping_covered(offset_bytes, length), !(prot & PROT_WRITE),
	                         table_nr_ranges > 0);

	if (at < 0)
		return at;
	if (flags & MAP_FIXED)
		at = clear_target(address, length);
	if (at == 0)
		at = map_guarded(leave, address, length, prot, flags, offset_bytes);
	if (at < 0)
		leave_close(leave);
	return at;
}

intptr_t mapping_make(uintptr_t address, size_t length, int prot, int flags, uint64_t offset_bytes)
{
	struct leave leave;
	struct range range;
	intptr_t at = table_reserve(3, 1);

	if (at < 0) {
		report("no mapping of the image: this process has %u already; unmap some", TABLE_MAX_LINKS);
		return at;
	}
	at = -EPIPE;
	for (int i = 0; i < WIRE_TRIES && wire_is_gone((int)at); i++)
		at = make_once(&leave, address, length, prot, flags, offset_bytes);
	if (at < 0 && at > -4096) {
		wire_report_gone((int)at);
		return at;
	}
	real_close(leave.memfd);
	range = (struct range){
		.start = (uintptr_t)at,
		.end = (uintptr_t)at + mapping_covered(offset_bytes, length),
		.offset_bytes = offset_bytes,
		.prot = prot,
		.link_no = table_add_link(leave.connection_fd, leave.uffd),
		.read_only = !(prot & PROT_WRITE),
		.is_zerocopy = (flags & MAP_TYPE) != MAP_PRIVATE,
		.frames = leave.frames,
	};
	table_add(range);
	range.offset_bytes += range.end - range.start;
	range.start = range.end;
	range.end = (uintptr_t)at + length;
	if (range.start < range.end)
		mapping_note_tail(range);
	return at;
}

void mapping_note_tail(struct range tail)
{
	tail.link_no = TABLE_NO_LINK;
	table_add(tail);
}

static int drop(uintptr_t start, uintptr_t end)
{
	if (start < end && real_madvise((void *)start, end - start, MADV_DONTNEED) < 0)
		return -errno;
	return 0;
}

/* Drops every page from the page tables that is not this process's own copy. */
static int drop_shared_pages(const struct range *range)
{
	static struct page_region found[512];
	int fd = real_openat(AT_FDCWD, "/proc/self/pagemap", O_RDONLY | O_CLOEXEC, 0);
	uintptr_t done = range->start;
	struct pm_scan_arg scan = {
		.size = sizeof(scan),
		.start = range->start,
		.end = range->end,
		.vec = (uintptr_t)found,
		.vec_len = sizeof(found) / sizeof(found[0]),
		.category_inverted = PAGE_IS_FILE,
		.category_mask = PAGE_IS_FILE,
		.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
		.return_mask = PAGE_IS_FILE,
	};
	int err = fd < 0 ? -errno : 0;

	while (err == 0 && scan.start < range->end) {
		int nr_found = ioctl(fd, PAGEMAP_SCAN, &scan);

		if (nr_found < 0)
			err = -errno;
		for (int i = 0; err == 0 && i < nr_found; i++) {
			err = drop(done, found[i].start);
			done = found[i].end;
		}
		scan.start = scan.walk_end;
	}
	if (err == 0)
		err = drop(done, range->end);
	if (fd >= 0)
		real_close(fd);
	return err;
}

/* Maps an empty file. */
void mapping_invalidate(const struct range *range)
{
	size_t nr_bytes = range->end - range->start;
	int fd = memfd_create("cowshed-lost", MFD_CLOEXEC);
	void *mapped = MAP_FAILED;

	if (fd >= 0) {
		mapped = real_mmap((void *)range->start, nr_bytes, range->prot, MAP_PRIVATE | MAP_FIXED, fd, 0);
		real_close(fd);
	}
	if (mapped == MAP_FAILED)
		real_munmap((void *)range->start, nr_bytes);
}

/* Guards a range in place, with the pages that it was inherited with. */
static int guard_inherited(const struct leave *leave, const struct range *range)
{
	uint64_t nr_bytes = range->end - range->start;
	void *address = (void *)range->start;
	int err = guard_range(leave->uffd, address, nr_bytes);

	if (err == 0)
		err = real_madvise(address, nr_bytes, MADV_DONTFORK) < 0 ? -errno : 0;
	return err;
}

static int inherit_once(struct leave *leave, struct range *range)
{
	uint64_t nr_bytes = range->end - range->start;
	int err = leave_find(leave, range->offset_bytes, nr_bytes, range->read_only, true);

	if (err < 0)
		return err;
	/* The parent mapped it from a backend that the guest has left: its frames are not the ones served now. */
	if (leave->frames.inode != range->frames.inode || leave->frames.device != range->frames.device)
		err = carry_inherited(leave, range);
	else
		err = guard_inherited(leave, range);
	if (err == 0)
		err = leave_use(leave, range->start, nr_bytes, true);
	if (err < 0)
		leave_close(leave);
	return err;
}

void mapping_inherit(struct range range)
{
	struct leave leave;
	int err = drop_shared_pages(&range);

	if (err == 0)
		err = inherit_once(&leave, &range);
	for (int i = 1; i < WIRE_TRIES && wire_is_gone(err); i++)
		err = inherit_once(&leave, &range);
	if (err < 0) {
		wire_report_gone(err);
		mapping_invalidate(&range);
		report("forked process %d is without the image that its parent mapped (%s): touching it is SIGBUS",
		       getpid(), strerrordesc_np(-err));
		return;
	}
	real_close(leave.memfd);
	range.link_no = table_add_link(leave.connection_fd, leave.uffd);
	table_add(range);
}

int mapping_make_writable(uintptr_t start, uintptr_t end)
{
	for (unsigned i = 0; i < table_nr_ranges; i++) {
		struct range *range = &table_ranges[i];

		if (!range->read_only || start >= range->end || end <= range->start)
			continue;
		if (range->link_no != TABLE_NO_LINK) {
			orphans_ask(range->link_no, true);
			int err = wire_make_writable(table_links[range->link_no].connection_fd, orphans_hear,
			                             range->link_no);
			orphans_ask(range->link_no, false);

			if (err < 0)
				return err;
		}
		for (unsigned j = 0; j < table_nr_ranges; j++)
			if (table_ranges[j].link_no == range->link_no)
				table_ranges[j].read_only = false;
	}
	return 0;
}
