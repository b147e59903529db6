/* SPDX-License-Identifier: Apache-2.0 */
/*
 * mremap of guest mappings.  The kernel can move one: the guard and the private pages move along, and the backend gets
 * an event.  It cannot grow one: the new pages would be guarded, but in no region that the backend serves.  So the new
 * part becomes a guest mapping of its own behind the old one.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>

#include "cache/core/abi.h"
#include "transport/core/guest/guard.h"
#include "transport/preload/mapping.h"
#include "transport/preload/process.h"
#include "transport/preload/real.h"
#include "transport/preload/table.h"
#include "transport/preload/config.h"

#define MOVE_TRIES 16

struct wanted {
	uintptr_t start;
	size_t old_length, new_length; /* whole pages */
	int flags;
	uintptr_t target; /* 0 without MREMAP_FIXED */
};

static intptr_t reserve(size_t length)
{
	void *mapped = real_mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

	return mapped == MAP_FAILED ? -errno : (intptr_t)mapped;
}

/* Bytes from start to the end of its range, but not past end; 0 if start is in no range. */
static size_t piece_at(uintptr_t start, uintptr_t end)
{
	const struct range *range = table_find(start, start + 1);

	if (!range)
		return 0;
	return (range->end < end ? range->end : end) - start;
}

/* Whether the ranges from start to end are adjacent in the image too: a grown mapping is one to the program. */
static bool is_one_mapping(uintptr_t start, uintptr_t end)
{
	uint64_t offset_bytes = 0;

	for (uintptr_t at = start; at < end;) {
		size_t piece_bytes = piece_at(at, end);
		const struct range *range = table_find(at, at + 1);

		if (piece_bytes == 0)
			return false;
		if (at > start && range->offset_bytes + (at - range->start) != offset_bytes)
			return false;
		offset_bytes = range->offset_bytes + (at - range->start) + piece_bytes;
		at += piece_bytes;
	}
	return start < end;
}

/*
 * The kernel moves a guarded mapping only in one piece. An open region, which the backend has registered for missing
 * faults only, splits it; once the range is registered for all faults it is one again, and the backend closes the
 * region when it notices. It may open others meanwhile.
 */
static int move_range(const struct range *range, uintptr_t start, size_t length, uintptr_t target)
{
	for (int i = 0; i < MOVE_TRIES; i++) {
		if (real_mremap((void *)start, length, length, MREMAP_MAYMOVE | MREMAP_FIXED, (void *)target) !=
		    MAP_FAILED)
			return 0;
		if (errno != EFAULT || range->link_no == TABLE_NO_LINK)
			break;
		guard_range(table_links[range->link_no].uffd, (void *)start, length);
	}
	return -errno;
}

static int move_piece(uintptr_t start, size_t length, uintptr_t target)
{
	struct range range = *table_find(start, start + length);
	int err = move_range(&range, start, length, target);

	if (err < 0)
		return err;
	table_cut(target, target + length);
	range.offset_bytes += start - range.start;
	range.start = target;
	range.end = target + length;
	/* Add the new range first: a link is closed with its last range. */
	table_add(range);
	table_cut(start, start + length);
	return 0;
}

/* Retires guest mappings at the target first. */
static intptr_t move(uintptr_t start, size_t length, uintptr_t target)
{
	size_t done = 0;

	table_retire(target, target + length);
	while (done < length) {
		size_t piece_bytes = piece_at(start + done, start + length);
		int err = move_piece(start + done, piece_bytes, target + done);

		if (err < 0)
			return err;
		done += piece_bytes;
	}
	return (intptr_t)target;
}

static int cut_off(uintptr_t start, uintptr_t end)
{
	table_retire(start, end);
	if (real_munmap((void *)start, end - start) < 0)
		return -errno;
	table_cut(start, end);
	return 0;
}

/* Maps the image from offset_bytes on, in the way of range, at an address that is free or reserved. */
static intptr_t map_as(const struct range *range, uint64_t offset_bytes, uintptr_t at, size_t length, int how)
{
	int type = range->is_zerocopy ? MAP_SHARED : MAP_PRIVATE;
	struct range tail = *range;
	void *mapped;
	int fd;

	if (mapping_covered(offset_bytes, length) > 0)
		return mapping_make(at, length, range->prot, type | how, offset_bytes);
	/* Past the image's end: an empty file, so that touching it is SIGBUS. */
	fd = memfd_create("cowshed-end", MFD_CLOEXEC);
	if (fd < 0)
		return -errno;
	mapped = real_mmap((void *)at, length, range->prot, MAP_PRIVATE | how, fd, 0);
	real_close(fd);
	if (mapped == MAP_FAILED)
		return -errno;
	/* Only now that the old pages are gone: closing their link takes the guard away. */
	table_cut((uintptr_t)mapped, (uintptr_t)mapped + length);
	tail.start = (uintptr_t)mapped;
	tail.end = tail.start + length;
	tail.offset_bytes = offset_bytes;
	mapping_note_tail(tail);
	return (intptr_t)mapped;
}

static intptr_t grow(const struct wanted *wanted)
{
	uintptr_t old_end = wanted->start + wanted->old_length;
	struct range range = *table_find(old_end - 1, old_end);
	uint64_t added_offset_bytes = range.offset_bytes + (old_end - range.start);
	size_t added = wanted->new_length - wanted->old_length;
	intptr_t target = (intptr_t)wanted->target, at;

	if (!(wanted->flags & MREMAP_FIXED)) {
		at = map_as(&range, added_offset_bytes, old_end, added, MAP_FIXED_NOREPLACE);
		if (at == (intptr_t)old_end)
			return (intptr_t)wanted->start;
		if (at != -EEXIST)
			return at;
		if (!(wanted->flags & MREMAP_MAYMOVE))
			return -ENOMEM;
		target = reserve(wanted->new_length);
		if (target < 0)
			return target;
	}
	at = map_as(&range, added_offset_bytes, (uintptr_t)target + wanted->old_length, added, MAP_FIXED);
	lock_insist();
	if (at >= 0)
		at = move(wanted->start, wanted->old_length, (uintptr_t)target);
	if (at < 0 && !(wanted->flags & MREMAP_FIXED))
		cut_off((uintptr_t)target, (uintptr_t)target + wanted->new_length);
	return at;
}

/* mremap(2) with an old length of 0 maps the same pages a second time; for shared mappings only. */
static intptr_t map_again(const struct wanted *wanted)
{
	struct range range = *table_find(wanted->start, wanted->start + 1);

	if (!range.is_zerocopy)
		return -EINVAL;
	if (!(wanted->flags & MREMAP_MAYMOVE))
		return -ENOMEM;
	return map_as(&range, range.offset_bytes + (wanted->start - range.start), wanted->target, wanted->new_length,
	              wanted->flags & MREMAP_FIXED ? MAP_FIXED : 0);
}

static intptr_t remap(const struct wanted *wanted)
{
	uintptr_t end = wanted->start + wanted->old_length;
	size_t length = wanted->old_length;
	int err;

	if (wanted->flags & MREMAP_DONTUNMAP)
		report("mremap of the image with MREMAP_DONTUNMAP is refused; leave it out, or map the image again");
	if (wanted->new_length == 0 || wanted->start % PAGE_BYTES != 0 || wanted->target % PAGE_BYTES != 0 ||
	    (wanted->flags & ~(MREMAP_MAYMOVE | MREMAP_FIXED)) != 0 ||
	    ((wanted->flags & MREMAP_FIXED) &&
	     (!(wanted->flags & MREMAP_MAYMOVE) || wanted->target + wanted->new_length < wanted->target ||
	      (wanted->target < end && wanted->target + wanted->new_length > wanted->start))))
		return -EINVAL;
	err = table_reserve(16, 0);
	if (err < 0)
		return err;
	if (length == 0)
		return map_again(wanted);
	if (!is_one_mapping(wanted->start, end))
		return -EFAULT;
	if (wanted->new_length > length)
		return grow(wanted);
	lock_insist();
	if (wanted->new_length < length) {
		err = cut_off(wanted->start + wanted->new_length, end);
		if (err < 0)
			return err;
		length = wanted->new_length;
	}
	return wanted->flags & MREMAP_FIXED ? move(wanted->start, length, wanted->target) : (intptr_t)wanted->start;
}

/* mremap of a guest mapping, or onto one. */
static intptr_t remap_any(const struct wanted *wanted, void *address, size_t old_length, size_t new_length,
                          void *new_address)
{
	void *mapped;

	if (table_touches(wanted->start, wanted->start + (wanted->old_length ? wanted->old_length : 1)))
		return remap(wanted);
	mapped = real_mremap(address, old_length, new_length, wanted->flags, new_address);
	if (mapped == MAP_FAILED)
		return -errno;
	if (wanted->flags & MREMAP_FIXED)
		table_cut(wanted->target, wanted->target + wanted->new_length);
	return (intptr_t)mapped;
}

static bool touches(const void *address, size_t length)
{
	uintptr_t start = (uintptr_t)address;

	if (start + length < start || !table_may_touch(start, start + length))
		return false;
	if (process_kind() == PROCESS_IN_MEMORY_OF_ANOTHER)
		return table_touches(start, start + length);
	return table_may_touch(start, start + length);
}

EXPORTED void *mremap(void *address, size_t old_length, size_t new_length, int flags, ...)
{
	struct wanted wanted = {
		.start = (uintptr_t)address,
		.old_length = (old_length + PAGE_BYTES - 1) & ~(size_t)(PAGE_BYTES - 1),
		.new_length = (new_length + PAGE_BYTES - 1) & ~(size_t)(PAGE_BYTES - 1),
		.flags = flags,
	};
	void *new_address = NULL;
	sigset_t signals;
	intptr_t at;

	if (flags & (MREMAP_FIXED | MREMAP_DONTUNMAP)) {
		va_list arguments;

		va_start(arguments, flags);
		new_address = va_arg(arguments, void *);
		va_end(arguments);
	}
	if (flags & MREMAP_FIXED)
		wanted.target = (uintptr_t)new_address;
	if (!config.active || lock_is_inside() ||
	    (!touches(address, wanted.old_length ? wanted.old_length : 1) &&
	     !((flags & MREMAP_FIXED) && touches(new_address, wanted.new_length))))
		return real_mremap(address, old_length, new_length, flags, new_address);
	if (process_kind() == PROCESS_IN_MEMORY_OF_ANOTHER) {
		errno = EPERM;
		return MAP_FAILED;
	}
	lock_take(&signals);
	while ((at = remap_any(&wanted, address, old_length, new_length, new_address)) == -EINTR)
		lock_yield(&signals);
	lock_release(&signals);
	if (at >= 0)
		return (void *)at;
	errno = (int)-at;
	return MAP_FAILED;
}
