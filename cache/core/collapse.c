/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "cache/core/collapse.h"

#include "cache/core/abi.h"
#include "cache/core/points.h"
#include "cache/core/store.h"

#include <assert.h>
#include <errno.h>
#include <sys/mman.h>
#include <time.h>

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

#define REGION_BYTES ((uint64_t)OPEN_PAGES * PAGE_BYTES)
#define TRIES 4
#define FIRST_PAUSE_NS 200000 /* then twice as long each time: 1.4 ms in all */

/* The extents that a region touches. */
static uint64_t region_extents(const struct image *image, uint64_t region_no, uint64_t *first_out)
{
	uint64_t first_page = region_no * OPEN_PAGES;

	*first_out = first_page / image->shape.extent_pages;
	return (first_page + OPEN_PAGES - 1) / image->shape.extent_pages + 1 - *first_out;
}

static void note_loan(struct image *image, uint64_t region_no)
{
	if (atomic_fetch_add(&image->region_loans[region_no], 1) == 0)
		atomic_fetch_add(&image->nr_lent_regions, 1);
}

static void forget_loan(struct image *image, uint64_t region_no)
{
	if (atomic_fetch_sub(&image->region_loans[region_no], 1) == 1)
		atomic_fetch_sub(&image->nr_lent_regions, 1);
}

/* The region's loan is noted before the extents': who finds none under the store's lock may lend them apart, and is
 * seen here. Once an extent is lent, no eviction of it begins: one look is enough. */
int region_lend(struct image *image, uint64_t region_no, uint64_t max_pinned)
{
	uint64_t first, nr = region_extents(image, region_no, &first);

	note_loan(image, region_no);
	int err = store_lend(image, first, nr, max_pinned);
	if (err) {
		forget_loan(image, region_no);
		return err;
	}
	for (uint64_t e = first; e < first + nr; e++)
		if (extent_state(&image->states[e]) != EXTENT_RESIDENT) {
			region_end_loan(image, region_no);
			return -ESTALE;
		}
	return 0;
}

void region_lend_anyway(struct image *image, uint64_t region_no)
{
	uint64_t first, nr = region_extents(image, region_no, &first);

	store_lend(image, first, nr, UINT64_MAX);
	note_loan(image, region_no);
}

void region_end_loan(struct image *image, uint64_t region_no)
{
	uint64_t first, nr = region_extents(image, region_no, &first);

	int err = store_end_loan(image, first, nr);

	assert(!err);
	(void)err;
	forget_loan(image, region_no);
}

/* Whether extents of a region are lent by themselves. */
static bool is_lent_apart(const struct image *image, uint64_t region_no)
{
	uint64_t first, nr = region_extents(image, region_no, &first);

	for (uint64_t e = first; e < first + nr; e++)
		if (image_own_loans(image, e))
			return true;
	return false;
}

bool region_is_parted(const struct image *image, uint64_t first, uint64_t nr)
{
	uint64_t extent_pages = image->shape.extent_pages;
	uint64_t first_page = first * extent_pages, end_page = (first + nr) * extent_pages;

	for (uint64_t no = first_page / OPEN_PAGES; no * OPEN_PAGES < end_page; no++) {
		if (no * OPEN_PAGES >= first_page && (no + 1) * OPEN_PAGES <= end_page)
			continue;
		if (atomic_load(&image->region_loans[no]) || bits_test(image->collapsed, no))
			return true;
	}
	return false;
}

/* A fault that the kernel is answering holds a reference to its frame, and the fault that had the region collapsed is
 * often the one: EAGAIN. It ends in microseconds. */
static int collapse_at(void *at)
{
	struct timespec pause = {.tv_nsec = FIRST_PAUSE_NS};

	for (int nr_tries = 1; madvise(at, REGION_BYTES, MADV_COLLAPSE) < 0; nr_tries++) {
		if (errno != EAGAIN || nr_tries == TRIES)
			return -errno;
		nanosleep(&pause, NULL);
		pause.tv_nsec *= 2;
	}
	return 0;
}

/* The kernel collapses what is mapped at an address congruent to its offset, so the region gets a mapping of its own
 * for that time. */
static int collapse(struct image *image, uint64_t region_no)
{
	uint64_t reserved_bytes = 2 * REGION_BYTES;
	char *reserved = mmap(NULL, reserved_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	int err = 0;

	if (reserved == MAP_FAILED)
		return -errno;
	uint64_t aligned = ((uintptr_t)reserved + REGION_BYTES - 1) / REGION_BYTES * REGION_BYTES;
	void *at = mmap((void *)(uintptr_t)aligned, REGION_BYTES, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED,
	                image->frames_fd, (off_t)(region_no * REGION_BYTES));
	if (at == MAP_FAILED)
		err = -errno;
	else
		err = collapse_at(at);
	munmap(reserved, reserved_bytes);
	return err;
}

int image_collapse(struct image *image, uint64_t region_no, uint64_t max_pinned)
{
	if ((region_no + 1) * OPEN_PAGES > image->shape.nr_pages)
		return -ERANGE;
	if (bits_test(image->collapsed, region_no))
		return 0;
	int err = region_lend(image, region_no, max_pinned);
	if (err)
		return err;
	if (is_lent_apart(image, region_no)) {
		region_end_loan(image, region_no);
		return -EBUSY;
	}
	err = point_reach(POINT_COLLAPSE);
	bits_set(image->collapsed, region_no); /* before: whoever dies in between leaves no huge page without its bit */
	if (!err)
		err = collapse(image, region_no);
	point_reach(POINT_COLLAPSED);
	if (err) {
		bits_clear(image->collapsed, region_no);
		atomic_fetch_add(&image->totals->collapse_failures, 1);
	}
	region_end_loan(image, region_no);
	return err;
}

int image_is_collapsed(const struct image *image, uint64_t region_no)
{
	return region_no < image_nr_regions(image) && bits_test(image->collapsed, region_no);
}

static bool is_pinned_region(const struct image *image, uint64_t region_no)
{
	uint64_t first, nr = region_extents(image, region_no, &first);

	for (uint64_t e = first; e < first + nr; e++)
		if (!atomic_load_explicit(&image->pins[e], memory_order_relaxed) ||
		    extent_state(&image->states[e]) != EXTENT_RESIDENT)
			return false;
	return true;
}

int64_t image_pinned_regions(const struct image *image, uint32_t *regions_out, uint64_t nr_max)
{
	uint64_t nr = 0;

	for (uint64_t no = 0; nr < nr_max && (no + 1) * OPEN_PAGES <= image->shape.nr_pages; no++)
		if (is_pinned_region(image, no))
			regions_out[nr++] = (uint32_t)no;
	return (int64_t)nr;
}

uint64_t image_collapsed_extents(const struct image *image, uint64_t extent)
{
	uint64_t page = extent * image->shape.extent_pages;

	return page % OPEN_PAGES == 0 && bits_test(image->collapsed, page / OPEN_PAGES)
		       ? OPEN_PAGES / image->shape.extent_pages
		       : 1;
}

void image_note_split(struct image *image, uint64_t first_page, uint64_t nr)
{
	for (uint64_t no = first_page / OPEN_PAGES; no * OPEN_PAGES < first_page + nr; no++)
		bits_clear(image->collapsed, no);
}
