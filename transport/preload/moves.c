/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Moves the mappings of somebody else's program, link by link.  The lock is held, so that meanwhile none is made, moved
 * or forked.  The steps are those of the guest library (transport/core/guest/follow.c), but for parts of the image, as
 * the program has cut and protected them:
 *
 *   1. the target opens each part;
 *   2. its frames are mapped elsewhere, PROT_NONE, MADV_DONTFORK, guarded;
 *   3. the old backend confirms that it answers no more;
 *   4. pages that are open for writing are protected, private pages copied over (carry.c), protections set as before;
 *   5. the new mappings replace the old ones, in one step for each mapping of the kernel's (guest/replace.c);
 *   6. the target takes the part on, with its private pages.
 *
 * A failure before step 3 changes nothing, and the old backend serves on.  From step 3 to 6 nobody answers faults: an
 * access to an absent page, or a write to a protected one, waits; mapped pages can be read, and are right.  After a
 * later failure the next call goes on: a part whose new mapping is in place, but not taken on, then counts as an old
 * one that was left.
 *
 * No fault handler is active while pages are copied: the old backend has confirmed, or has ended without a successor,
 * and this waits for a target that may have taken a part on until it answers or is gone.
 */
#define _GNU_SOURCE
#include "transport/preload/moves.h"

#include <errno.h>
#include <stdatomic.h>
#include <string.h>

#include "cache/core/abi.h"
#include "transport/core/guest/guard.h"
#include "transport/core/guest/region.h"
#include "transport/preload/carry.h"
#include "transport/preload/leave.h"
#include "transport/preload/mapping.h"
#include "transport/preload/orphans.h"
#include "transport/preload/real.h"
#include "transport/preload/config.h"
#include "transport/preload/wire.h"

#define MAX_PARTS 64
#define NO_LEAVE ((struct leave){.connection_fd = -1, .memfd = -1, .uffd = -1})

/* Adjacent areas of a range; they become one mapping of the target's. */
struct part {
	struct range range;
	unsigned first_area, nr_areas;
	struct leave leave;
	uintptr_t at; /* where the target's frames are mapped for now; 0: nowhere */
};

/* The target; the thread's alone. */
static char target_path[sizeof(config.socket_path)];
static char target_digest[sizeof(leave_digest)];

static struct part parts[MAX_PARTS];
static unsigned nr_parts;
static struct area areas[MAX_PARTS + CARRY_MAX_AREAS];
static unsigned nr_areas;

bool moves_hear(struct json event)
{
	char what[16], uri[200];

	if (!json_text(event, "event", what, sizeof(what)) || strcmp(what, "moved") != 0)
		return false;
	if (json_is_true(event, "carries") && wire_take_path(event, target_path)) {
		json_text(event, "digest", target_digest, sizeof(target_digest));
		return true;
	}
	json_text(event, "uri", uri, sizeof(uri));
	if (atomic_exchange(&leave_is_nowhere, true))
		return false;
	report("this program's guest moved to %s, where this program cannot follow: pages in its memory can be read, "
	       "writes wait; end it, and start it again there",
	       uri[0] ? uri : "another backend or into a file");
	return false;
}

/* Finds the areas of a range, and joins adjacent ones into parts. */
static int add_parts(const struct range *range)
{
	unsigned end = nr_areas;
	int nr = nr_areas + CARRY_MAX_AREAS > sizeof(areas) / sizeof(areas[0]) ? -E2BIG
	                                                                       : carry_areas(range, areas + nr_areas);

	if (nr < 0)
		return nr;
	end += (unsigned)nr;
	while (nr_areas < end) {
		struct part *part = &parts[nr_parts];
		uintptr_t start = areas[nr_areas].start;

		if (nr_parts == MAX_PARTS)
			return -E2BIG;
		nr_parts++;
		*part = (struct part){.range = *range, .first_area = nr_areas, .leave = NO_LEAVE};
		part->range.start = start;
		part->range.offset_bytes += start - range->start;
		do
			part->range.end = areas[nr_areas++].end;
		while (nr_areas < end && areas[nr_areas].start == part->range.end);
		part->nr_areas = nr_areas - part->first_area;
	}
	return 0;
}

static int find_parts(unsigned link_no)
{
	int err = 0;

	nr_parts = nr_areas = 0;
	for (unsigned i = 0; err == 0 && i < table_nr_ranges; i++)
		if (table_ranges[i].link_no == link_no)
			err = add_parts(&table_ranges[i]);
	if (err == 0)
		err = table_reserve(2 * nr_areas, nr_parts);
	if (err < 0)
		report("its mappings are too many, or in too many pieces (%s)", strerrordesc_np(-err));
	return err;
}

/* Unmaps what the program has not seen yet. */
static void drop(int uffd, uintptr_t at, size_t nr_bytes)
{
	real_mprotect((void *)at, nr_bytes, PROT_NONE);
	guard_lift(uffd, (void *)at, nr_bytes);
	real_munmap((void *)at, nr_bytes);
}

static void close_parts(void)
{
	for (unsigned i = 0; i < nr_parts; i++) {
		struct part *part = &parts[i];

		if (part->at)
			drop(part->leave.uffd, part->at, part->range.end - part->range.start);
		leave_close(&part->leave);
	}
	nr_parts = 0;
}

/* Maps no page yet, and PROT_NONE instead of the protections of the part's areas. */
static int map_elsewhere(struct part *part)
{
	size_t nr_bytes = part->range.end - part->range.start;
	void *mapped = real_mmap(NULL, nr_bytes, PROT_NONE, MAP_PRIVATE | MAP_NORESERVE, part->leave.memfd,
	                         (off_t)part->range.offset_bytes);

	if (mapped == MAP_FAILED)
		return -errno;
	part->at = (uintptr_t)mapped;
	/* After mlockall(MCL_FUTURE), moving it would wait for every page of it. */
	munlock(mapped, nr_bytes);
	if (real_madvise(mapped, nr_bytes, MADV_DONTFORK) < 0)
		return -errno;
	return guard_range(part->leave.uffd, mapped, nr_bytes);
}

static int open_parts(void)
{
	int err = 0;

	for (unsigned i = 0; err == 0 && i < nr_parts; i++)
		err = leave_ask(&parts[i].leave, parts[i].range.offset_bytes, parts[i].range.end - parts[i].range.start,
		                parts[i].range.read_only, "");
	/* Without this feature a mapping that is moved loses its guard. */
	for (unsigned i = 0; err == 0 && i < nr_parts; i++)
		err = parts[i].leave.features & UFFD_FEATURE_EVENT_REMAP ? map_elsewhere(&parts[i]) : -EPROTO;
	/* The target was drained, too, before we came. */
	if (err == -EREMCHG)
		memcpy(target_path, wire_moved_to, sizeof(target_path));
	wire_report_gone(err);
	return err;
}

/* Opens a part anew: the target keeps it open for some seconds only, and copying may have taken longer. */
static int open_again(struct part *part)
{
	struct leave fresh;
	int err = leave_ask(&fresh, part->range.offset_bytes, part->range.end - part->range.start,
	                    part->range.read_only, "");

	if (err < 0) {
		wire_report_gone(err);
		return err;
	}
	if (fresh.frames.inode == part->leave.frames.inode && fresh.frames.device == part->leave.frames.device) {
		int before = part->leave.connection_fd;

		part->leave.connection_fd = fresh.connection_fd;
		fresh.connection_fd = before;
	} else {
		err = -ESTALE;
	}
	leave_close(&fresh);
	return err;
}

/* Copies the private pages onto the target's frames, and protects these as the part is. */
static int fill(const struct part *part, int old_uffd)
{
	int err = 0;

	for (unsigned i = 0; err == 0 && i < part->nr_areas; i++) {
		const struct area *area = &areas[part->first_area + i];
		uintptr_t at = part->at + (area->start - part->range.start);

		err = carry_freeze(old_uffd, area);
		if (err == 0)
			err = carry_private(area, part->leave.uffd, at);
		if (err == 0 && real_mprotect((void *)at, area->end - area->start, area->prot) < 0)
			err = -errno;
	}
	return err;
}

/* Swaps one mapping of the kernel's after the other; each belongs to the new link once it is in place. */
static int swap_areas(struct part *part, int old_uffd, uint16_t link_no)
{
	uintptr_t from = part->at;
	int err = 0;

	part->at = 0;
	for (unsigned i = 0; i < part->nr_areas; i++) {
		const struct area *area = &areas[part->first_area + i];
		uint64_t nr_bytes = area->end - area->start;
		uintptr_t at = from + (area->start - part->range.start);
		struct region old = {.address = (void *)area->start, .map_bytes = nr_bytes, .uffd = old_uffd};
		struct region new = {.address = (void *)at, .map_bytes = nr_bytes, .uffd = table_links[link_no].uffd};

		if (err == 0)
			err = region_swap(&old, &new);
		if (err == 0) {
			table_reassign(area->start, area->end, link_no, part->leave.frames);
			continue;
		}
		drop(new.uffd, at, nr_bytes);
	}
	return err;
}

static int take_part(struct part *part, unsigned old_link_no)
{
	int old_uffd = table_links[old_link_no].uffd;
	int err = fill(part, old_uffd);
	struct leave used;
	uint16_t link_no;

	if (err == 0)
		err = open_again(part);
	if (err < 0)
		return err;
	used = part->leave;
	link_no = table_add_link(part->leave.connection_fd, part->leave.uffd);
	used.connection_fd = table_links[link_no].connection_fd;
	used.uffd = table_links[link_no].uffd;
	part->leave.connection_fd = part->leave.uffd = -1;
	err = swap_areas(part, old_uffd, link_no);
	if (table_links[link_no].nr_ranges == 0) {
		leave_close(&(struct leave){.connection_fd = used.connection_fd, .memfd = -1, .uffd = used.uffd});
		return err;
	}
	orphans_leave(link_no);
	if (err < 0)
		return err;
	lock_be_patient(true);
	err = leave_use(&used, part->range.start, part->range.end - part->range.start, true);
	lock_be_patient(false);
	wire_report_gone(err);
	if (err == 0)
		orphans_take_on(link_no);
	return err;
}

/* Ranges past the image's end are SIGBUS anyway, and must not keep the old frames in memory. */
static void invalidate_tails(struct frames frames)
{
	for (unsigned i = 0; i < table_nr_ranges; i++) {
		const struct range *range = &table_ranges[i];

		if (range->link_no == TABLE_NO_LINK && carry_is_any(range->start, range->end, frames))
			mapping_invalidate(range);
	}
}

/* Forgets ranges where the program has mapped something else by calls that no hook saw. */
static void forget_rest(unsigned link_no)
{
	for (unsigned i = 0; i < table_nr_ranges;) {
		if (table_ranges[i].link_no == link_no) {
			table_cut(table_ranges[i].start, table_ranges[i].end);
			i = 0;
		} else {
			i++;
		}
	}
}

static int take_parts(unsigned link_no)
{
	struct frames before = {0, 0};
	int err = 0;

	for (unsigned i = 0; err == 0 && i < nr_parts; i++) {
		before = parts[i].range.frames;
		err = take_part(&parts[i], link_no);
	}
	if (err < 0)
		return err;
	if (table_links[link_no].nr_ranges > 0)
		forget_rest(link_no);
	invalidate_tails(before);
	return 0;
}

const char *moves_target(void)
{
	return target_path;
}

int moves_take(unsigned link_no, bool was_left)
{
	char home[sizeof(config.socket_path)];
	int err = find_parts(link_no);

	if (err < 0)
		return err;
	memcpy(home, config.socket_path, sizeof(home));
	memcpy(leave_digest, target_digest, sizeof(leave_digest));
	memcpy(config.socket_path, target_path, sizeof(config.socket_path));
	err = carry_check();
	if (err == 0)
		err = open_parts();
	if (err == 0 && !was_left)
		err = wire_leave(table_links[link_no].connection_fd);
	if (err == 0) {
		orphans_leave(link_no);
		err = take_parts(link_no);
	} else {
		memcpy(config.socket_path, home, sizeof(home));
	}
	if (err < 0 && !report_kept()[0])
		report("%s", strerrordesc_np(-err));
	close_parts();
	return err;
}
