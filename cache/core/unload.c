/* SPDX-License-Identifier: Apache-2.0 */
/* The store's part of evictions, and the emptying of frames that no load wrote. */
#define _GNU_SOURCE
#include "cache/core/store.h"

#include "cache/core/abi.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

uint64_t store_begin_evict(struct image *image, uint32_t *extents, uint64_t nr)
{
	struct store *store = image->store;
	uint64_t nr_going = 0;

	pthread_mutex_lock(&store->lock);
	for (uint64_t i = 0; i < nr; i++) {
		uint32_t extent = extents[i];

		if (extent < image->shape.nr_extents && !image_is_pinned(image, extent) &&
		    extent_begin_evict(&image->states[extent])) {
			atomic_fetch_sub(&image->resident_pages, image_extent_pages(image, extent));
			extents[i] = extents[nr_going];
			extents[nr_going++] = extent;
		}
	}
	if (nr_going)
		atomic_fetch_add(&image->generation, 1);
	pthread_mutex_unlock(&store->lock);
	return nr_going;
}

uint32_t store_standby_batch(const struct store *store)
{
	return store->standby.nr_hand ? store->standby.nr_hand : 1;
}

void store_fill_standby(struct image *image, const uint32_t *extents, uint64_t nr, uint32_t *slots_out)
{
	struct store *store = image->store;
	struct standby *standby = &store->standby;
	char *buffer = standby_takes(standby, image) ? malloc(standby->slot_bytes) : NULL;
	uint64_t began_ns = loader_cpu_ns();
	uint32_t nr_slots = 0;

	assert(nr <= STANDBY_BATCH);
	pthread_mutex_lock(&store->lock);
	/* Just after the list was turned on, or has grown, its room may not be free yet. */
	bool has_room = store->reserved_extents + standby_room(standby) <= store->capacity_extents;
	if (buffer && standby->limit && has_room)
		nr_slots = standby_take_free(standby, slots_out, (uint32_t)nr);
	pthread_mutex_unlock(&store->lock);
	for (uint64_t i = 0; i < nr; i++) {
		if (i < nr_slots && standby_fill(standby, slots_out[i], image, extents[i], buffer) == 0)
			continue;
		if (i < nr_slots) {
			room_empty(store, &slots_out[i], 1);
			pthread_mutex_lock(&store->lock);
			standby->nr_in_hand--;
			pthread_mutex_unlock(&store->lock);
		}
		slots_out[i] = 0;
	}
	pthread_mutex_lock(&store->lock);
	store->fill_cpu_ns += loader_cpu_ns() - began_ns;
	pthread_mutex_unlock(&store->lock);
	free(buffer);
}

/* EVICTING -> ABSENT for nr extents, with their room unless they are strays, which took none; under lock. */
static void end_evict(struct image *image, const uint32_t *extents, uint64_t nr, bool is_stray)
{
	struct store *store = image->store;
	uint64_t nr_room = 0;

	for (uint64_t i = 0; i < nr; i++) {
		extent_step(&image->states[extents[i]], EXTENT_EVICTING, EXTENT_ABSENT, 0);
		nr_room += is_stray ? 0 : image_room(image, extents[i], 1);
		/* If there is no memory for the load, the waiters stay: the next fault on the extent starts one. */
		if (image->waiters[extents[i]] && !store->cancelled)
			queue_demand(image, extents[i]);
	}
	assert(store->reserved_extents >= nr_room);
	store->reserved_extents -= nr_room;
	atomic_fetch_add(&image->generation, 1);
	loaders_wake(store);
}

void store_abandon(struct image *image, const uint32_t *extents, uint64_t nr)
{
	pthread_mutex_lock(&image->store->lock);
	end_evict(image, extents, nr, false);
	pthread_mutex_unlock(&image->store->lock);
}

void store_end_evict(struct image *image, const uint32_t *extents, const uint32_t *slots, uint64_t nr,
                     uint64_t since_ns, int reason)
{
	struct store *store = image->store;
	uint64_t nr_kept = 0;

	pthread_mutex_lock(&store->lock);
	for (uint64_t i = 0; i < nr && slots; i++) {
		if (slots[i])
			standby_push(&store->standby, slots[i], image, extents[i], since_ns, reason == EVICT_SAMPLE);
		else
			event_push(store, EVENT_DROPPED, 0, image, extents[i]);
		nr_kept += slots[i] != 0;
	}
	end_evict(image, extents, nr, false);
	pthread_mutex_unlock(&store->lock);
	atomic_fetch_add(reason == EVICT_SAMPLE ? &image->totals->standby_samples : &image->totals->standby_unmaps,
	                 nr_kept);
	atomic_fetch_add(reason == EVICT_REQUEST ? &image->totals->evictions_request
	                                         : &image->totals->evictions_pressure,
	                 nr - nr_kept);
	if (nr_kept)
		room_drop_surplus(store);
}

/* Punches the stray frames of one ABSENT extent, by the steps of an eviction. */
static bool scrub_extent(struct image *image, uint64_t extent)
{
	struct store *store = image->store;
	uint32_t no = (uint32_t)extent;
	bool mine = false;

	pthread_mutex_lock(&store->lock);
	if (extent_state(&image->states[extent]) == EXTENT_ABSENT) {
		extent_step(&image->states[extent], EXTENT_ABSENT, EXTENT_EVICTING, 0);
		mine = true;
	}
	pthread_mutex_unlock(&store->lock);
	if (mine) {
		image_punch(image, extent, 1);
		pthread_mutex_lock(&store->lock);
		end_evict(image, &no, 1, true);
		pthread_mutex_unlock(&store->lock);
		atomic_fetch_add(&image->totals->strays, 1);
	}
	return mine;
}

int64_t store_scrub(struct image *image)
{
	uint64_t step = (uint64_t)image->shape.extent_pages * PAGE_BYTES;
	int64_t nr = 0;

	for (uint64_t e = 0; e < image->shape.nr_extents; e++) {
		if (extent_state(&image->states[e]) != EXTENT_ABSENT)
			continue;
		off_t at = lseek(image->frames_fd, (off_t)(e * step), SEEK_DATA);
		if (at < 0)
			return errno == ENXIO ? nr : -errno;
		uint64_t found = (uint64_t)at / step;
		if (found > e)
			e = found - 1; /* skip to the next frame, stray or not */
		else
			nr += scrub_extent(image, e);
	}
	return nr;
}
