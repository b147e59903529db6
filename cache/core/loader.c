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
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

#define LOAD_ATTEMPTS 3
#define RETRY_DELAY_NS 5000000l /* doubled each time */
/* The most extents in one read: LOAD_CHUNK_BYTES of one-page extents. */
#define RUN_MAX (LOAD_CHUNK_BYTES / PAGE_BYTES)

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

struct load *load_queue_pop(struct load_queue *queue, uint32_t nr_max)
{
	for (struct load **at = &queue->head; *at; at = &(*at)->next)
		if ((*at)->image->nr_loaders < nr_max)
			return load_queue_unlink(queue, at);
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

uint64_t loader_now_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
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

static int frames_write(struct image *image, const char *from, uint64_t length, uint64_t offset)
{
	int err = point_reach(POINT_LOAD_FILL);

	for (uint64_t done = 0; done < length && !err;) {
		ssize_t put = pwrite(image->frames_fd, from + done, length - done, (off_t)(offset + done));

		if (put < 0 && errno != EINTR)
			err = -errno;
		if (put > 0)
			done += (uint64_t)put;
	}
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

/* Ends the load of a run: makes its extents RESIDENT or, on error, ABSENT, and answers the waiters. */
static void run_end(struct store *store, struct image *image, uint64_t first, uint64_t nr, int status)
{
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
			atomic_fetch_add(waiters[i] ? &image->totals->demand_loads : &image->totals->prefetch_loads, 1);
			inserted_push(store, image, extent);
		}
		extent_step(&image->states[extent], EXTENT_LOADING, status == 0 ? EXTENT_RESIDENT : EXTENT_ABSENT,
		            held[i]);
	}
	if (status)
		atomic_fetch_add(&image->totals->load_errors, nr);
	atomic_fetch_add(&image->generation, 1);
	store->loading_extents -= nr;
	if (status) {
		store->reserved_extents -= nr;
		pthread_cond_broadcast(&store->work);
	}
	pthread_mutex_unlock(&store->lock);
	point_reach(POINT_LOAD_ANSWER);

	for (uint64_t i = 0; i < nr; i++) {
		void (*mend)(struct image *, uint64_t) = atomic_load(&image->repair);

		if (repair && mend)
			mend(image, first + i);
		for (struct load_waiter *next, *waiter = waiters[i]; waiter; waiter = next) {
			next = waiter->next;
			waiter->answer(waiter, status);
		}
		if (held[i])
			extent_release(&image->states[first + i]);
	}
}

static void run_load(struct loader *loader, uint64_t first, uint64_t nr, char *buffer)
{
	struct store *store = loader->store;
	struct image *image = loader->image;
	int err = run_fill(loader, first, nr, buffer);

	if (err && nr > 1) { /* one bad place must not fail its neighbours */
		for (uint64_t i = 0; i < nr; i++)
			run_load(loader, first + i, 1, buffer);
		return;
	}
	int stopped = point_reach(POINT_LOAD_PUBLISH);
	if (!err && stopped) {
		image_punch(image, first, nr);
		err = stopped;
	}
	run_end(store, image, first, nr, err);
}

/* Takes the next load that has room and that this thread may do, under lock; NULL: wait. */
static struct load *next_load(struct store *store, bool *prefetch_out)
{
	struct load *load = NULL;

	*prefetch_out = false;
	if (store->reserved_extents >= store->capacity_extents)
		return NULL;
	load = load_queue_pop(&store->demand, store->nr_loaders);
	if (!load && (store->nr_prefetching + 1 < store->nr_loaders || store->nr_loaders == 1)) {
		load = load_queue_pop(&store->prefetch, store->nr_loaders);
		*prefetch_out = load != NULL;
		if (load)
			load->image->nr_prefetches--;
	}
	return load;
}

static void wait_for_work(struct store *store)
{
	bool no_room = store->reserved_extents >= store->capacity_extents && (store->demand.nr || store->prefetch.nr);

	if (no_room)
		store_raise_at(POINT_WAKE_EVICTOR, store->pressure_fd);
	store->nr_waiting_room += no_room;
	pthread_cond_wait(&store->work, &store->lock);
	store->nr_waiting_room -= no_room;
}

uint32_t loaders_note_stuck(struct store *store)
{
	uint64_t now = loader_now_ns();
	uint32_t nr_well = 0;

	for (struct loader *loader = store->loaders; loader; loader = loader->next) {
		uint64_t since = atomic_load(&loader->reading_since_ns);

		if (loader->image && !loader->stuck && since && now - since >= LOAD_STUCK_MS * 1000000ull) {
			loader->stuck = true;
			store->nr_stuck++;
			store->nr_prefetching -= loader->prefetch;
		}
		nr_well += !loader->stuck;
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
	loader->image->nr_loaders--;
	loader->image = NULL;
	loader->prefetch = loader->stuck = false;
	pthread_cond_broadcast(&store->loaded);
	pthread_cond_broadcast(&store->work); /* loads of this image may have waited for it */
}

/* Whether a loader is surplus, because stuck ones were replaced and came back; under lock. */
static bool is_one_too_many(const struct store *store)
{
	return store->nr_alive - store->nr_stuck > store->nr_loaders;
}

static void loader_forget(struct loader *loader)
{
	struct store *store = loader->store;
	struct loader **at = &store->loaders;

	while (*at != loader)
		at = &(*at)->next;
	*at = loader->next;
	free(loader);
	store->nr_alive--;
	pthread_cond_broadcast(&store->ended);
}

void *loader_main(void *arg)
{
	struct loader *loader = arg;
	struct store *store = loader->store;
	uint64_t step = (uint64_t)store->extent_pages * PAGE_BYTES;
	uint64_t chunk = step > LOAD_CHUNK_BYTES ? 1 : LOAD_CHUNK_BYTES / step;
	char *buffer = NULL;

	prctl(PR_SET_NAME, "cow-loader");
	while (!buffer && posix_memalign((void **)&buffer, PAGE_BYTES, chunk * step))
		sleep(1); /* nothing can be loaded without it: try until there is memory */
	pthread_mutex_lock(&store->lock);
	while (!store->stop && !is_one_too_many(store)) {
		bool prefetch;
		struct load *load = next_load(store, &prefetch);

		if (!load) {
			wait_for_work(store);
			continue;
		}
		struct image *image = load->image;
		uint64_t first = load->first, nr = load->nr;
		uint64_t room = store->capacity_extents - store->reserved_extents;

		nr = nr > chunk ? chunk : nr;
		nr = nr > room ? room : nr;
		load->first += nr;
		load->nr -= nr;
		if (load->nr) {
			load_queue_push_front(prefetch ? &store->prefetch : &store->demand, load);
			image->nr_prefetches += prefetch;
		} else {
			free(load);
		}
		store->reserved_extents += nr;
		store->loading_extents += nr;
		store->nr_prefetching += prefetch;
		image->nr_loaders++;
		loader->image = image;
		loader->prefetch = prefetch;
		if (store->watch_sleeps)
			pthread_cond_signal(&store->watch);
		if (room - nr < store->low_free)
			store_raise_at(POINT_WAKE_EVICTOR, store->pressure_fd);
		pthread_mutex_unlock(&store->lock);

		run_load(loader, first, nr, buffer);

		pthread_mutex_lock(&store->lock);
		loader_end_load(loader);
	}
	loader_forget(loader);
	pthread_mutex_unlock(&store->lock);
	free(buffer);
	return NULL;
}
