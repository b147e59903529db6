/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "cache/core/image.h"

#include "cache/core/abi.h"
#include "cache/core/collapse.h"
#include "cache/core/frames.h"
#include "cache/core/loader.h"
#include "cache/core/points.h"
#include "cache/core/store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static void image_deinit(struct image *image)
{
	arrays_close(image);
	if (image->guest_fd >= 0)
		close(image->guest_fd);
	if (image->frames_fd >= 0)
		close(image->frames_fd);
	pthread_rwlock_destroy(&image->accounts_lock);
	pthread_mutex_destroy(&image->fill_lock);
	free(image);
}

static bool can_open(const struct store *store, uint64_t size_bytes, uint32_t extent_pages)
{
	uint32_t least = store_extent_pages(store);

	return size_bytes != 0 && size_bytes >> 48 == 0 && extent_pages >= least && extent_pages % least == 0 &&
	       (extent_pages & (extent_pages - 1)) == 0 && extent_pages <= EXTENT_PAGES_MAX;
}

static struct image *image_new(struct store *store, const struct image_source *source, uint64_t size_bytes,
                               uint32_t extent_pages)
{
	uint64_t nr_pages = (size_bytes + PAGE_BYTES - 1) / PAGE_BYTES;
	struct image *image = calloc(1, sizeof *image);

	if (!image)
		return NULL;
	image->store = store;
	image->room_pages = store_extent_pages(store);
	image->shape = (struct image_shape){
		.extent_pages = extent_pages,
		.size_bytes = size_bytes,
		.map_bytes = nr_pages * PAGE_BYTES,
		.nr_pages = nr_pages,
		.nr_extents = (nr_pages + extent_pages - 1) / extent_pages,
	};
	image->frames_fd = image->guest_fd = image->ledger_fd = -1;
	image->source_fd = source->source_fd;
	image->direct_fd = source->direct_fd;
	image->origin = source->origin;
	pthread_rwlock_init(&image->accounts_lock, NULL);
	pthread_mutex_init(&image->fill_lock, NULL);
	return image;
}

int image_open(struct store *store, const struct image_source *source, uint64_t size_bytes, uint32_t extent_pages,
               struct image **image_out)
{
	if (!can_open(store, size_bytes, extent_pages))
		return -EINVAL;
	struct image *image = image_new(store, source, size_bytes, extent_pages);
	if (!image)
		return -ENOMEM;
	int err = frames_open(image->shape.map_bytes, extent_pages, &image->frames_fd, &image->guest_fd);
	if (!err)
		err = arrays_create(image);
	if (err) {
		image_deinit(image);
		return err;
	}
	store_add_image(store, image);
	*image_out = image;
	return 0;
}

static bool frames_fit(const struct image *image, const struct inherited_image *inherited)
{
	struct stat frames, guest;

	return fstat(inherited->frames_fd, &frames) == 0 && fstat(inherited->guest_fd, &guest) == 0 &&
	       (uint64_t)frames.st_size == image->shape.map_bytes && frames.st_ino == guest.st_ino &&
	       frames.st_dev == guest.st_dev && (fcntl(inherited->guest_fd, F_GETFL) & O_ACCMODE) == O_RDONLY;
}

int image_adopt(struct store *store, const struct image_source *source, uint64_t size_bytes, uint32_t extent_pages,
                const struct inherited_image *inherited, struct image **image_out)
{
	if (!can_open(store, size_bytes, extent_pages))
		return -EINVAL;
	struct image *image = image_new(store, source, size_bytes, extent_pages);
	if (!image)
		return -ENOMEM;
	int err = frames_fit(image, inherited) ? arrays_adopt(image, inherited->arrays_fd) : -EBADMSG;
	if (!err) {
		image->frames_fd = inherited->frames_fd;
		image->guest_fd = inherited->guest_fd;
		err = store_adopt_image(store, image);
	}
	if (err) {
		image->frames_fd = image->guest_fd = image->ledger_fd = -1; /* still the caller's */
		image_deinit(image);
		return err;
	}
	*image_out = image;
	return 0;
}

void image_note_reloads(struct image *image, uint64_t nr)
{
	atomic_fetch_add(&image->totals->reloads, nr);
}

void image_note_attach(struct image *image)
{
	atomic_fetch_add(&image->totals->attaches, 1);
}

int image_close(struct image *image)
{
	pthread_rwlock_rdlock(&image->accounts_lock);
	int busy = image->accounts != NULL;
	pthread_rwlock_unlock(&image->accounts_lock);
	if (busy)
		return -EBUSY;
	int err = store_remove_image(image->store, image);
	if (err)
		return err;
	if (image->source_fd >= 0)
		close(image->source_fd);
	if (image->direct_fd >= 0)
		close(image->direct_fd);
	image_deinit(image);
	return 0;
}

int image_punch(struct image *image, uint64_t first, uint64_t nr)
{
	uint64_t step = (uint64_t)image->shape.extent_pages * PAGE_BYTES;
	uint64_t start = first * step;
	uint64_t length = nr * step;

	if (start + length > image->shape.map_bytes)
		length = image->shape.map_bytes - start;
	if (fallocate(image->frames_fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, (off_t)start, (off_t)length) < 0)
		return -errno;
	point_reach(POINT_PUNCHED);
	/* Not before: whoever dies in between leaves a bit for no huge page, and not a huge page without its bit. */
	image_note_split(image, start / PAGE_BYTES, length / PAGE_BYTES);
	return 0;
}

void image_shape(const struct image *image, struct image_shape *shape_out)
{
	*shape_out = image->shape;
}

void image_count(const struct image *image, struct image_counters *counters_out)
{
	const struct image_totals *totals = image->totals;
	uint64_t sample_hits = atomic_load(&totals->sample_hits);
	struct image_counters counters = {
		.load_bytes = atomic_load(&totals->load_bytes),
		.load_errors = atomic_load(&totals->load_errors),
		.load_retries = atomic_load(&totals->load_retries),
		.demand_loads = atomic_load(&totals->demand_loads),
		.prefetch_loads = atomic_load(&totals->prefetch_loads),
		.evictions_pressure = atomic_load(&totals->evictions_pressure),
		.evictions_request = atomic_load(&totals->evictions_request),
		.soft_hits = atomic_load(&totals->victim_hits) + sample_hits,
		.standby_unmaps = atomic_load(&totals->standby_unmaps),
		.standby_samples = atomic_load(&totals->standby_samples),
		.sample_hits = sample_hits,
		.strays = atomic_load(&totals->strays),
		.nr_touched = atomic_load(&totals->nr_touched),
		.reloads = atomic_load(&totals->reloads),
		.attaches = atomic_load(&totals->attaches),
		.collapse_failures = atomic_load(&totals->collapse_failures),
		.lent_regions = atomic_load(&image->nr_lent_regions),
	};

	counters.loads = counters.demand_loads + counters.prefetch_loads;
	counters.evictions = counters.evictions_pressure + counters.evictions_request;
	*counters_out = counters;
}

static unsigned int refs_bucket(uint32_t refs)
{
	unsigned int bucket = refs ? 32 - (unsigned int)__builtin_clz(refs) : 0;

	return bucket < REFS_BUCKETS ? bucket : REFS_BUCKETS - 1;
}

void image_measure(const struct image *image, struct image_statistics *statistics_out)
{
	struct image_statistics statistics = {0};

	for (uint64_t e = 0; e < image->shape.nr_extents; e++) {
		uint64_t nr_pages = image_extent_pages(image, e);
		uint32_t refs = atomic_load_explicit(&image->refs[e], memory_order_relaxed);
		bool resident = extent_state(&image->states[e]) == EXTENT_RESIDENT;
		bool touched = atomic_load_explicit(&image->touched[e], memory_order_relaxed);

		statistics.granted_pages += refs * nr_pages;
		statistics.saved_pages += refs ? (refs - 1) * nr_pages : 0;
		bool pinned = atomic_load_explicit(&image->pins[e], memory_order_relaxed) || image_own_loans(image, e);

		statistics.pinned_pages += pinned ? nr_pages : 0;
		statistics.touched_pages += touched ? nr_pages : 0;
		if (!resident)
			continue;
		statistics.resident_pages += nr_pages;
		statistics.touched_resident_pages += touched ? nr_pages : 0;
		statistics.resident_by_refs[refs_bucket(refs)]++;
	}
	*statistics_out = statistics;
}

int image_frames_fd(const struct image *image)
{
	return image->frames_fd;
}

int image_guest_fd(const struct image *image)
{
	return image->guest_fd;
}

int image_arrays_fd(const struct image *image)
{
	return image->ledger_fd;
}

uint64_t image_read_wait_ns(const struct image *image)
{
	return store_read_wait_ns(image->store, image);
}

uint64_t image_resident_pages(const struct image *image)
{
	return atomic_load(&image->resident_pages);
}

uint64_t image_generation(const struct image *image)
{
	return atomic_load(&image->generation);
}

static bool extents_ok(const struct image *image, uint64_t first, uint64_t nr)
{
	return first <= image->shape.nr_extents && nr <= image->shape.nr_extents - first;
}

int image_states(const struct image *image, uint64_t first, uint64_t nr, uint8_t *states_out)
{
	if (!extents_ok(image, first, nr))
		return -ERANGE;
	for (uint64_t i = 0; i < nr; i++)
		states_out[i] = (uint8_t)extent_state(&image->states[first + i]);
	return 0;
}

int image_refs(const struct image *image, uint64_t first, uint64_t nr, uint32_t *refs_out)
{
	if (!extents_ok(image, first, nr))
		return -ERANGE;
	for (uint64_t i = 0; i < nr; i++)
		refs_out[i] = atomic_load(&image->refs[first + i]);
	return 0;
}

int image_pins(const struct image *image, uint64_t first, uint64_t nr, uint32_t *pins_out)
{
	if (!extents_ok(image, first, nr))
		return -ERANGE;
	for (uint64_t i = 0; i < nr; i++)
		pins_out[i] = atomic_load(&image->pins[first + i]) + image_own_loans(image, first + i);
	return 0;
}

int image_holds(const struct image *image, uint64_t first, uint64_t nr, uint32_t *holds_out)
{
	if (!extents_ok(image, first, nr))
		return -ERANGE;
	for (uint64_t i = 0; i < nr; i++)
		holds_out[i] = atomic_load(&image->states[first + i]) / EXTENT_HOLD_ONE;
	return 0;
}

int image_touches(const struct image *image, uint64_t first, uint64_t nr, uint8_t *touches_out)
{
	if (!extents_ok(image, first, nr))
		return -ERANGE;
	for (uint64_t i = 0; i < nr; i++)
		touches_out[i] = atomic_load_explicit(&image->touches[first + i], memory_order_relaxed);
	return 0;
}

uint8_t image_take_touches(struct image *image, uint64_t extent)
{
	assert(extent < image->shape.nr_extents);
	if (!atomic_load_explicit(&image->touches[extent], memory_order_relaxed))
		return 0;
	return atomic_exchange_explicit(&image->touches[extent], 0, memory_order_relaxed);
}

uint32_t image_extent_refs(const struct image *image, uint64_t extent)
{
	assert(extent < image->shape.nr_extents);
	return atomic_load_explicit(&image->refs[extent], memory_order_relaxed);
}

int image_extent_idle(const struct image *image, uint64_t extent)
{
	assert(extent < image->shape.nr_extents);
	return !image_is_pinned(image, extent) && atomic_load(&image->states[extent]) == EXTENT_RESIDENT;
}

int64_t image_walk_resident(const struct image *image, uint64_t *at, uint64_t stride, uint64_t nr_steps)
{
	for (uint64_t step = 0; step < nr_steps; step++) {
		uint64_t extent = *at;

		assert(extent < image->shape.nr_extents);
		*at = (extent + stride) % image->shape.nr_extents;
		if (extent_state(&image->states[extent]) == EXTENT_RESIDENT)
			return (int64_t)extent;
	}
	return -1;
}

int64_t image_first_touches(const struct image *image, uint32_t *extents_out, uint64_t nr_max)
{
	uint64_t nr = atomic_load(&image->totals->nr_touched);
	int64_t nr_copied = 0;

	for (uint64_t i = 0; i < nr && i < nr_max; i++) {
		uint32_t entry = atomic_load_explicit(&image->order[i], memory_order_acquire);

		if (entry)
			extents_out[nr_copied++] = entry - 1;
	}
	return nr_copied;
}
