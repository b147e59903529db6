/* SPDX-License-Identifier: Apache-2.0 */
/* The dissolving of a huge page of an image's frames into single pages: see collapse.h. */
#define _GNU_SOURCE
#include "cache/core/collapse.h"

#include "cache/core/abi.h"
#include "cache/core/loader.h"
#include "cache/core/points.h"
#include "cache/core/run.h"
#include "cache/core/store.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

#define REGION_BYTES ((uint64_t)OPEN_PAGES * PAGE_BYTES)

/* Under lock, so that nobody begins to wait for one of those that are RESIDENT again. Pinned extents keep their bytes;
 * guests may not see that lent ones are away. */
static bool begin_all(struct image *image, uint64_t first, uint64_t nr)
{
	for (uint64_t e = first; e < first + nr; e++) {
		if (!atomic_load(&image->loans[e]) && extent_begin_evict(&image->states[e]))
			continue;
		while (e-- > first)
			extent_step(&image->states[e], EXTENT_EVICTING, EXTENT_RESIDENT, 0);
		return false;
	}
	return true;
}

int64_t region_begin_dissolve(struct image *image, uint64_t region_no, uint32_t *extents_out)
{
	uint64_t first = region_no * OPEN_PAGES / image->shape.extent_pages;
	uint64_t nr = OPEN_PAGES / image->shape.extent_pages;
	struct store *store = image->store;

	pthread_mutex_lock(&store->lock);
	bool begun = bits_test(image->collapsed, region_no) && begin_all(image, first, nr);
	if (begun) {
		atomic_fetch_sub(&image->resident_pages, OPEN_PAGES);
		atomic_fetch_add(&image->generation, 1);
	}
	pthread_mutex_unlock(&store->lock);
	for (uint64_t i = 0; begun && i < nr; i++)
		extents_out[i] = (uint32_t)(first + i);
	return begun ? (int64_t)nr : -EBUSY;
}

static int read_all(int fd, char *buffer, uint64_t offset)
{
	for (uint64_t done = 0; done < REGION_BYTES;) {
		ssize_t got = pread(fd, buffer + done, REGION_BYTES - done, (off_t)(offset + done));

		if (got < 0 && errno != EINTR)
			return -errno;
		if (got == 0)
			return -ENODATA;
		done += got > 0 ? (uint64_t)got : 0;
	}
	return 0;
}

int region_rewrite(struct image *image, uint64_t region_no, char *buffer)
{
	uint64_t nr = OPEN_PAGES / image->shape.extent_pages;
	int err = read_all(image->frames_fd, buffer, region_no * REGION_BYTES);

	point_reach(POINT_DISSOLVE);
	/* Whatever happened to the bytes: no part of it is a huge page from here on. */
	int punched = image_punch(image, region_no * nr, nr);
	if (punched)
		abort(); /* as in an eviction */
	if (!err)
		err = frames_write(image, buffer, REGION_BYTES, region_no * REGION_BYTES);
	return err;
}

void store_return(struct image *image, const uint32_t *extents, uint64_t nr)
{
	struct store *store = image->store;

	for (uint64_t i = 0; i < nr; i++) {
		uint64_t extent = extents[i];

		pthread_mutex_lock(&store->lock);
		struct load_waiter *waiter = image->waiters[extent];
		bool held = waiter != NULL;

		image->waiters[extent] = NULL;
		atomic_fetch_add(&image->resident_pages, image_extent_pages(image, extent));
		atomic_fetch_add(&image->generation, 1);
		extent_step(&image->states[extent], EXTENT_EVICTING, EXTENT_RESIDENT, held);
		pthread_mutex_unlock(&store->lock);
		for (struct load_waiter *next; waiter; waiter = next) {
			next = waiter->next;
			waiter->restored = true; /* no read of the source */
			waiter->answer(waiter, 0);
		}
		if (held)
			extent_release(&image->states[extent]);
	}
}
