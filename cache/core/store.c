/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "cache/core/store.h"

#include "cache/core/abi.h"
#include "cache/core/collapse.h"
#include "cache/core/points.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define LOADER_STACK_BYTES (256u << 10)
#define WATCH_MS 250

static int thread_start(pthread_t *thread, void *(*run)(void *), void *arg)
{
	pthread_attr_t attr;

	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, LOADER_STACK_BYTES);
	int err = pthread_create(thread, &attr, run, arg);
	pthread_attr_destroy(&attr);
	return -err;
}

/* Starts one more loader; under lock. Loaders are detached: one that hangs must not delay the exit. */
static int loader_start(struct store *store, bool restores_only)
{
	struct loader *loader = calloc(1, sizeof *loader);
	pthread_t thread;

	if (!loader)
		return -ENOMEM;
	loader->store = store;
	loader->restores_only = restores_only;
	int err = thread_start(&thread, loader_main, loader);
	if (err) {
		free(loader);
		return err;
	}
	pthread_detach(thread);
	loader->next = store->loaders;
	store->loaders = loader;
	store->nr_alive += !restores_only;
	return 0;
}

static bool loads_in_hand(const struct store *store)
{
	for (const struct loader *loader = store->loaders; loader; loader = loader->next)
		if (loader->image && !loader->restoring)
			return true;
	return false;
}

static void *watcher_main(void *arg)
{
	struct store *store = arg;

	prctl(PR_SET_NAME, "cow-loadwatch");
	pthread_mutex_lock(&store->lock);
	while (!store->stop) {
		if (!loads_in_hand(store)) {
			store->watch_sleeps = true;
			pthread_cond_wait(&store->watch, &store->lock);
			store->watch_sleeps = false;
			continue;
		}
		struct timespec until = loader_deadline_in(WATCH_MS);
		pthread_cond_timedwait(&store->watch, &store->lock, &until);
		for (uint32_t nr = loaders_note_stuck(store); nr < store->nr_loaders && !store->stop; nr++)
			if (loader_start(store, false) < 0)
				break; /* tried again at the next look */
	}
	pthread_mutex_unlock(&store->lock);
	return NULL;
}

/* Returns 0 once all loaders have ended; timeout_ms < 0: waits without limit. */
static int stop_loaders(struct store *store, int timeout_ms)
{
	struct timespec until = loader_deadline_in(timeout_ms < 0 ? 0 : timeout_ms);
	int err = 0;

	pthread_mutex_lock(&store->lock);
	store->stop = true;
	pthread_cond_broadcast(&store->work);
	pthread_cond_broadcast(&store->soft);
	pthread_cond_broadcast(&store->loaded);
	pthread_cond_broadcast(&store->watch);
	while (store->loaders && err != ETIMEDOUT) {
		if (timeout_ms < 0)
			pthread_cond_wait(&store->ended, &store->lock);
		else
			err = pthread_cond_timedwait(&store->ended, &store->lock, &until);
	}
	bool is_watched = store->is_watched;
	store->is_watched = false;
	err = store->loaders ? -ETIMEDOUT : 0;
	pthread_mutex_unlock(&store->lock);
	if (is_watched)
		pthread_join(store->watcher, NULL);
	return err;
}

static void store_free(struct store *store)
{
	if (store->pressure_fd >= 0)
		close(store->pressure_fd);
	if (store->notice_fd >= 0)
		close(store->notice_fd);
	if (store->wanted_fd >= 0)
		close(store->wanted_fd);
	free(store->events);
	free(store->sample_ends);
	standby_deinit(&store->standby);
	pthread_cond_destroy(&store->work);
	pthread_cond_destroy(&store->soft);
	pthread_cond_destroy(&store->loaded);
	pthread_cond_destroy(&store->watch);
	pthread_cond_destroy(&store->ended);
	pthread_mutex_destroy(&store->lock);
	free(store);
}

static uint32_t standby_batch(uint64_t capacity_extents)
{
	uint64_t share = capacity_extents / 128;

	return share < 1 ? 1 : share > STANDBY_BATCH ? STANDBY_BATCH : (uint32_t)share;
}

int store_init(uint64_t capacity_extents, uint32_t extent_pages, uint32_t nr_loaders, uint64_t low_free,
               uint64_t standby_max, struct store **store_out)
{
	int err = 0;

	if (!capacity_extents || !extent_pages || extent_pages & (extent_pages - 1) || !nr_loaders)
		return -EINVAL;
	if (extent_pages > EXTENT_PAGES_MAX || standby_max >= capacity_extents)
		return -EINVAL;
	struct store *store = calloc(1, sizeof *store);
	if (!store)
		return -ENOMEM;
	store->capacity_extents = capacity_extents;
	store->extent_pages = extent_pages;
	store->low_free = low_free;
	store->standby_max = standby_max;
	store->nr_event_slots = 4 * capacity_extents + 1024;
	pthread_mutex_init(&store->lock, NULL);
	pthread_cond_init(&store->work, NULL);
	pthread_cond_init(&store->soft, NULL);
	pthread_condattr_t monotonic;
	pthread_condattr_init(&monotonic);
	pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
	pthread_cond_init(&store->loaded, &monotonic);
	pthread_cond_init(&store->watch, &monotonic);
	pthread_cond_init(&store->ended, &monotonic);
	pthread_condattr_destroy(&monotonic);
	load_queue_init(&store->demand);
	load_queue_init(&store->prefetch);
	load_queue_init(&store->restores);
	store->pressure_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	store->notice_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	store->wanted_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	store->events = calloc(store->nr_event_slots, sizeof *store->events);
	store->sample_ends = calloc(NR_SAMPLE_ENDS, sizeof *store->sample_ends);
	store->nr_loaders = nr_loaders;
	if (store->pressure_fd < 0 || store->notice_fd < 0 || store->wanted_fd < 0)
		err = -EMFILE;
	else if (!store->events || !store->sample_ends)
		err = -ENOMEM;
	else if (standby_max)
		err = standby_init(&store->standby, standby_max, standby_batch(capacity_extents),
		                   (uint64_t)extent_pages * PAGE_BYTES);
	pthread_mutex_lock(&store->lock);
	for (uint32_t i = 0; i < nr_loaders && !err; i++)
		err = loader_start(store, false);
	if (!err && standby_max)
		err = loader_start(store, true);
	if (!err)
		err = thread_start(&store->watcher, watcher_main, store);
	store->is_watched = !err;
	pthread_mutex_unlock(&store->lock);
	if (err) {
		stop_loaders(store, -1);
		store_free(store);
		return err;
	}
	*store_out = store;
	return 0;
}

int store_deinit(struct store *store)
{
	pthread_mutex_lock(&store->lock);
	bool busy = store->images || store->origins;
	pthread_mutex_unlock(&store->lock);
	if (busy)
		return -EBUSY;
	if (stop_loaders(store, store->stop ? 0 : -1) < 0)
		return -ETIMEDOUT;
	assert(store->reserved_extents == 0 && store->loading_extents == 0 && store->pinned_extents == 0);
	store_free(store);
	return 0;
}

int store_stop(struct store *store, int timeout_ms)
{
	store_cancel_loads(store);
	return stop_loaders(store, timeout_ms);
}

void store_raise(int eventfd)
{
	uint64_t one = 1;

	/* Only EAGAIN is possible, when the counter is full: then the reader has news already. */
	if (write(eventfd, &one, sizeof one) < 0)
		assert(errno == EAGAIN);
}

void store_raise_at(int point, int eventfd)
{
	if (point_reach(point) >= 0)
		store_raise(eventfd);
}

uint32_t store_extent_pages(const struct store *store)
{
	return store->extent_pages;
}

int store_pressure_fd(const struct store *store)
{
	return store->pressure_fd;
}

int store_notice_fd(const struct store *store)
{
	return store->notice_fd;
}

int store_wanted_fd(const struct store *store)
{
	return store->wanted_fd;
}

int store_standby_fd(const struct store *store)
{
	return store->standby.slots ? store->standby.fd : -1;
}

void store_count(struct store *store, struct store_counters *counters_out)
{
	pthread_mutex_lock(&store->lock);
	*counters_out = (struct store_counters){
		.capacity_extents = store->capacity_extents,
		.reserved_extents = store->reserved_extents,
		.standby_extents = standby_nr(&store->standby),
		.standby_limit = store->standby.limit,
		.standby_pages = store->standby.nr_pages,
		.standby_moving = store->standby.nr_in_hand + store->standby.nr_dropping,
		.room_extents = room_left(store),
		.loading_extents = store->loading_extents,
		.pinned_extents = store->pinned_extents,
		.read_ns = store->read_ns,
		.read_extents = store->read_extents,
		.fill_cpu_ns = store->fill_cpu_ns,
		.restore_cpu_ns = store->restore_cpu_ns,
		.nr_waiting_loaders = store->nr_waiting_room,
		.queued_loads = store->demand.nr + store->prefetch.nr + store->restores.nr,
	};
	for (const struct origin *origin = store->origins; origin; origin = origin->next)
		counters_out->queued_loads += origin->demand.nr + origin->prefetch.nr;
	pthread_mutex_unlock(&store->lock);
}

int64_t store_take_events(struct store *store, uint64_t *events_out, uint64_t nr_max)
{
	int64_t nr = 0;

	pthread_mutex_lock(&store->lock);
	if (store->events_head - store->events_tail > store->nr_event_slots) {
		store->events_tail = store->events_head; /* some were lost: the caller must look at the states */
		nr = -EOVERFLOW;
	}
	while (nr >= 0 && (uint64_t)nr < nr_max && store->events_tail != store->events_head)
		events_out[nr++] = store->events[store->events_tail++ % store->nr_event_slots];
	pthread_mutex_unlock(&store->lock);
	return nr;
}

void event_push(struct store *store, enum store_event kind, uint32_t age, const struct image *image, uint64_t extent)
{
	uint64_t entry = (uint64_t)kind << EVENT_KIND_SHIFT | (uint64_t)age << EVENT_AGE_SHIFT |
	                 (uint64_t)image->shape.image_no << EVENT_IMAGE_SHIFT | extent;

	store->events[store->events_head++ % store->nr_event_slots] = entry;
}

void sample_end_push(struct store *store, const struct image *image, uint64_t extent, uint64_t unmapped_ns,
                     uint64_t ended_ns, bool touched)
{
	store->sample_ends[store->sample_ends_head++ % NR_SAMPLE_ENDS] =
		(struct sample_end){.image_no = image->shape.image_no,
		                    .extent = (uint32_t)extent,
		                    .unmapped_ns = unmapped_ns,
		                    .ended_ns = ended_ns,
		                    .touched = touched};
}

int64_t store_take_sample_ends(struct store *store, struct sample_end *ends_out, uint64_t nr_max)
{
	int64_t nr = 0;

	pthread_mutex_lock(&store->lock);
	if (store->sample_ends_head - store->sample_ends_tail > NR_SAMPLE_ENDS)
		store->sample_ends_tail = store->sample_ends_head - NR_SAMPLE_ENDS;
	while ((uint64_t)nr < nr_max && store->sample_ends_tail != store->sample_ends_head)
		ends_out[nr++] = store->sample_ends[store->sample_ends_tail++ % NR_SAMPLE_ENDS];
	pthread_mutex_unlock(&store->lock);
	return nr;
}

static void add_image(struct store *store, struct image *image)
{
	image->shape.image_no = store->nr_images_ever++;
	image->next = store->images;
	store->images = image;
	if (image->origin)
		image->origin->nr_images++;
}

void store_add_image(struct store *store, struct image *image)
{
	pthread_mutex_lock(&store->lock);
	add_image(store, image);
	pthread_mutex_unlock(&store->lock);
}

int store_adopt_image(struct store *store, struct image *image)
{
	pthread_mutex_lock(&store->lock);
	uint64_t room = store->capacity_extents > store->reserved_extents
	                        ? store->capacity_extents - store->reserved_extents
	                        : 0;
	int64_t nr_room = arrays_mend(image, room);
	if (nr_room >= 0) {
		store->reserved_extents += (uint64_t)nr_room;
		add_image(store, image);
	}
	for (uint64_t e = 0; nr_room >= 0 && e < image->shape.nr_extents; e++) {
		if (image_is_pinned(image, e))
			store->pinned_extents += image_room(image, e, 1);
		if (extent_state(&image->states[e]) == EXTENT_RESIDENT)
			event_push(store, EVENT_LOADED, 0, image, e);
	}
	pthread_mutex_unlock(&store->lock);
	return nr_room < 0 ? (int)nr_room : 0;
}

/* LOADING -> ABSENT for an extent that no loader has in hand. */
static void unqueue(struct image *image, uint64_t extent)
{
	standby_unclaim(&image->store->standby, image, extent);
	extent_step(&image->states[extent], EXTENT_LOADING, EXTENT_ABSENT, 0);
}

/* Drops the queued loads of an image, or of all (NULL). */
static void queue_purge(struct load_queue *queue, const struct image *image)
{
	struct load *load = queue->head;

	load_queue_init(queue);
	while (load) {
		struct load *next = load->next;

		if (!image || load->image == image) {
			for (uint64_t i = 0; i < load->nr; i++)
				unqueue(load->image, load->first + i);
			load->image->nr_prefetches = 0; /* right for the other queues, too: all are purged */
			free(load);
		} else {
			load_queue_push(queue, load);
		}
		load = next;
	}
}

/* Moves an image's waiters, after their loads were purged, to the list taken; returns the list. */
static struct load_waiter *waiters_take(struct image *image, struct load_waiter *taken)
{
	if (!image->was_waited_for)
		return taken;

	for (uint64_t e = 0; e < image->shape.nr_extents; e++)
		for (struct load_waiter *next, *waiter = image->waiters[e]; waiter; waiter = next) {
			next = waiter->next;
			waiter->next = taken;
			taken = waiter;
			image->waiters[e] = NULL;
		}
	return taken;
}

static uint64_t next_in_state(const struct image *image, uint64_t from, enum extent_state state)
{
	while (from < image->shape.nr_extents && extent_state(&image->states[from]) != state)
		from++;
	return from;
}

static void waiters_cancel(struct load_waiter *waiters, int err)
{
	for (struct load_waiter *next; waiters; waiters = next) {
		next = waiters->next;
		waiters->answer(waiters, err);
	}
}

void store_cancel_loads(struct store *store)
{
	struct load_waiter *waiters = NULL;

	pthread_mutex_lock(&store->lock);
	store->cancelled = true;
	queue_purge(&store->demand, NULL);
	queue_purge(&store->prefetch, NULL);
	queue_purge(&store->restores, NULL);
	for (struct origin *origin = store->origins; origin; origin = origin->next) {
		queue_purge(&origin->demand, NULL);
		queue_purge(&origin->prefetch, NULL);
	}
	for (struct image *image = store->images; image; image = image->next)
		waiters = waiters_take(image, waiters);
	pthread_cond_broadcast(&store->loaded);
	pthread_mutex_unlock(&store->lock);
	waiters_cancel(waiters, -ESHUTDOWN);
}

uint64_t store_read_wait_ns(struct store *store, const struct image *image)
{
	uint64_t now = loader_now_ns(), longest = 0;

	pthread_mutex_lock(&store->lock);
	for (struct loader *loader = store->loaders; loader; loader = loader->next) {
		uint64_t since = loader->image == image ? atomic_load(&loader->reading_since_ns) : 0;

		if (since && since < now && now - since > longest)
			longest = now - since;
	}
	uint64_t since = fetch_waits_since_ns(image);
	if (since && since < now && now - since > longest)
		longest = now - since;
	pthread_mutex_unlock(&store->lock);
	return longest;
}

/* Drops the loads of an image that no loader has in hand. */
static int loads_drop(struct store *store, struct image *image)
{
	queue_purge(&store->demand, image);
	queue_purge(&store->prefetch, image);
	queue_purge(&store->restores, image);
	if (!image->origin)
		return 0;
	queue_purge(&image->origin->demand, image);
	queue_purge(&image->origin->prefetch, image);
	return fetches_abandon(image);
}

int store_remove_image(struct store *store, struct image *image)
{
	pthread_mutex_lock(&store->lock);
	int err = loads_drop(store, image);
	/* A loader still uses the image after publishing its extents: it answers waiters and releases its holds. */
	while (!err && (image->nr_loaders || image->nr_restorers ||
	                next_in_state(image, 0, EXTENT_LOADING) < image->shape.nr_extents)) {
		if (store->stop) {
			err = -ETIMEDOUT;
			break;
		}
		pthread_cond_wait(&store->loaded, &store->lock);
		if (image->origin) /* a fetch instead of a restore may have begun meanwhile */
			err = loads_drop(store, image);
	}
	if (err) {
		pthread_mutex_unlock(&store->lock);
		return err;
	}
	struct load_waiter *waiters = waiters_take(image, NULL);
	for (uint64_t e = 0; e < image->shape.nr_extents; e++) {
		if (!image_is_pinned(image, e))
			continue; /* not written: in an image of terabytes these arrays are holes */
		store->pinned_extents -= image_room(image, e, 1);
		atomic_store(&image->pins[e], 0);
		atomic_store(&image->loans[e], 0);
	}
	pthread_mutex_unlock(&store->lock);

	waiters_cancel(waiters, -ECANCELED);
	for (uint64_t e = 0; (e = next_in_state(image, e, EXTENT_RESIDENT)) < image->shape.nr_extents; e++) {
		uint32_t extent = (uint32_t)e;

		if (store_begin_evict(image, &extent, 1) == 1)
			store_abandon(image, &extent, 1); /* closing the memfd drops the frames */
	}
	room_drop_image(image);

	pthread_mutex_lock(&store->lock);
	struct image **at = &store->images;
	while (*at != image)
		at = &(*at)->next;
	*at = image->next;
	if (image->origin)
		image->origin->nr_images--;
	pthread_mutex_unlock(&store->lock);
	return 0;
}

int store_wait_loaded(struct image *image, uint64_t first, uint64_t nr, int timeout_ms)
{
	struct store *store = image->store;
	struct timespec deadline;
	int err = 0;

	if (first > image->shape.nr_extents || nr > image->shape.nr_extents - first)
		return -ERANGE;
	deadline = loader_deadline_in(timeout_ms);
	pthread_mutex_lock(&store->lock);
	while (!store->stop && err != ETIMEDOUT && next_in_state(image, first, EXTENT_LOADING) < first + nr)
		err = pthread_cond_timedwait(&store->loaded, &store->lock, &deadline);
	bool done = next_in_state(image, first, EXTENT_LOADING) >= first + nr;
	pthread_mutex_unlock(&store->lock);
	return done ? 0 : -ETIMEDOUT;
}

/* counts: the image's pins or its loans. */
static int pin(struct image *image, _Atomic uint32_t *counts, uint64_t first, uint64_t nr, uint64_t max_pinned)
{
	struct store *store = image->store;
	uint64_t nr_new = 0;
	int err = 0;

	if (first > image->shape.nr_extents || nr > image->shape.nr_extents - first)
		return -ERANGE;
	pthread_mutex_lock(&store->lock);
	for (uint64_t i = 0; i < nr; i++)
		nr_new += image_is_pinned(image, first + i) ? 0 : image_room(image, first + i, 1);
	if (counts == image->loans && max_pinned != UINT64_MAX && region_is_parted(image, first, nr)) {
		err = -EBUSY;
	} else if (nr_new && store->pinned_extents + nr_new > max_pinned) {
		err = -ENOSPC;
	} else {
		for (uint64_t i = 0; i < nr; i++)
			atomic_fetch_add(&counts[first + i], 1);
		store->pinned_extents += nr_new;
	}
	pthread_mutex_unlock(&store->lock);
	return err;
}

static int unpin(struct image *image, _Atomic uint32_t *counts, uint64_t first, uint64_t nr)
{
	struct store *store = image->store;
	int err = 0;

	if (first > image->shape.nr_extents || nr > image->shape.nr_extents - first)
		return -ERANGE;
	pthread_mutex_lock(&store->lock);
	for (uint64_t i = 0; i < nr && !err; i++)
		if (atomic_load(&counts[first + i]) == 0)
			err = -ENOENT;
	for (uint64_t i = 0; i < nr && !err; i++) {
		atomic_fetch_sub(&counts[first + i], 1);
		store->pinned_extents -= image_is_pinned(image, first + i) ? 0 : image_room(image, first + i, 1);
	}
	pthread_mutex_unlock(&store->lock);
	return err;
}

int store_pin(struct image *image, uint64_t first, uint64_t nr, uint64_t max_pinned)
{
	return pin(image, image->pins, first, nr, max_pinned);
}

int store_unpin(struct image *image, uint64_t first, uint64_t nr)
{
	return unpin(image, image->pins, first, nr);
}

int store_lend(struct image *image, uint64_t first, uint64_t nr, uint64_t max_pinned)
{
	return pin(image, image->loans, first, nr, max_pinned);
}

int store_end_loan(struct image *image, uint64_t first, uint64_t nr)
{
	return unpin(image, image->loans, first, nr);
}
