/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "cache/core/loader.h"

#include "cache/core/abi.h"
#include "cache/core/points.h"
#include "cache/core/store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define LOAD_ATTEMPTS 3
#define RETRY_DELAY_NS 5000000l /* doubled each time */
/* The most extents in one read: LOAD_CHUNK_BYTES of one-page extents. */
#define RUN_MAX (LOAD_CHUNK_BYTES / PAGE_BYTES)
/* A loader's buffer has one huge page, where the system gives one: a device then reads into few segments. */
#define BUFFER_BYTES ((size_t)EXTENT_PAGES_MAX * PAGE_BYTES)
_Static_assert(LOAD_CHUNK_BYTES <= BUFFER_BYTES, "a run is read in one piece");

/* What a loader fills in one go: neighbours, all from the source or all from the standby list. */
struct run {
	uint64_t first, nr;
	slot_no slots[RUN_MAX];            /* the extents' own, if the loader restores */
	uint64_t sampled_ns[RUN_MAX];      /* likewise: when the extent was unmapped as a sample, or 0 */
	uint64_t touched_ns[RUN_MAX];      /* likewise: when its return was asked for, or 0 */
	uint8_t ages[RUN_MAX];             /* likewise: standby_age */
	slot_no dropped[EXTENT_PAGES_MAX]; /* slots whose room was taken for the run */
	uint64_t nr_dropped;
	bool is_restored; /* the bytes came from the standby list */
};

void load_queue_init(struct load_queue *queue)
{
	*queue = (struct load_queue){.tail = &queue->head};
}

void load_queue_push(struct load_queue *queue, struct load *load)
{
	load->next = NULL;
	*queue->tail = load;
	queue->tail = &load->next;
	queue->nr++;
}

static void load_queue_push_front(struct load_queue *queue, struct load *load)
{
	load->next = queue->head;
	if (!queue->head)
		queue->tail = &load->next;
	queue->head = load;
	queue->nr++;
}

static struct load *load_queue_unlink(struct load_queue *queue, struct load **at)
{
	struct load *load = *at;

	*at = load->next;
	if (!load->next)
		queue->tail = at;
	queue->nr--;
	return load;
}

/* Whether the extents of a load come from the standby list: all do, or none. */
static bool is_restore(const struct load *load)
{
	return load->image->standby[load->first] != 0;
}

uint64_t load_chunk(const struct image *image)
{
	uint64_t chunk = LOAD_CHUNK_BYTES / PAGE_BYTES / image->shape.extent_pages;

	return chunk ? chunk : 1;
}

struct load *load_queue_pop(struct load_queue *queue, uint32_t nr_max, uint64_t *room)
{
	for (struct load **at = &queue->head; *at; at = &(*at)->next) {
		const struct load *load = *at;

		if (is_restore(load))
			return load_queue_unlink(queue, at);
		if (load->image->nr_loaders >= nr_max)
			continue;
		if (image_room(load->image, load->first, 1) <= *room)
			return load_queue_unlink(queue, at);
		*room = 0;
	}
	return NULL;
}

struct load *load_queue_take(struct load_queue *queue, const struct image *image, uint64_t extent)
{
	for (struct load **at = &queue->head; *at; at = &(*at)->next)
		if ((*at)->image == image && extent - (*at)->first < (*at)->nr)
			return load_queue_unlink(queue, at);
	return NULL;
}

/* Reads exactly length bytes, or fails: a short file is an error, never a page of zeros. */
static int source_read_all(int fd, char *to, uint64_t length, uint64_t offset, uint64_t asked)
{
	uint64_t done = 0;

	while (done < length) {
		uint64_t some = asked - done;

		if (some > PAGE_BYTES && point_reach(POINT_LOAD_SHORT) < 0)
			some = PAGE_BYTES; /* as after a signal or from a network file system */
		ssize_t got = pread(fd, to + done, some, (off_t)(offset + done));

		if (got < 0 && errno == EINTR)
			continue;
		if (got < 0)
			return -errno;
		if (got == 0)
			return -ENODATA; /* shorter than when it was opened */
		done += (uint64_t)got;
	}
	return 0;
}

/*
 * O_DIRECT keeps a second copy of the source out of the page cache. It needs lengths in whole blocks, so the tail is
 * read in full pages and the read ends short at the end of the file. A file system without O_DIRECT gets buffered
 * reads, and their page cache is dropped.
 */
static int source_read(struct image *image, char *to, uint64_t length, uint64_t offset)
{
	uint64_t whole = (length + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
	int err = point_reach(POINT_LOAD_READ);

	if (err)
		return err;
	err = -EINVAL;
	if (image->direct_fd >= 0)
		err = source_read_all(image->direct_fd, to, length, offset, whole);
	if (err == -EINVAL) {
		err = source_read_all(image->source_fd, to, length, offset, length);
		posix_fadvise(image->source_fd, (off_t)offset, (off_t)whole, POSIX_FADV_DONTNEED);
	}
	return err;
}

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

static int source_read_retrying(struct loader *loader, char *to, uint64_t length, uint64_t offset)
{
	struct image *image = loader->image;
	struct timespec delay = {.tv_nsec = RETRY_DELAY_NS};
	int err = 0;

	for (int attempt = 0; attempt < LOAD_ATTEMPTS; attempt++) {
		atomic_store(&loader->reading_since_ns, loader_now_ns());
		err = source_read(image, to, length, offset);
		atomic_store(&loader->reading_since_ns, 0);
		if (!err || err == -ENODATA || atomic_load(&image->store->stop))
			break;
		if (attempt + 1 < LOAD_ATTEMPTS) {
			atomic_fetch_add(&image->totals->load_retries, 1);
			nanosleep(&delay, NULL);
			delay.tv_nsec *= 2;
		}
	}
	return err;
}

int frames_write(struct image *image, const char *from, uint64_t length, uint64_t offset)
{
	int err = point_reach(POINT_LOAD_FILL);

	pthread_mutex_lock(&image->fill_lock);
	for (uint64_t done = 0; done < length && !err;) {
		ssize_t put = pwrite(image->frames_fd, from + done, length - done, (off_t)(offset + done));

		if (put < 0 && errno != EINTR)
			err = -errno;
		if (put > 0)
			done += (uint64_t)put;
	}
	pthread_mutex_unlock(&image->fill_lock);
	return err;
}

/* Reads [first, first + nr) and writes whole pages into the frames; the tail of the last page is zero. */
static int run_fill(struct loader *loader, uint64_t first, uint64_t nr, char *buffer)
{
	struct image *image = loader->image;
	uint64_t step = (uint64_t)image->shape.extent_pages * PAGE_BYTES;
	uint64_t offset = first * step;
	uint64_t length = nr * step;

	if (length > image->shape.size_bytes - offset)
		length = image->shape.size_bytes - offset;
	int err = source_read_retrying(loader, buffer, length, offset);
	if (err)
		return err;
	uint64_t whole = (length + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
	memset(buffer + length, 0, whole - length);
	err = frames_write(image, buffer, whole, offset);
	if (err)
		image_punch(image, first, nr);
	else
		atomic_fetch_add(&image->totals->load_bytes, length);
	return err;
}

/* Copies a run from the standby list to the frames. Fails only if a read or write of a memfd fails; the caller then
 * reads the source. */
static int run_restore(struct loader *loader, const struct run *run, char *buffer)
{
	struct store *store = loader->store;
	struct image *image = loader->image;
	uint64_t nr_pages = 0;
	int err = 0;

	for (uint64_t i = 0; i < run->nr && !err; i++) {
		err = standby_read(&store->standby, run->slots[i], image, run->first + i,
		                   buffer + nr_pages * PAGE_BYTES);
		nr_pages += image_extent_pages(image, run->first + i);
	}
	room_empty(store, run->slots, run->nr); /* its room is what the frames take now */
	if (!err)
		err = frames_write(image, buffer, nr_pages * PAGE_BYTES, run->first * store->standby.slot_bytes);
	return err;
}

/* Counts an extent that became RESIDENT and reports it to the policy; under lock. */
static void count_loaded(struct loader *loader, const struct run *run, uint64_t extent, bool is_wanted)
{
	struct image *image = loader->image;
	struct store *store = loader->store;
	uint64_t sampled_ns = run->sampled_ns[extent - run->first];

	if (!run->is_restored)
		atomic_fetch_add(is_wanted ? &image->totals->demand_loads : &image->totals->prefetch_loads, 1);
	else if (is_wanted)
		atomic_fetch_add(sampled_ns ? &image->totals->sample_hits : &image->totals->victim_hits, 1);
	/* What a sampler asked back without a waiter has ended for it already. */
	if (sampled_ns && (is_wanted || loader->prefetch)) {
		uint64_t touched_ns = is_wanted ? run->touched_ns[extent - run->first] : 0;

		sample_end_push(store, image, extent, sampled_ns, touched_ns ? touched_ns : loader_now_ns(), is_wanted);
	}
	event_push(store, run->is_restored && is_wanted ? EVENT_SOFT_HIT : EVENT_LOADED, run->ages[extent - run->first],
	           image, extent);
}

/* Ends the load of nr extents of a run: makes them RESIDENT or, on error, ABSENT, and answers the waiters. */
static void run_end(struct loader *loader, const struct run *run, uint64_t first, uint64_t nr, int status)
{
	struct store *store = loader->store;
	struct image *image = loader->image;
	struct load_waiter *waiters[RUN_MAX];
	bool held[RUN_MAX];
	bool repair = status == 0 && atomic_load(&image->nr_poisoned) > 0;

	assert(nr <= RUN_MAX);
	pthread_mutex_lock(&store->lock);
	for (uint64_t i = 0; i < nr; i++) {
		uint64_t extent = first + i;

		waiters[i] = image->waiters[extent];
		image->waiters[extent] = NULL;
		held[i] = status == 0 && (waiters[i] || repair);
		if (status == 0) {
			atomic_fetch_add(&image->resident_pages, image_extent_pages(image, extent));
			count_loaded(loader, run, extent, waiters[i]);
		} else if (loader->restoring) {
			event_push(store, EVENT_DROPPED, 0, image, extent);
		}
		extent_step(&image->states[extent], EXTENT_LOADING, status == 0 ? EXTENT_RESIDENT : EXTENT_ABSENT,
		            held[i]);
	}
	if (status)
		atomic_fetch_add(&image->totals->load_errors, nr);
	atomic_fetch_add(&image->generation, 1);
	store->loading_extents -= image_room(image, first, nr);
	if (status) {
		store->reserved_extents -= image_room(image, first, nr);
		loaders_wake(store);
	}
	pthread_mutex_unlock(&store->lock);
	point_reach(POINT_LOAD_ANSWER);

	for (uint64_t i = 0; i < nr; i++) {
		void (*mend)(struct image *, uint64_t) = atomic_load(&image->repair);

		if (repair && mend)
			mend(image, first + i);
		for (struct load_waiter *next, *waiter = waiters[i]; waiter; waiter = next) {
			next = waiter->next;
			waiter->restored = run->is_restored;
			waiter->answer(waiter, status);
		}
		if (held[i])
			extent_release(&image->states[first + i]);
	}
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
	run_end(loader, run, first, nr, err);
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
	load_queue_push_front(loader->prefetch   ? &store->prefetch
	                      : is_restore(load) ? &store->restores
	                                         : &store->demand,
	                      load);
}

/* Takes extents off the front of a load into a run, with their room; under lock. false: there was no room after all,
 * and the load is in its queue again. */
static bool run_take(struct loader *loader, struct load *load, struct run *run)
{
	struct store *store = loader->store;
	struct image *image = load->image;
	bool restoring = is_restore(load);
	uint64_t nr_max = load_chunk(image), nr = load->nr < nr_max ? load->nr : nr_max;

	*run = (struct run){.first = load->first};
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
		run.is_restored = loader->restoring && run_restore(loader, &run, buffer) == 0;
		if (run.is_restored)
			run_end(loader, &run, run.first, run.nr, 0);
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
