/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An image's totals and per-extent arrays, in one memfd that outlives the process.
 *
 * A header states the image's shape and holds the totals; the arrays follow. The process that made the memfd may die at
 * any instruction, so its successor (image_adopt) trusts only what cannot be half done: see arrays_mend.
 */
#ifndef COWSHED_ARRAYS_H
#define COWSHED_ARRAYS_H

#include <stdatomic.h>
#include <stdint.h>

#define ARRAYS_MAGIC 0x3158454453574f43ull /* "COWSDEX1" */
/* cdef-begin */
#define ARRAYS_VERSION 2
/* cdef-end */

/* Each only grows, over restarts too; meanings in struct image_counters. */
struct image_totals {
	_Atomic uint64_t demand_loads, prefetch_loads, load_bytes, load_errors, load_retries, strays;
	_Atomic uint64_t evictions_pressure, evictions_request;
	_Atomic uint64_t nr_touched;
	_Atomic uint64_t reloads, attaches;
	_Atomic uint64_t victim_hits, standby_unmaps, standby_samples, sample_hits; /* 0 from releases before */
	_Atomic uint64_t collapse_failures;                                         /* likewise */
};

struct arrays_header {
	uint64_t magic;
	uint32_t version, extent_pages;
	uint64_t size_bytes, nr_extents;
	uint64_t spare[4];
	struct image_totals totals;
};
_Static_assert(sizeof(struct arrays_header) == 8 * (8 + 16), "other releases read this layout");

struct image;

/* Makes the memfd and maps it, all zero. */
int arrays_create(struct image *image);
/* Maps a memfd that another process left; takes it over on success.  -EBADMSG: not one of this image's shape. */
int arrays_adopt(struct image *image, int arrays_fd);
void arrays_close(struct image *image);
/*
 * Makes the arrays true again; must run before anything else uses the image. Drops all holds, punches extents that were
 * LOADING or EVICTING, and keeps RESIDENT ones as far as their room is at most max_room, or those that are lent, if
 * these take more. Accounts count grants and loans anew as they are adopted. Returns the room of those that are
 * resident, or -errno.
 */
int64_t arrays_mend(struct image *image, uint64_t max_room);

#endif
