/* SPDX-License-Identifier: Apache-2.0 */
/* Recomputes the invariants of the store and of its images (store.h, image.h), for tests. */
#include "cache/core/store.h"

#include <stddef.h>

/* Of room. */
struct extent_sums {
	uint64_t resident, evicting, pinned;
};

/* Adds up an image's extents; returns an invariant that does not hold, or NULL. */
static const char *image_check(const struct image *image, struct extent_sums *sums)
{
	uint64_t resident_pages = 0;

	for (uint64_t extent = 0; extent < image->shape.nr_extents; extent++) {
		enum extent_state state = extent_state(&image->states[extent]);

		if (state == EXTENT_RESIDENT)
			resident_pages += image_extent_pages(image, extent);
		uint64_t room = image_room(image, extent, 1);
		sums->resident += state == EXTENT_RESIDENT ? room : 0;
		sums->evicting += state == EXTENT_EVICTING ? room : 0;
		sums->pinned += image_is_pinned(image, extent) ? room : 0;
		if (image->waiters[extent] && state != EXTENT_LOADING && state != EXTENT_EVICTING)
			return "image (3): an extent with waiters is LOADING or EVICTING";
	}
	if (resident_pages != atomic_load(&image->resident_pages))
		return "image (4): resident_pages is the sum of the pages of RESIDENT extents";
	return NULL;
}

/* Every queue by number: the store's three, then two of each origin; NULL past the last. */
static const struct load_queue *queue_of(const struct store *store, int no)
{
	const struct load_queue *queues[3] = {&store->demand, &store->prefetch, &store->restores};
	const struct origin *origin = store->origins;

	if (no < 3)
		return queues[no];
	for (no -= 3; origin && no >= 2; no -= 2)
		origin = origin->next;
	return !origin ? NULL : no ? &origin->prefetch : &origin->demand;
}

/* Whether an extent of a load is in a later one, of its queue or of a queue after that. */
static bool is_in_later_load(const struct store *store, int no, const struct load *load)
{
	const struct load_queue *queue;

	for (const struct load *other = load->next;; other = queue->head) {
		for (; other; other = other->next)
			if (other->image == load->image && other->first < load->first + load->nr &&
			    load->first < other->first + other->nr)
				return true;
		if (!(queue = queue_of(store, ++no)))
			return false;
	}
}

static bool is_queued_twice(const struct store *store)
{
	const struct load_queue *queue;

	for (int no = 0; (queue = queue_of(store, no)); no++)
		for (const struct load *load = queue->head; load; load = load->next)
			if (is_in_later_load(store, no, load))
				return true;
	return false;
}

static bool is_counted(const struct load_queue *queue)
{
	uint64_t nr = 0;

	for (const struct load *load = queue->head; load; load = load->next)
		nr++;
	return nr == queue->nr;
}

static bool are_counted(const struct store *store)
{
	const struct load_queue *queue;

	for (int no = 0; (queue = queue_of(store, no)); no++)
		if (!is_counted(queue))
			return false;
	return true;
}

static const char *loaders_check(const struct store *store)
{
	uint32_t nr_prefetching = 0;

	for (const struct loader *loader = store->loaders; loader; loader = loader->next)
		nr_prefetching += loader->image && loader->prefetch && !loader->stuck;
	if (nr_prefetching != store->nr_prefetching)
		return "store (5): nr_prefetching counts the loaders with a prefetch that are not stuck";
	for (const struct image *image = store->images; image; image = image->next) {
		uint32_t nr_loaders = 0;

		for (const struct loader *loader = store->loaders; loader; loader = loader->next)
			nr_loaders += loader->image == image && !loader->restoring;
		if (nr_loaders != image->nr_loaders || nr_loaders > store->nr_loaders)
			return "store (6): image->nr_loaders counts its loaders at work, at most store->nr_loaders";
	}
	return NULL;
}

const char *store_check(struct store *store)
{
	struct extent_sums sums = {0};
	const char *broken = NULL;

	pthread_mutex_lock(&store->lock);
	for (const struct image *image = store->images; image && !broken; image = image->next)
		broken = image_check(image, &sums);
	uint64_t least = sums.resident + store->loading_extents;
	if (broken)
		;
	else if (store->reserved_extents < least || store->reserved_extents > least + sums.evicting)
		broken = "store (1): reserved_extents counts the extents RESIDENT, EVICTING or being filled";
	else if (store->reserved_extents + standby_nr(&store->standby) > store->capacity_extents)
		broken = "store (2): frames and standby list together are at most the capacity";
	else if (is_queued_twice(store))
		broken = "store (3): an extent is in at most one load of the queues";
	else if (!are_counted(store))
		broken = "store (4): a queue's nr is the number of its loads";
	else if (sums.pinned != store->pinned_extents)
		broken = "store (7): pinned_extents counts the extents with a pin or a loan";
	else
		broken = loaders_check(store);
	if (!broken)
		broken = origins_check(store);
	if (!broken && store->standby.slots)
		broken = standby_check(store);
	pthread_mutex_unlock(&store->lock);
	return broken;
}
