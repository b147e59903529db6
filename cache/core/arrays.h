/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What is known of an image's extents, and what was ever done for it: one memfd, so that it outlives the process.
 *
 * A header says what the memfd describes; totals and arrays follow it.  The process that made it may die at any
 * instruction, so who adopts it (image_adopt) believes only what cannot be half done: see arrays_mend.
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
	uint64_t spare[5];
};

struct arrays_header {
	uint64_t magic;
	uint32_t version, extent_pages;
	uint64_t size_bytes, nr_extents;
	uint64_t spare[4];
	struct image_totals totals;
};
_Static_assert(sizeof(struct arrays_header) == 8 * (8 + 16), "the layout is shared with those who come after");

struct image;

/* Makes the memfd and maps it, all zero. */
int arrays_create(struct image *image);
/* Maps a memfd that another process left; takes it over on success.  -EBADMSG: not one of this image's shape. */
int arrays_adopt(struct image *image, int arrays_fd);
void arrays_close(struct image *image);
/*
 * Before anybody else uses the image: makes the arrays true again.  Holds died with who held them.  A load or an
 * eviction in hand is undone by punching the extent; of the resident ones, at most nr_max stay.  Grants
 * and loans are counted anew by the accounts, as they are adopted.  How many extents are resident, or -errno.
 */
int64_t arrays_mend(struct image *image, uint64_t nr_max);

#endif
