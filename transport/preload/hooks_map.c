/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Hooks for the C library's mapping calls.  Calls that concern the image or a guest mapping are served here; all others
 * pass through, at the cost of a comparison (and an fstat for a new mapping of a file).
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <sys/syscall.h>

#include "cache/core/abi.h"
#include "transport/preload/mapping.h"
#include "transport/preload/process.h"
#include "transport/preload/real.h"
#include "transport/preload/table.h"
#include "transport/preload/config.h"

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif
#ifndef MADV_DONTNEED_LOCKED
#define MADV_DONTNEED_LOCKED 24
#endif
#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ 22
#endif

#define POPULATE_BYTES ((uint64_t)4 << 20)

/* Flags of mmap that have no effect here, or that this library implements itself. */
#define SERVED_FLAGS                                                                                             \
	(MAP_TYPE | MAP_FIXED | MAP_FIXED_NOREPLACE | MAP_NORESERVE | MAP_POPULATE | MAP_NONBLOCK | MAP_LOCKED | \
	 MAP_DENYWRITE | MAP_EXECUTABLE | MAP_STACK | MAP_32BIT)

static uintptr_t page_up(uintptr_t address)
{
	return (address + PAGE_BYTES - 1) & ~(uintptr_t)(PAGE_BYTES - 1);
}

/* Whether the C library's call may go straight to the kernel. */
static bool is_elsewhere(const void *address, size_t length)
{
	uintptr_t start = (uintptr_t)address, end = page_up(start + length);

	if (!config.active || lock_is_inside() || start + length < start || !table_may_touch(start, end))
		return true;
	if (process_kind() == PROCESS_IN_MEMORY_OF_ANOTHER)
		return !table_touches(start, end);
	return !table_may_touch(start, end); /* process_kind may have found that it has none of them */
}

/* A child of vfork must not change its parent's mappings: the table would not record it. */
static bool is_anothers(void)
{
	return process_kind() == PROCESS_IN_MEMORY_OF_ANOTHER;
}

static int failed(int err)
{
	errno = -err;
	return -1;
}

/* Passes on errors that programs expect of mmap; all others become ENODEV, after which some read the file instead. */
static void *mapping_failed(intptr_t err)
{
	switch (err) {
	case -EACCES:
	case -EINVAL:
	case -ENOMEM:
	case -EEXIST:
	case -EPERM:
	case -EMFILE:
	case -ENFILE:
	case -EAGAIN:
	case -EOPNOTSUPP:
		errno = (int)-err;
		break;
	default:
		errno = ENODEV;
	}
	return MAP_FAILED;
}

static int check_wanted(int prot, int flags)
{
	int type = flags & MAP_TYPE;

	if (type != MAP_PRIVATE && type != MAP_SHARED && type != MAP_SHARED_VALIDATE)
		return -EINVAL;
	if (type != MAP_PRIVATE && (prot & PROT_WRITE)) {
		report("a shared, writable mapping of the image is refused: other guests share its pages; map it "
		       "MAP_PRIVATE (QEMU: share=off), or read-only");
		return -EACCES;
	}
	if (config.read_only && (prot & PROT_WRITE)) {
		report("a writable mapping of the image is refused: it is attached with --read-only");
		return -EACCES;
	}
	if (flags & ~SERVED_FLAGS) {
		report("a mapping of the image with flags %#x is refused: %#x cannot be served (such as "
		       "MAP_HUGETLB, MAP_SYNC, MAP_GROWSDOWN); leave them out",
		       (unsigned)flags, (unsigned)(flags & ~SERVED_FLAGS));
		return -EOPNOTSUPP;
	}
	return 0;
}

/* In parts, so that signal handlers run in between. As in mmap(2), a failure is no error. */
static void populate(uintptr_t start, uint64_t nr_bytes)
{
	for (uint64_t done = 0; done < nr_bytes; done += POPULATE_BYTES) {
		uint64_t left = nr_bytes - done;

		if (real_madvise((void *)(start + done), left < POPULATE_BYTES ? left : POPULATE_BYTES,
		                 MADV_POPULATE_READ) < 0)
			return;
	}
}

/* mmap of the image's source. Populating waits for the backend, so it comes last, outside the lock. */
static void *map_image(void *address, size_t length, int prot, int flags, off_t offset)
{
	uint64_t covered;
	sigset_t signals;
	intptr_t at;
	int err = check_wanted(prot, flags);

	if (err < 0)
		return mapping_failed(err);
	length = page_up(length);
	if (length == 0 || offset < 0 || offset % PAGE_BYTES != 0 || (uintptr_t)address + length < (uintptr_t)address ||
	    ((flags & MAP_FIXED) && (uintptr_t)address % PAGE_BYTES != 0))
		return mapping_failed(-EINVAL);
	covered = mapping_covered((uint64_t)offset, length);
	lock_take(&signals);
	while ((at = mapping_make((uintptr_t)address, length, prot, flags, (uint64_t)offset)) == -EINTR)
		lock_yield(&signals);
	lock_release(&signals);
	if (at < 0)
		return mapping_failed(at);
	if (config.populate || ((flags & MAP_POPULATE) && !(flags & MAP_NONBLOCK)))
		populate((uintptr_t)at, covered);
	if (flags & MAP_LOCKED)
		mlock((void *)at, covered);
	return (void *)at;
}

EXPORTED void *mmap64(void *address, size_t length, int prot, int flags, int fd, off_t offset)
{
	struct stat status;
	sigset_t signals;
	void *mapped;

	if (!config.active || lock_is_inside())
		return real_mmap(address, length, prot, flags, fd, offset);
	/* A mapping that begins past the image's end is all SIGBUS in the source, too: leave it to the kernel. */
	if (!(flags & MAP_ANONYMOUS) && fd >= 0 && fstat(fd, &status) == 0 && config_is_image(&status) &&
	    (uint64_t)offset < config.map_bytes && process_kind() == PROCESS_OWN)
		return map_image(address, length, prot, flags, offset);
	if (!(flags & MAP_FIXED) || is_elsewhere(address, length))
		return real_mmap(address, length, prot, flags, fd, offset);
	if (is_anothers())
		return mapping_failed(-EPERM);
	/* The call replaces a guest mapping. The kernel notifies its backend. */
	lock_take(&signals);
	mapped = MAP_FAILED;
	errno = ENOMEM;
	if (table_reserve(1, 0) == 0)
		mapped = real_mmap(address, length, prot, flags, fd, offset);
	if (mapped != MAP_FAILED)
		table_cut((uintptr_t)address, page_up((uintptr_t)address + length));
	lock_release(&signals);
	return mapped;
}

EXPORTED void *mmap(void *address, size_t length, int prot, int flags, int fd, off_t offset)
	__attribute__((alias("mmap64")));

/* The caller must hold the lock; whole pages. */
static int unmap(uintptr_t start, uintptr_t end)
{
	int err = table_reserve(1, 0);

	if (err < 0)
		return err;
	err = table_retire(start, end);
	if (err < 0)
		return err;
	if (real_munmap((void *)start, end - start) < 0)
		return -errno;
	table_cut(start, end);
	return 0;
}

EXPORTED int munmap(void *address, size_t length)
{
	uintptr_t start = (uintptr_t)address;
	sigset_t signals;
	int err;

	if (is_elsewhere(address, length) || start % PAGE_BYTES != 0 || length == 0)
		return real_munmap(address, length);
	if (is_anothers())
		return failed(-EPERM);
	lock_take(&signals);
	while ((err = unmap(start, page_up(start + length))) == -EINTR)
		lock_yield(&signals);
	lock_release(&signals);
	return err < 0 ? failed(err) : 0;
}

/* pkey: as for pkey_mprotect; -1: none is named. */
static int really_protect(void *address, size_t length, int prot, int pkey)
{
	return pkey == -1 ? real_mprotect(address, length, prot)
	                  : (int)syscall(SYS_pkey_mprotect, address, length, prot, pkey);
}

static int protect(void *address, size_t length, int prot, int pkey)
{
	uintptr_t start = (uintptr_t)address, end = page_up(start + length);
	sigset_t signals;
	int result;

	if (is_elsewhere(address, length))
		return really_protect(address, length, prot, pkey);
	if (is_anothers())
		return failed(-EPERM);
	lock_take(&signals);
	for (unsigned i = 0; (prot & PROT_WRITE) && i < table_nr_ranges; i++) {
		const struct range *range = &table_ranges[i];

		if (config.read_only && start < range->end && end > range->start) {
			lock_release(&signals);
			report("PROT_WRITE is refused: the image is attached with --read-only");
			return failed(-EACCES);
		}
		if (!range->is_zerocopy || start >= range->end || end <= range->start)
			continue;
		lock_release(&signals);
		report("PROT_WRITE is refused for a MAP_SHARED mapping of the image: other guests share its pages; "
		       "map it MAP_PRIVATE");
		return failed(-EACCES);
	}
	if (prot & PROT_WRITE) {
		while ((result = mapping_make_writable(start, end)) == -EINTR)
			lock_yield(&signals);
		if (result < 0) {
			lock_release(&signals);
			return failed(result);
		}
	}
	result = really_protect(address, length, prot, pkey);
	for (unsigned i = 0; result == 0 && i < table_nr_ranges; i++)
		if (start <= table_ranges[i].start && end >= table_ranges[i].end)
			table_ranges[i].prot = prot;
	lock_release(&signals);
	return result;
}

EXPORTED int mprotect(void *address, size_t length, int prot)
{
	return protect(address, length, prot, -1);
}

EXPORTED int pkey_mprotect(void *address, size_t length, int prot, int pkey)
{
	return protect(address, length, prot, pkey);
}

/* Takes the lock: a move in progress might carry over the pages that this drops. */
static int give_back(void *address, size_t length, int advice)
{
	sigset_t signals;
	int result;

	lock_take(&signals);
	result = real_madvise(address, length, advice);
	lock_release(&signals);
	return result;
}

EXPORTED int madvise(void *address, size_t length, int advice)
{
	uintptr_t start = (uintptr_t)address, end = page_up(start + length);
	sigset_t signals;
	int result;

	if (is_elsewhere(address, length))
		return real_madvise(address, length, advice);
	if (is_anothers())
		return failed(-EPERM);
	switch (advice) {
	case MADV_HUGEPAGE: /* frames come as pages */
		return 0;
	case MADV_COLLAPSE:
		return failed(-EINVAL);
	case MADV_DOFORK:
	case MADV_DONTFORK:
		break;
	case MADV_DONTNEED:
	case MADV_DONTNEED_LOCKED:
		return give_back(address, length, advice);
	default:
		return real_madvise(address, length, advice);
	}
	lock_take(&signals);
	result = real_madvise(address, length, advice);
	for (unsigned i = 0; i < table_nr_ranges; i++) {
		struct range *range = &table_ranges[i];

		if (start >= range->end || end <= range->start)
			continue;
		if (range->link_no == TABLE_NO_LINK) {
			range->no_fork = advice == MADV_DONTFORK;
			continue;
		}
		/* For the kernel, guarded ranges are DONTFORK except during a fork; see forks.c. */
		real_madvise((void *)range->start, range->end - range->start, MADV_DONTFORK);
		if (start <= range->start && end >= range->end)
			range->no_fork = advice == MADV_DONTFORK;
	}
	lock_release(&signals);
	return result;
}
