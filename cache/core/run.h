/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A run: neighbouring extents that one thread fills, and how it ends: published, or failed.
 *
 * Loaders fill runs from a file or from the standby list, fetch threads from what an origin sent.
 */
#ifndef COWSHED_RUN_H
#define COWSHED_RUN_H

#include "cache/core/abi.h"
#include "cache/core/image.h"
#include "cache/core/standby.h"

/* The most bytes that one read asks for, unless one extent is larger. */
#define LOAD_CHUNK_BYTES (1u << 20)
/* The most extents in one run: LOAD_CHUNK_BYTES of one-page extents. */
#define RUN_MAX (LOAD_CHUNK_BYTES / PAGE_BYTES)

/* All of it is from the source, or all from the standby list. */
struct run {
	struct image *image;
	uint64_t first, nr;
	slot_no slots[RUN_MAX];            /* the extents' own, if they come from the standby list */
	uint64_t sampled_ns[RUN_MAX];      /* likewise: when the extent was unmapped as a sample, or 0 */
	uint64_t touched_ns[RUN_MAX];      /* likewise: when its return was asked for, or 0 */
	uint8_t ages[RUN_MAX];             /* likewise: standby_age */
	slot_no dropped[EXTENT_PAGES_MAX]; /* slots whose room was taken for the run */
	uint64_t nr_dropped;
	bool was_standby; /* the extents were in the standby list when the run began */
	bool is_restored; /* the bytes came from there */
	bool is_prefetch;
};

/* The most extents of an image that one run of a loader fills. */
uint64_t load_chunk(const struct image *image);
/* Bytes of the source in nr extents from first: the last one of the image may have fewer than the others. */
uint64_t run_bytes(const struct image *image, uint64_t first, uint64_t nr);
/* Writes frames, whole pages; an error may leave some of them written. */
int frames_write(struct image *image, const char *from, uint64_t length, uint64_t offset);
/* The same for nr extents from first, which the source gave: `from` has their bytes, and zeros up to the end of the
 * last page. 0, or -errno: then none of them has frames. */
int run_write(struct image *image, uint64_t first, uint64_t nr, const char *from);
/* Copies a run from the standby list to the frames. Fails only if a read or write of a memfd fails; the source must
 * then be read. */
int run_restore(const struct run *run, char *buffer);
/* Ends the load of nr extents of a run, at most RUN_MAX: makes them RESIDENT or, on error, ABSENT, and answers the
 * waiters. */
void run_end(const struct run *run, uint64_t first, uint64_t nr, int status);

#endif
