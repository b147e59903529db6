/* SPDX-License-Identifier: Apache-2.0 */
#include "cache/core/room.h"

#include "cache/core/store.h"

#include <errno.h>

/* Slots dropped in one go. */
#define DROP_BATCH 64
/* Extents looked at under one hold of the store's lock. */
#define SCAN_BATCH 8192

uint64_t room_free(const struct store *store)
{
	uint64_t taken = store->reserved_extents + standby_room(&store->standby);

	return taken < store->capacity_extents ? store->capacity_extents - taken : 0;
}

uint64_t room_left(const struct store *store)
{
	return room_free(store) + standby_nr_droppable(&store->standby);
}

/* Takes out the oldest slot and counts the eviction; 0 if none can be dropped. */
static slot_no drop_oldest(struct store *store)
{
	struct image *image;
	uint32_t extent;
	slot_no slot = standby_take_oldest(&store->standby, &image, &extent);

	if (slot) {
		const struct standby_slot *from = &store->standby.slots[slot];

		if (from->is_sample)
			sample_end_push(store, image, extent, from->since_ns, loader_now_ns(), false);
		atomic_fetch_add(&image->totals->evictions_pressure, 1);
		event_push(store, EVENT_DROPPED, 0, image, extent);
	}
	return slot;
}

uint64_t room_take(struct store *store, const struct image *image, uint64_t first, uint64_t nr, slot_no *dropped,
                   uint64_t *nr_dropped_out)
{
	uint64_t free = room_free(store), left = room_left(store), nr_dropped = 0;

	while (image_room(image, first, nr) > left)
		nr--;
	uint64_t wanted = image_room(image, first, nr);
	while (free + nr_dropped < wanted && (dropped[nr_dropped] = drop_oldest(store)))
		nr_dropped++;
	store->reserved_extents += wanted;
	*nr_dropped_out = nr_dropped;
	return nr;
}

slot_no room_take_standby(struct store *store, struct image *image, uint64_t extent)
{
	slot_no slot = standby_take(&store->standby, image, extent);

	assert(slot);
	store->reserved_extents++;
	return slot;
}

void room_empty(struct store *store, const slot_no *slots, uint64_t nr)
{
	if (!nr)
		return;
	standby_empty(&store->standby, slots, nr);
	pthread_mutex_lock(&store->lock);
	for (uint64_t i = 0; i < nr; i++)
		standby_put_free(&store->standby, slots[i]);
	pthread_mutex_unlock(&store->lock);
}

/* The same for slots that were counted in nr_dropping: their room is free from now on. */
static void end_drop(struct store *store, const slot_no *slots, uint64_t nr)
{
	room_empty(store, slots, nr);
	pthread_mutex_lock(&store->lock);
	store->standby.nr_dropping -= nr;
	loaders_wake(store);
	pthread_mutex_unlock(&store->lock);
}

void room_drop_surplus(struct store *store)
{
	struct standby *standby = &store->standby;
	slot_no slots[DROP_BATCH];
	uint64_t nr;

	do {
		nr = 0;
		pthread_mutex_lock(&store->lock);
		while (nr < DROP_BATCH && standby_nr(standby) > standby->limit && (slots[nr] = drop_oldest(store)))
			nr++;
		standby->nr_dropping += nr;
		pthread_mutex_unlock(&store->lock);
		end_drop(store, slots, nr);
	} while (nr == DROP_BATCH);
}

/* Drops the standby bytes of ABSENT extents in [at, end); returns how many pages. */
static uint64_t drop_range(struct image *image, uint64_t at, uint64_t end, _Atomic uint64_t *counter)
{
	struct store *store = image->store;
	slot_no slots[DROP_BATCH];
	uint64_t nr_pages = 0;

	while (at < end && store->standby.slots) {
		uint64_t nr = 0;
		uint64_t stop = end - at < SCAN_BATCH ? end : at + SCAN_BATCH;

		pthread_mutex_lock(&store->lock);
		for (; at < stop && nr < DROP_BATCH; at++)
			if (image->standby[at] && extent_state(&image->states[at]) == EXTENT_ABSENT) {
				slots[nr++] = standby_take(&store->standby, image, at);
				nr_pages += image_extent_pages(image, at);
				event_push(store, EVENT_DROPPED, 0, image, at);
			}
		store->standby.nr_dropping += nr;
		pthread_mutex_unlock(&store->lock);
		end_drop(store, slots, nr);
		atomic_fetch_add(counter, nr);
	}
	return nr_pages;
}

void room_drop_image(struct image *image)
{
	_Atomic uint64_t uncounted = 0;

	drop_range(image, 0, image->shape.nr_extents, &uncounted);
}

int64_t store_drop_standby(struct image *image, uint64_t first, uint64_t nr)
{
	if (first > image->shape.nr_extents || nr > image->shape.nr_extents - first)
		return -ERANGE;
	return (int64_t)drop_range(image, first, first + nr, &image->totals->evictions_request);
}

void store_in_standby(const struct image *image, uint8_t *flags_out)
{
	for (uint64_t e = 0; e < image->shape.nr_extents;) {
		uint64_t left = image->shape.nr_extents - e;

		pthread_mutex_lock(&image->store->lock);
		for (uint64_t stop = e + (left < SCAN_BATCH ? left : SCAN_BATCH); e < stop; e++)
			flags_out[e] = image->standby[e] != 0;
		pthread_mutex_unlock(&image->store->lock);
	}
}

int store_set_standby(struct store *store, uint64_t limit_extents, uint64_t low_free)
{
	pthread_mutex_lock(&store->lock);
	int err = limit_extents > store->standby_max ? -EINVAL : 0;
	if (!err) {
		store->standby.limit = limit_extents;
		store->low_free = low_free;
	}
	pthread_mutex_unlock(&store->lock);
	room_drop_surplus(store);
	return err;
}
