/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Makes 2 MiB of an image's frames one huge page, which guests may then map with one page-table entry (accounting/core/
 * open_regions.h).
 *
 * MADV_COLLAPSE (Linux 6.1) copies the frames into a new huge page, whatever shmem_enabled says but "deny", and unmaps
 * the old ones from every guest. Guests in exact mode fault again there.
 *
 * A part of a huge page must never be punched: the kernel zeroes that part in place, where a reader that has pinned the
 * page (process_vm_readv, O_DIRECT) sees the zeros; and it keeps the memory if it cannot split the page then. So the
 * region is dissolved first: read, punched as a whole, which leaves a pinned page as it is, and written again as single
 * pages. Its extents are EVICTING meanwhile.
 */
#ifndef COWSHED_COLLAPSE_H
#define COWSHED_COLLAPSE_H

#include "cache/core/image.h"

/* cdef-begin */
#define OPEN_PAGES 512 /* of an open region: as many as one huge page-table entry maps; IMAGE_REGION_PAGES */

/* Collapses the region's frames; 0 at once if they are collapsed already. -ESTALE: not all of its extents are RESIDENT;
 * -ENOSPC: more than max_pinned extents would be pinned in the store for that time; -EBUSY: some are lent by
 * themselves, and the others could not be evicted any more. Errors of the kernel are counted: -EAGAIN, -EBUSY, -ENOMEM:
 * not now, no huge page is free or a frame stays in use, though tried again for 1.4 ms; -EINVAL: the system forbids it.
 * Cost: 0.4 ms, up to 5 ms where memory is fragmented. */
int image_collapse(struct image *image, uint64_t region_no, uint64_t max_pinned);
/* Whether a collapse succeeded, and nothing of the region was punched since. */
int image_is_collapsed(const struct image *image, uint64_t region_no);
/* Names up to nr_max regions whose extents are all RESIDENT and pinned by an operator; returns how many. O(extents). */
int64_t image_pinned_regions(const struct image *image, uint32_t *regions_out, uint64_t nr_max);
/* cdef-end */

static inline uint64_t image_nr_regions(const struct image *image)
{
	return (image->shape.nr_pages + OPEN_PAGES - 1) / OPEN_PAGES;
}

_Static_assert(OPEN_PAGES == IMAGE_REGION_PAGES, "a region is one thing");

/* Lends the extents of a region, which has all its pages in the image. -ESTALE, and nothing is lent: not all of them
 * are RESIDENT; -ENOSPC as store_lend. */
int region_lend(struct image *image, uint64_t region_no, uint64_t max_pinned);
void region_lend_anyway(struct image *image, uint64_t region_no);
void region_end_loan(struct image *image, uint64_t region_no);
/* Whether the extents are a part of a region that is a huge page, or may be about to be one. Lent by themselves they
 * would keep it from being dissolved. Under the store's lock. */
bool region_is_parted(const struct image *image, uint64_t first, uint64_t nr);
/* From an extent on: how many share one huge page, if it is the first of them; else 1. */
uint64_t image_collapsed_extents(const struct image *image, uint64_t extent);
/* Dissolving in steps. Makes all extents of a collapsed region EVICTING and names them (OPEN_PAGES at most); returns
 * how many, or -EBUSY, and none is, if one is held, lent or not RESIDENT. */
int64_t region_begin_dissolve(struct image *image, uint64_t region_no, uint32_t *extents_out);
/* Reads the region's frames into buffer, which has room for them, punches them and writes them again. -errno: the bytes
 * are gone. */
int region_rewrite(struct image *image, uint64_t region_no, char *buffer);
/* Makes EVICTING extents, whose frames are there, RESIDENT again, and answers waiters. */
void store_return(struct image *image, const uint32_t *extents, uint64_t nr);
/* The frames of [first_page, first_page + nr) are punched. */
void image_note_split(struct image *image, uint64_t first_page, uint64_t nr);

#endif
