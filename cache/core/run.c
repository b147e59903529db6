/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "cache/core/run.h"

#include "cache/core/points.h"
#include "cache/core/store.h"

#include <errno.h>
#include <unistd.h>

uint64_t load_chunk(const struct image *image)
{
	uint64_t chunk = LOAD_CHUNK_BYTES / PAGE_BYTES / image->shape.extent_pages;

	return chunk ? chunk : 1;
}

uint64_t run_bytes(const struct image *image, uint64_t first, uint64_t nr)
{
	uint64_t step = (uint64_t)image->shape.extent_pages * PAGE_BYTES;
	uint64_t left = image->shape.size_bytes - first * step;

	return nr * step < left ? nr * step : left;
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

int run_write(struct image *image, uint64_t first, uint64_t nr, const char *from)
{
	uint64_t length = run_bytes(image, first, nr);
	uint64_t whole = (length + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
	int err = frames_write(image, from, whole, first * image->shape.extent_pages * PAGE_BYTES);

	if (err)
		image_punch(image, first, nr);
	else
		atomic_fetch_add(&image->totals->load_bytes, length);
	return err;
}

int run_restore(const struct run *run, char *buffer)
{
	struct image *image = run->image;
	struct store *store = image->store;
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
static void count_loaded(const struct run *run, uint64_t extent, bool is_wanted)
{
	struct image *image = run->image;
	struct store *store = image->store;
	uint64_t sampled_ns = run->sampled_ns[extent - run->first];

	if (!run->is_restored)
		atomic_fetch_add(is_wanted ? &image->totals->demand_loads : &image->totals->prefetch_loads, 1);
	else if (is_wanted)
		atomic_fetch_add(sampled_ns ? &image->totals->sample_hits : &image->totals->victim_hits, 1);
	/* What a sampler asked back without a waiter has ended for it already. */
	if (sampled_ns && (is_wanted || run->is_prefetch)) {
		uint64_t touched_ns = is_wanted ? run->touched_ns[extent - run->first] : 0;

		sample_end_push(store, image, extent, sampled_ns, touched_ns ? touched_ns : loader_now_ns(), is_wanted);
	}
	event_push(store, run->is_restored && is_wanted ? EVENT_SOFT_HIT : EVENT_LOADED, run->ages[extent - run->first],
	           image, extent);
}

void run_end(const struct run *run, uint64_t first, uint64_t nr, int status)
{
	struct image *image = run->image;
	struct store *store = image->store;
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
			count_loaded(run, extent, waiters[i]);
		} else if (run->was_standby) {
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
