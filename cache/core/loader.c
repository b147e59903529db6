/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "cache/core/loader.h"

#include "cache/core/abi.h"
#include "cache/core/points.h"
#include "cache/core/run.h"
#include "cache/core/source.h"
#include "cache/core/store.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

/* A loader's buffer has one huge page, where the system gives one: a device then reads into few segments. */
#define BUFFER_BYTES ((size_t)EXTENT_PAGES_MAX * PAGE_BYTES)
_Static_assert(LOAD_CHUNK_BYTES <= BUFFER_BYTES, "a run is read in one piece");

static uint64_t clock_ns(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

uint64_t loader_now_ns(void)
{
	return clock_ns(CLOCK_MONOTONIC);
}

uint64_t loader_cpu_ns(void)
{
	return clock_ns(CLOCK_THREAD_CPUTIME_ID);
}

struct timespec loader_deadline_in(int timeout_ms)
{
	uint64_t at = loader_now_ns() + (uint64_t)timeout_ms * 1000000u;

	return (struct timespec){.tv_sec = (time_t)(at / 1000000000u), .tv_nsec = (long)(at % 1000000000u)};
}

/* Reads [first, first + nr) and writes whole pages into the frames; the tail of the last page is zero. */
static int run_fill(struct loader *loader, uint64_t first, uint64_t nr, char *buffer)
{
	struct image *image = loader->image;
	uint64_t length = run_bytes(image, first, nr);
	int err = source_read_retrying(loader, buffer, length, first * image->shape.extent_pages * PAGE_BYTES);

	if (err)
		return err;
	memset(buffer + length, 0, (PAGE_BYTES - length % PAGE_BYTES) % PAGE_BYTES);
	return run_write(image, first, nr, buffer);
}

static void run_load(struct loader *loader, const struct run *run, uint64_t first, uint64_t nr, char *buffer)
{
	struct image *image = loader->image;
	int err = run_fill(loader, first, nr, buffer);

	if (err && nr > 1) { /* one bad place must not fail its neighbours */
		for (uint64_t i = 0; i < nr; i++)
			run_load(loader, run, first + i, 1, buffer);
		return;
	}
	int stopped = point_reach(POINT_LOAD_PUBLISH);
	if (!err && stopped) {
		image_punch(image, first, nr);
		err = stopped;
	}
	run_end(run, first, nr, err);
}

/* Takes the next load that this thread may do, under lock; NULL: wait. Sets loader->prefetch and lacks_room. */
static struct load *next_load(struct loader *loader)
{
	struct store *store = loader->store;
	uint64_t none = 0, room = room_left(store);
	struct load *load = load_queue_pop(&store->restores, 0, &none);

	loader->prefetch = loader->lacks_room = false;
	if (load || loader->restores_only)
		return load;
	load = load_queue_pop(&store->demand, store->nr_loaders, &room);
	if (!load && (store->nr_prefetching + 1 < store->nr_loaders || store->nr_loaders == 1)) {
		load = load_queue_pop(&store->prefetch, store->nr_loaders, &room);
		loader->prefetch = load != NULL;
		if (load)
			load->image->nr_prefetches--;
	}
	loader->lacks_room = !load && !room && (store->demand.nr || store->prefetch.nr);
	return load;
}

/* Returns a load, or what is left of it, to the front of its queue; under lock. */
static void load_return(struct loader *loader, struct load *load)
{
	struct store *store = loader->store;

	load->image->nr_prefetches += loader->prefetch;
	load_queue_push_front(loader->prefetch        ? &store->prefetch
	                      : load_is_restore(load) ? &store->restores
	                                              : &store->demand,
	                      load);
}

/* Takes extents off the front of a load into a run, with their room; under lock. false: there was no room after all,
 * and the load is in its queue again. */
static bool run_take(struct loader *loader, struct load *load, struct run *run)
{
	struct store *store = loader->store;
	struct image *image = load->image;
	bool restoring = load_is_restore(load);
	uint64_t nr_max = load_chunk(image), nr = load->nr < nr_max ? load->nr : nr_max;

	*run = (struct run){
		.image = image, .first = load->first, .was_standby = restoring, .is_prefetch = loader->prefetch};
	for (uint64_t i = 0; restoring && i < nr; i++) {
		slot_no slot = image->standby[run->first + i];
		const struct standby_slot *from = &store->standby.slots[slot];

		run->sampled_ns[i] = from->is_sample ? from->since_ns : 0;
		run->touched_ns[i] = from->touched_ns;
		run->ages[i] = (uint8_t)standby_age(&store->standby, slot);
		run->slots[i] = room_take_standby(store, image, run->first + i);
	}
	run->nr = restoring ? nr : room_take(store, image, run->first, nr, run->dropped, &run->nr_dropped);
	load->first += run->nr;
	load->nr -= run->nr;
	if (load->nr)
		load_return(loader, load);
	else
		free(load);
	if (!run->nr)
		return false;
	store->loading_extents += image_room(image, run->first, run->nr);
	store->nr_prefetching += loader->prefetch;
	*(restoring ? &image->nr_restorers : &image->nr_loaders) += 1;
	loader->image = image;
	loader->restoring = restoring;
	if (store->watch_sleeps && !restoring)
		pthread_cond_signal(&store->watch);
	if (!restoring && room_left(store) < store->low_free)
		store_raise_at(POINT_WAKE_EVICTOR, store->pressure_fd);
	return true;
}

void loaders_wake(struct store *store)
{
	if (store->demand.nr || store->prefetch.nr)
		pthread_cond_broadcast(&store->work);
	origins_wake(store);
}

static void wait_for_work(struct loader *loader)
{
	struct store *store = loader->store;
	bool no_room = loader->lacks_room;

	if (no_room)
		store_raise_at(POINT_WAKE_EVICTOR, store->pressure_fd);
	store->nr_waiting_room += no_room;
	store->restorer_waits |= loader->restores_only;
	pthread_cond_wait(loader->restores_only ? &store->soft : &store->work, &store->lock);
	store->restorer_waits &= !loader->restores_only;
	store->nr_waiting_room -= no_room;
}

uint32_t loaders_note_stuck(struct store *store)
{
	uint64_t now = loader_now_ns();
	uint32_t nr_well = 0;

	for (struct loader *loader = store->loaders; loader; loader = loader->next) {
		uint64_t since = atomic_load(&loader->reading_since_ns);

		if (loader->image && !loader->stuck && !loader->restores_only && since &&
		    now - since >= LOAD_STUCK_MS * 1000000ull) {
			loader->stuck = true;
			store->nr_stuck++;
			store->nr_prefetching -= loader->prefetch;
		}
		nr_well += !loader->stuck && !loader->restores_only;
	}
	return nr_well;
}

/* Ends a load, stuck or not; under lock. */
static void loader_end_load(struct loader *loader)
{
	struct store *store = loader->store;

	if (loader->stuck)
		store->nr_stuck--;
	else
		store->nr_prefetching -= loader->prefetch;
	*(loader->restoring ? &loader->image->nr_restorers : &loader->image->nr_loaders) -= 1;
	loader->image = NULL;
	loader->prefetch = loader->restoring = loader->stuck = false;
	pthread_cond_broadcast(&store->loaded);
	loaders_wake(store); /* loads of this image may have waited for it */
}

/* Whether a loader is surplus, because stuck ones were replaced and came back; under lock. */
static bool is_one_too_many(const struct loader *loader)
{
	const struct store *store = loader->store;

	return !loader->restores_only && store->nr_alive - store->nr_stuck > store->nr_loaders;
}

static void loader_forget(struct loader *loader)
{
	struct store *store = loader->store;
	struct loader **at = &store->loaders;

	while (*at != loader)
		at = &(*at)->next;
	*at = loader->next;
	store->nr_alive -= !loader->restores_only;
	free(loader);
	pthread_cond_broadcast(&store->ended);
}

void *loader_main(void *arg)
{
	struct loader *loader = arg;
	struct store *store = loader->store;
	char *buffer = NULL;

	prctl(PR_SET_NAME, loader->restores_only ? "cow-restorer" : "cow-loader");
	while (!buffer && posix_memalign((void **)&buffer, BUFFER_BYTES, BUFFER_BYTES))
		sleep(1); /* nothing can be loaded without it: try until there is memory */
	madvise(buffer, BUFFER_BYTES, MADV_HUGEPAGE);
	pthread_mutex_lock(&store->lock);
	while (!store->stop && !is_one_too_many(loader)) {
		struct load *load = next_load(loader);
		struct run run;

		if (!load || !run_take(loader, load, &run)) {
			wait_for_work(loader);
			continue;
		}
		uint64_t began_ns = loader_now_ns(), began_cpu_ns = loader_cpu_ns();
		pthread_mutex_unlock(&store->lock);

		room_empty(store, run.dropped, run.nr_dropped);
		run.is_restored = loader->restoring && run_restore(&run, buffer) == 0;
		if (run.is_restored)
			run_end(&run, run.first, run.nr, 0);
		else if (run.image->origin)
			fetch_instead(&run);
		else
			run_load(loader, &run, run.first, run.nr, buffer);

		pthread_mutex_lock(&store->lock);
		if (loader->restoring) {
			store->restore_cpu_ns += loader_cpu_ns() - began_cpu_ns;
		} else {
			store->read_ns += loader_now_ns() - began_ns;
			store->read_extents += image_room(loader->image, run.first, run.nr);
		}
		loader_end_load(loader);
	}
	loader_forget(loader);
	pthread_mutex_unlock(&store->lock);
	free(buffer);
	return NULL;
}
