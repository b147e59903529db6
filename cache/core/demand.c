/* SPDX-License-Identifier: Apache-2.0 */
/* The store's part of loads: who asks for an extent, and in which queue its load waits. */
#include "cache/core/store.h"

#include "cache/core/run.h"

#include <errno.h>
#include <stdlib.h>

static struct load *load_new(struct image *image, uint64_t first, uint64_t nr)
{
	struct load *load = malloc(sizeof *load);

	if (load) {
		*load = (struct load){.image = image, .first = first, .nr = nr};
		for (uint64_t i = 0; i < nr; i++) {
			standby_claim(&image->store->standby, image, first + i);
			extent_step(&image->states[first + i], EXTENT_ABSENT, EXTENT_LOADING, 0);
		}
		atomic_fetch_add(&image->generation, 1);
	}
	return load;
}

/* Queues a load that has a waiter for one of its extents, or is about to. */
static void queue_wanted(struct store *store, struct load *load, uint64_t extent)
{
	slot_no slot = load->image->standby[extent];

	if (slot) {
		if (!store->standby.slots[slot].touched_ns)
			store->standby.slots[slot].touched_ns = loader_now_ns();
		load_queue_push(&store->restores, load);
		pthread_cond_signal(&store->soft);
		if (store->restorer_waits && store->restores.nr == 1)
			return; /* it takes it at once */
	} else if (load->image->origin) {
		load_queue_push(&load->image->origin->demand, load);
		pthread_cond_broadcast(&load->image->origin->work);
		return;
	} else {
		load_queue_push(&store->demand, load);
	}
	pthread_cond_signal(&store->work);
}

int queue_demand(struct image *image, uint64_t extent)
{
	struct store *store = image->store;
	struct load *load = load_new(image, extent, 1);

	if (!load)
		return -ENOMEM;
	queue_wanted(store, load, extent);
	return 0;
}

int store_want(struct image *image, uint64_t extent, struct load_waiter *waiter)
{
	struct store *store = image->store;
	struct load *load;
	int result = 0;

	pthread_mutex_lock(&store->lock);
	switch (extent_state(&image->states[extent])) {
	case EXTENT_RESIDENT:
		result = 1;
		break;
	case EXTENT_ABSENT:
		result = store->cancelled ? -ESHUTDOWN : queue_demand(image, extent);
		break;
	case EXTENT_LOADING:
		load = load_queue_take(&store->prefetch, image, extent);
		if (!load && image->origin)
			load = load_queue_take(&image->origin->prefetch, image, extent);
		if (load) {
			image->nr_prefetches--;
			queue_wanted(store, load, extent);
		} else if (store->cancelled) {
			result = -ESHUTDOWN;
		}
		break;
	case EXTENT_EVICTING: /* store_end_evict starts the load */
		if (store->cancelled)
			result = -ESHUTDOWN;
		break;
	}
	if (result == 0) {
		image->was_waited_for = true;
		waiter->extent = extent;
		waiter->next = image->waiters[extent];
		image->waiters[extent] = waiter;
	}
	pthread_mutex_unlock(&store->lock);
	return result;
}

/* Whether an extent can be in one load with the ABSENT first: all from the source, or all from the standby list. */
static bool is_alike(const struct image *image, uint64_t first, uint64_t extent)
{
	return extent_state(&image->states[extent]) == EXTENT_ABSENT &&
	       (image->standby[extent] != 0) == (image->standby[first] != 0);
}

int64_t store_prefetch(struct image *image, uint64_t first, uint64_t nr)
{
	struct store *store = image->store;
	uint64_t chunk = load_chunk(image), room = image->shape.extent_pages / store->extent_pages;
	uint64_t end = first + nr;
	int64_t nr_asked = 0;

	if (first > image->shape.nr_extents || nr > image->shape.nr_extents - first)
		return -ERANGE;
	pthread_mutex_lock(&store->lock);
	/* Readahead of more than an eighth of the store would evict what it has just loaded. */
	uint64_t budget = store->capacity_extents / 8 / room + 1;
	uint64_t pending = image->nr_prefetches * chunk; /* per image: a source that hangs takes nothing from others */
	budget = budget > pending && !store->cancelled ? budget - pending : 0;
	while (first < end && budget) {
		if (extent_state(&image->states[first]) != EXTENT_ABSENT) {
			first++;
			continue;
		}
		uint64_t run = 1;
		while (run < chunk && run < budget && first + run < end && is_alike(image, first, first + run))
			run++;
		struct load *load = load_new(image, first, run);
		if (!load)
			break;
		image->nr_prefetches++;
		if (image->origin && !image->standby[first]) {
			load_queue_push(&image->origin->prefetch, load);
			pthread_cond_broadcast(&image->origin->work);
		} else {
			load_queue_push(&store->prefetch, load);
			pthread_cond_signal(&store->work);
		}
		first += run;
		budget -= run;
		nr_asked += (int64_t)run;
	}
	pthread_mutex_unlock(&store->lock);
	return nr_asked;
}

int store_restore(struct image *image, uint64_t extent)
{
	struct store *store = image->store;
	int result = 0;

	if (extent >= image->shape.nr_extents)
		return -ERANGE;
	pthread_mutex_lock(&store->lock);
	if (image->standby[extent] && extent_state(&image->states[extent]) == EXTENT_ABSENT && !store->cancelled)
		result = queue_demand(image, extent) == 0;
	pthread_mutex_unlock(&store->lock);
	return result;
}
