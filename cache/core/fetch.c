/* SPDX-License-Identifier: Apache-2.0 */
#include "cache/core/fetch.h"

#include "cache/core/points.h"
#include "cache/core/run.h"
#include "cache/core/store.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Slots of the standby list whose room one fetch may take. */
#define DROPPED_MAX (FETCH_BYTES_MAX / PAGE_BYTES)

int origin_open(struct store *store, struct origin **origin_out)
{
	struct origin *origin = calloc(1, sizeof *origin);
	pthread_condattr_t monotonic;

	if (!origin)
		return -ENOMEM;
	origin->store = store;
	load_queue_init(&origin->demand);
	load_queue_init(&origin->prefetch);
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&origin->work, &monotonic);
	pthread_condattr_destroy(&monotonic);
	pthread_mutex_lock(&store->lock);
	origin->next = store->origins;
	store->origins = origin;
	pthread_mutex_unlock(&store->lock);
	*origin_out = origin;
	return 0;
}

int origin_close(struct origin *origin)
{
	struct store *store = origin->store;
	struct origin **at = &store->origins;

	pthread_mutex_lock(&store->lock);
	bool busy = origin->nr_images || origin->fetches;
	while (!busy && *at != origin)
		at = &(*at)->next;
	if (!busy)
		*at = origin->next;
	pthread_mutex_unlock(&store->lock);
	if (busy)
		return -EBUSY;
	pthread_cond_destroy(&origin->work);
	free(origin);
	return 0;
}

void origin_stop(struct origin *origin)
{
	pthread_mutex_lock(&origin->store->lock);
	origin->stopped = true;
	pthread_cond_broadcast(&origin->work);
	pthread_mutex_unlock(&origin->store->lock);
}

void origin_count(const struct origin *origin, struct origin_counters *counters_out)
{
	struct origin_counters counters = {0};

	pthread_mutex_lock(&origin->store->lock);
	counters.queued_demand = origin->demand.nr;
	counters.queued_prefetch = origin->prefetch.nr;
	for (const struct fetch *fetch = origin->fetches; fetch; fetch = fetch->next)
		counters.fetches++;
	pthread_mutex_unlock(&origin->store->lock);
	*counters_out = counters;
}

void origins_wake(struct store *store)
{
	for (struct origin *origin = store->origins; origin; origin = origin->next)
		if (origin->demand.nr || origin->prefetch.nr)
			pthread_cond_broadcast(&origin->work);
}

uint64_t fetch_waits_since_ns(const struct image *image)
{
	uint64_t first_ns = 0;

	for (const struct fetch *fetch = image->origin ? image->origin->fetches : NULL; fetch; fetch = fetch->next) {
		uint64_t since_ns = fetch->image == image ? atomic_load(&fetch->since_ns) : 0;

		if (since_ns && (!first_ns || since_ns < first_ns))
			first_ns = since_ns;
	}
	return first_ns;
}

/* The next load that the thread may take; NULL: none, and *lacks_room_out says whether one waits for room. */
static struct load *next_load(struct origin *origin, bool demand_only, bool *is_prefetch_out, bool *lacks_room_out)
{
	uint64_t room = room_left(origin->store);
	struct load *load = load_queue_pop(&origin->demand, UINT32_MAX, &room);

	*is_prefetch_out = !load && !demand_only;
	if (*is_prefetch_out)
		load = load_queue_pop(&origin->prefetch, UINT32_MAX, &room);
	if (*is_prefetch_out && load)
		load->image->nr_prefetches--;
	*lacks_room_out = !load && !room && (origin->demand.nr || (!demand_only && origin->prefetch.nr));
	return load;
}

static bool is_absent(const struct image *image, uint64_t extent)
{
	return extent_state(&image->states[extent]) == EXTENT_ABSENT && !image->standby[extent];
}

/* Has the queued load that covers an extent join a fetch, if it is its neighbour as a whole. */
static bool join_load(struct fetch *fetch, uint64_t extent, uint64_t nr_max)
{
	struct image *image = fetch->image;
	struct origin *origin = fetch->origin;
	struct load *load = load_queue_take(&origin->prefetch, image, extent);
	bool is_prefetch = load != NULL;

	if (!load && !fetch->is_prefetch)
		load = load_queue_take(&origin->demand, image, extent);
	if (!load)
		return false;
	bool before = load->first + load->nr == fetch->first, after = load->first == fetch->first + fetch->nr;
	uint64_t first = before ? load->first : fetch->first, nr = fetch->nr + load->nr;

	if ((!before && !after) || nr > nr_max || image_room(image, first, nr) > room_left(image->store)) {
		load_queue_push_front(is_prefetch ? &origin->prefetch : &origin->demand, load);
		return false;
	}
	image->nr_prefetches -= is_prefetch;
	fetch->first = first;
	fetch->nr = nr;
	free(load);
	return true;
}

/* Has an extent that nobody asked for join a fetch of which it is a neighbour, if it is absent and there is room. */
static bool join_absent(struct fetch *fetch, uint64_t extent, uint64_t spare)
{
	struct image *image = fetch->image;
	uint64_t first = extent < fetch->first ? extent : fetch->first;

	if (!is_absent(image, extent) || image_room(image, first, fetch->nr + 1) > spare)
		return false;
	extent_step(&image->states[extent], EXTENT_ABSENT, EXTENT_LOADING, 0);
	fetch->first = first;
	fetch->nr++;
	return true;
}

/* Makes a fetch larger: by loads that are queued for its neighbours, and, if a guest waits for it, by the rest of its
 * block. */
static void fetch_widen(struct fetch *fetch)
{
	struct image *image = fetch->image;
	struct store *store = image->store;
	uint64_t extent_bytes = (uint64_t)image->shape.extent_pages * PAGE_BYTES;
	uint64_t block = FETCH_BLOCK_BYTES > extent_bytes ? FETCH_BLOCK_BYTES / extent_bytes : 1;
	uint64_t nr_max = FETCH_BYTES_MAX / extent_bytes;
	uint64_t low = fetch->first - fetch->first % block, high = low + block;
	uint64_t left = room_left(store), spare = left > store->low_free ? left - store->low_free : 0;
	bool wider;

	high = high < image->shape.nr_extents ? high : image->shape.nr_extents;
	do {
		uint64_t before = fetch->first - 1, after = fetch->first + fetch->nr;

		wider = after < image->shape.nr_extents && join_load(fetch, after, nr_max);
		if (!wider && !fetch->is_prefetch && after < high)
			wider = join_absent(fetch, after, spare);
		if (!wider && fetch->first > low)
			wider = join_load(fetch, before, nr_max) ||
			        (!fetch->is_prefetch && join_absent(fetch, before, spare));
	} while (wider);
}

/* Takes what fits of a load into a fetch, with its room; false: there was none after all. Under lock. */
static bool fetch_take(struct fetch *fetch, struct load *load, slot_no *dropped, uint64_t *nr_dropped_out)
{
	struct image *image = fetch->image;
	struct store *store = image->store;

	fetch->first = load->first;
	fetch->nr = load->nr;
	bool fits = image_room(image, load->first, load->nr) <= room_left(store);
	if (fits)
		fetch_widen(fetch);
	fetch->nr = room_take(store, image, fetch->first, fetch->nr, dropped, nr_dropped_out);
	if (fits) {
		free(load);
	} else {
		load->first += fetch->nr;
		load->nr -= fetch->nr;
		image->nr_prefetches += fetch->is_prefetch;
		load_queue_push_front(fetch->is_prefetch ? &fetch->origin->prefetch : &fetch->origin->demand, load);
	}
	if (!fetch->nr)
		return false;
	store->loading_extents += image_room(image, fetch->first, fetch->nr);
	atomic_fetch_add(&image->generation, 1);
	if (room_left(store) < store->low_free)
		store_raise_at(POINT_WAKE_EVICTOR, store->pressure_fd);
	return true;
}

static int wait_for_load(struct origin *origin, bool lacks_room, const struct timespec *until)
{
	struct store *store = origin->store;

	if (lacks_room)
		store_raise_at(POINT_WAKE_EVICTOR, store->pressure_fd);
	store->nr_waiting_room += lacks_room;
	int err = pthread_cond_timedwait(&origin->work, &store->lock, until);
	store->nr_waiting_room -= lacks_room;
	return -err;
}

static void fetch_free(struct fetch *fetch)
{
	if (fetch)
		free(fetch->part);
	free(fetch);
}

int store_take_fetch(struct origin *origin, int demand_only, int timeout_ms, struct fetch **fetch_out,
                     struct fetch_request *request_out)
{
	struct store *store = origin->store;
	struct timespec until = loader_deadline_in(timeout_ms);
	struct fetch *fetch = calloc(1, sizeof *fetch);
	slot_no dropped[DROPPED_MAX];
	uint64_t nr_dropped = 0;
	int err = 0;

	if (!fetch || posix_memalign((void **)&fetch->part, PAGE_BYTES, (size_t)EXTENT_PAGES_MAX * PAGE_BYTES)) {
		fetch_free(fetch);
		return -ENOMEM;
	}
	fetch->origin = origin;
	pthread_mutex_lock(&store->lock);
	for (;;) {
		bool lacks_room;
		struct load *load = NULL;

		if (origin->stopped)
			err = -ESHUTDOWN;
		if (err)
			break;
		load = next_load(origin, demand_only, &fetch->is_prefetch, &lacks_room);
		fetch->image = load ? load->image : NULL;
		if (load && fetch_take(fetch, load, dropped, &nr_dropped))
			break;
		err = wait_for_load(origin, lacks_room || load, &until);
	}
	if (!err) {
		atomic_store(&fetch->since_ns, loader_now_ns());
		fetch->next = origin->fetches;
		origin->fetches = fetch;
		*request_out = (struct fetch_request){
			.image_no = fetch->image->shape.image_no,
			.is_prefetch = fetch->is_prefetch,
			.offset_bytes = fetch->first * fetch->image->shape.extent_pages * PAGE_BYTES,
			.length_bytes = run_bytes(fetch->image, fetch->first, fetch->nr),
		};
	}
	pthread_mutex_unlock(&store->lock);
	if (err) {
		fetch_free(fetch);
		return err;
	}
	room_empty(store, dropped, nr_dropped);
	point_reach(POINT_FETCH_TAKEN);
	*fetch_out = fetch;
	return 0;
}

/* Whether the image is still there; if so it stays until fill_end. */
static bool fill_begin(struct fetch *fetch)
{
	pthread_mutex_lock(&fetch->origin->store->lock);
	fetch->is_filling = fetch->image != NULL;
	pthread_mutex_unlock(&fetch->origin->store->lock);
	return fetch->is_filling;
}

static void fill_end(struct fetch *fetch)
{
	struct store *store = fetch->origin->store;

	pthread_mutex_lock(&store->lock);
	fetch->is_filling = false;
	pthread_cond_broadcast(&store->loaded); /* the image may wait to be closed */
	pthread_mutex_unlock(&store->lock);
}

/* Ends the first nr extents of a fetch: with frames that have been written, or failed. */
static void end_extents(struct fetch *fetch, uint64_t nr, int status)
{
	struct run run = {.image = fetch->image, .first = fetch->first, .is_prefetch = fetch->is_prefetch};

	/* Off the fetch first: once they are RESIDENT, another thread may evict and fetch them. */
	pthread_mutex_lock(&fetch->origin->store->lock);
	fetch->first += nr;
	fetch->nr -= nr;
	fetch->nr_part_bytes = 0;
	pthread_mutex_unlock(&fetch->origin->store->lock);
	run_end(&run, run.first, nr, status);
}

/* Publishes the first nr extents of a fetch; `from` has their bytes, up to the end of the last page. */
static void fill_extents(struct fetch *fetch, uint64_t nr, const char *from)
{
	struct image *image = fetch->image;
	uint64_t first = fetch->first, step = (uint64_t)image->shape.extent_pages * PAGE_BYTES;
	/* Bytes that have a digest are verified here, before any of them is in the frames. */
	int err = point_reach(POINT_FETCH_FILL);

	if (!err)
		err = run_write(image, first, nr, from);
	if (err && nr > 1) { /* one bad place must not fail its neighbours */
		for (uint64_t i = 0; i < nr; i++)
			fill_extents(fetch, 1, from + i * step);
		return;
	}
	int stopped = point_reach(POINT_LOAD_PUBLISH);
	if (!err && stopped) {
		image_punch(image, first, nr);
		err = stopped;
	}
	end_extents(fetch, nr, err);
}

int store_fill(struct fetch *fetch, const void *bytes, uint64_t length_bytes)
{
	const char *from = bytes;
	int err = 0;

	if (!fill_begin(fetch))
		return -ECANCELED;
	if (fetch->nr_part_bytes + length_bytes > run_bytes(fetch->image, fetch->first, fetch->nr))
		err = -EMSGSIZE;
	while (length_bytes && !err) {
		uint64_t extent_bytes = run_bytes(fetch->image, fetch->first, 1);
		uint64_t nr = length_bytes / extent_bytes, wanted = extent_bytes - fetch->nr_part_bytes;
		uint64_t nr_max = load_chunk(fetch->image);

		nr = nr < fetch->nr ? nr : fetch->nr;
		nr = nr < nr_max ? nr : nr_max;
		if (nr && !fetch->nr_part_bytes && extent_bytes % PAGE_BYTES == 0 &&
		    run_bytes(fetch->image, fetch->first, nr) == nr * extent_bytes) {
			wanted = nr * extent_bytes;
			fill_extents(fetch, nr, from);
		} else {
			wanted = wanted < length_bytes ? wanted : length_bytes;
			memcpy(fetch->part + fetch->nr_part_bytes, from, wanted);
			fetch->nr_part_bytes += wanted;
			if (fetch->nr_part_bytes == extent_bytes) {
				memset(fetch->part + extent_bytes, 0,
				       (PAGE_BYTES - extent_bytes % PAGE_BYTES) % PAGE_BYTES);
				fill_extents(fetch, 1, fetch->part);
			}
		}
		from += wanted;
		length_bytes -= wanted;
	}
	atomic_store(&fetch->since_ns, loader_now_ns());
	fill_end(fetch);
	return err;
}

void store_fetch_end(struct fetch *fetch, int err)
{
	struct origin *origin = fetch->origin;
	struct store *store = origin->store;

	if (fill_begin(fetch)) {
		while (fetch->nr)
			end_extents(fetch, fetch->nr < RUN_MAX ? fetch->nr : RUN_MAX, err ? -err : -ENODATA);
		fill_end(fetch);
	}
	pthread_mutex_lock(&store->lock);
	struct fetch **at = &origin->fetches;
	while (*at != fetch)
		at = &(*at)->next;
	*at = fetch->next;
	pthread_cond_broadcast(&store->loaded);
	pthread_mutex_unlock(&store->lock);
	fetch_free(fetch);
}

void fetch_instead(const struct run *run)
{
	struct image *image = run->image;
	struct store *store = image->store;
	struct load *load = malloc(sizeof *load);

	if (!load) {
		run_end(run, run->first, run->nr, -ENOMEM);
		return;
	}
	*load = (struct load){.image = image, .first = run->first, .nr = run->nr};
	pthread_mutex_lock(&store->lock);
	for (uint64_t i = 0; i < run->nr; i++) {
		uint64_t extent = run->first + i;

		if (run->sampled_ns[i])
			sample_end_push(store, image, extent, run->sampled_ns[i], loader_now_ns(),
			                image->waiters[extent]);
		event_push(store, EVENT_DROPPED, 0, image, extent);
	}
	store->loading_extents -= image_room(image, run->first, run->nr);
	store->reserved_extents -= image_room(image, run->first, run->nr);
	image->nr_prefetches += run->is_prefetch;
	load_queue_push(run->is_prefetch ? &image->origin->prefetch : &image->origin->demand, load);
	loaders_wake(store);
	pthread_mutex_unlock(&store->lock);
}

int fetches_abandon(struct image *image)
{
	struct store *store = image->store;
	struct fetch *fetch = image->origin ? image->origin->fetches : NULL;

	while (fetch) {
		if (fetch->image == image && fetch->is_filling) {
			if (store->stop)
				return -ETIMEDOUT;
			pthread_cond_wait(&store->loaded, &store->lock);
			fetch = image->origin->fetches; /* others may have ended */
			continue;
		}
		if (fetch->image == image) {
			uint64_t room = image_room(image, fetch->first, fetch->nr);

			for (uint64_t i = 0; i < fetch->nr; i++)
				extent_step(&image->states[fetch->first + i], EXTENT_LOADING, EXTENT_ABSENT, 0);
			store->loading_extents -= room;
			store->reserved_extents -= room;
			fetch->image = NULL;
			fetch->nr = 0;
		}
		fetch = fetch->next;
	}
	loaders_wake(store);
	return 0;
}

static bool is_queued(const struct load_queue *queue, const struct image *image, uint64_t extent)
{
	for (const struct load *load = queue->head; load; load = load->next)
		if (load->image == image && extent - load->first < load->nr)
			return true;
	return false;
}

const char *origins_check(const struct store *store)
{
	uint64_t room = 0;

	for (const struct origin *origin = store->origins; origin; origin = origin->next)
		for (const struct fetch *fetch = origin->fetches; fetch; fetch = fetch->next) {
			const struct image *image = fetch->image;

			room += image ? image_room(image, fetch->first, fetch->nr) : 0;
			for (uint64_t e = fetch->first; e < fetch->first + fetch->nr; e++)
				if (extent_state(&image->states[e]) != EXTENT_LOADING ||
				    is_queued(&origin->demand, image, e) || is_queued(&origin->prefetch, image, e))
					return "fetch: its extents are LOADING, and in no queue";
		}
	return room > store->loading_extents ? "fetch: the room of fetches in hand is counted in loading_extents"
	                                     : NULL;
}
