/* SPDX-License-Identifier: Apache-2.0 */
#include "accounting/core/evict.h"

#include "accounting/core/settle.h"
#include "cache/core/abi.h"
#include "cache/core/collapse.h"
#include "cache/core/loader.h"
#include "cache/core/points.h"
#include "cache/core/store.h"

#include <stdlib.h>
#include <string.h>

static int compare_extents(const void *a, const void *b)
{
	uint32_t left = *(const uint32_t *)a, right = *(const uint32_t *)b;

	return left < right ? -1 : left > right;
}

/* Neighbours are punched together: each punch walks every guest's mapping. */
static void punch_runs(struct image *image, const uint32_t *extents, uint64_t nr)
{
	for (uint64_t i = 0, run; i < nr; i += run) {
		run = 1;
		while (i + run < nr && extents[i + run] == extents[i] + run)
			run++;
		int err = image_punch(image, extents[i], run);
		/* A punch in our own unsealed memfd does not fail for any reason that we could repair. */
		if (err)
			abort();
	}
}

static void revoke_grants(struct image *image, const uint32_t *extents, uint64_t nr)
{
	uint64_t extent_pages = image->shape.extent_pages;

	pthread_rwlock_rdlock(&image->accounts_lock);
	for (struct account *account = image->accounts; account; account = account->next) {
		bool locked = false;

		for (uint64_t i = 0; i < nr; i++) {
			uint64_t first = extents[i] * extent_pages;
			uint64_t nr_pages = image_extent_pages(image, extents[i]);

			account_revoke(account, extents[i]);
			/* A page opened for a write, and punched before the copy was made, is charged for nothing. */
			if (bits_next(account->unsettled, first, first + nr_pages) == first + nr_pages)
				continue;
			if (!locked)
				pthread_mutex_lock(&account->write_lock);
			locked = true;
			account_settle_range(account, first, nr_pages);
		}
		if (locked)
			pthread_mutex_unlock(&account->write_lock);
	}
	pthread_rwlock_unlock(&image->accounts_lock);
}

static uint64_t region_of(const struct image *image, uint64_t extent)
{
	return extent * image->shape.extent_pages / OPEN_PAGES;
}

/* How many of the nr extents from i on, which are sorted, lie in the same region. */
static uint64_t same_region(const struct image *image, const uint32_t *extents, uint64_t nr, uint64_t i)
{
	uint64_t run = 1;

	while (i + run < nr && region_of(image, extents[i + run]) == region_of(image, extents[i]))
		run++;
	return run;
}

/* Whether a huge page would be punched in part if these of its extents went. */
static bool is_partly_huge(const struct image *image, uint64_t region_no, uint64_t nr_going)
{
	return image_is_collapsed(image, region_no) && nr_going * image->shape.extent_pages < OPEN_PAGES;
}

/* If its bytes are lost, which takes an error of the memfd, the region is evicted. Without memory for them, it stays,
 * and so do its parts. */
static void dissolve(struct image *image, uint64_t region_no)
{
	uint32_t extents[OPEN_PAGES];
	char *buffer = malloc((size_t)OPEN_PAGES * PAGE_BYTES);
	int64_t nr = buffer ? region_begin_dissolve(image, region_no, extents) : -ENOMEM;

	if (nr >= 0 && region_rewrite(image, region_no, buffer) == 0) {
		store_return(image, extents, (uint64_t)nr);
	} else if (nr >= 0) {
		revoke_grants(image, extents, (uint64_t)nr);
		store_end_evict(image, extents, NULL, (uint64_t)nr, loader_now_ns(), EVICT_PRESSURE);
	}
	free(buffer);
}

/* Sorts the extents, and dissolves the huge pages that would be punched in part, as pinned ones stay. */
static void dissolve_before(struct image *image, uint32_t *extents, uint64_t nr)
{
	qsort(extents, nr, sizeof *extents, compare_extents);
	for (uint64_t i = 0, run; i < nr; i += run) {
		uint64_t nr_going = 0;

		run = same_region(image, extents, nr, i);
		for (uint64_t j = i; j < i + run; j++)
			nr_going += extents[j] < image->shape.nr_extents && !image_is_pinned(image, extents[j]);
		if (nr_going && is_partly_huge(image, region_of(image, extents[i]), nr_going))
			dissolve(image, region_of(image, extents[i]));
	}
}

/* Of nr EVICTING extents, sorted: returns those that would punch a huge page in part, because it was held or pinned, or
 * was collapsed anew; moves the others to the front. How many these are. */
static uint64_t return_partly_huge(struct image *image, uint32_t *extents, uint64_t nr)
{
	uint64_t nr_going = 0;

	for (uint64_t i = 0, run; i < nr; i += run) {
		run = same_region(image, extents, nr, i);
		if (is_partly_huge(image, region_of(image, extents[i]), run)) {
			store_return(image, extents + i, run);
			continue;
		}
		memmove(extents + nr_going, extents + i, run * sizeof *extents);
		nr_going += run;
	}
	return nr_going;
}

/* Evicts those of nr extents that can be, at most store_standby_batch if their bytes go to the standby list. */
static uint64_t evict_some(struct image *image, uint32_t *extents, uint64_t nr, int reason)
{
	bool is_kept = reason == EVICT_STANDBY || reason == EVICT_SAMPLE;
	uint32_t slots[STANDBY_BATCH];

	dissolve_before(image, extents, nr);
	uint64_t nr_going = store_begin_evict(image, extents, nr);
	qsort(extents, nr_going, sizeof *extents, compare_extents);
	nr_going = return_partly_huge(image, extents, nr_going);
	if (!nr_going)
		return 0;
	if (is_kept)
		store_fill_standby(image, extents, nr_going, slots);
	point_reach(POINT_EVICT_PUNCH);
	uint64_t since_ns = loader_now_ns();
	punch_runs(image, extents, nr_going);
	point_reach(POINT_EVICT_REVOKE);
	revoke_grants(image, extents, nr_going);
	store_end_evict(image, extents, is_kept ? slots : NULL, nr_going, since_ns, reason);
	return nr_going;
}

int64_t evict_extents(struct image *image, uint32_t *extents, uint64_t nr, int reason)
{
	uint64_t step = reason == EVICT_STANDBY || reason == EVICT_SAMPLE ? store_standby_batch(image->store) : nr;
	uint64_t nr_gone = 0;

	for (uint64_t at = 0; at < nr; at += step) {
		uint64_t nr_going = evict_some(image, extents + at, nr - at < step ? nr - at : step, reason);

		memmove(extents + nr_gone, extents + at, nr_going * sizeof *extents);
		nr_gone += nr_going;
	}
	return (int64_t)nr_gone;
}
