/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The page store: every image's frames under one capacity.
 *
 * An extent takes its room when a loader begins to fill it and gives it back when it is ABSENT again, so the frames
 * never exceed the capacity, not by one extent. A loader that finds no room raises the pressure eventfd and waits; the
 * evictor watches that descriptor, chooses victims and evicts them. The store never chooses.
 */
#ifndef COWSHED_STORE_H
#define COWSHED_STORE_H

#include "cache/core/image.h"
#include "cache/core/loader.h"

/* cdef-begin */
struct store_counters {
	uint64_t capacity_extents;
	uint64_t reserved_extents; /* LOADING, RESIDENT or EVICTING */
	uint64_t loading_extents;  /* of those, being filled; queued ones have no room yet */
	uint64_t pinned_extents;
	uint64_t nr_waiting_loaders; /* for room */
	uint64_t queued_loads;
};

/* extent_pages: a power of two.  low_free: pressure is raised when fewer extents are free. */
int store_init(uint64_t capacity_extents, uint32_t extent_pages, uint32_t nr_loaders, uint64_t low_free,
               struct store **store_out);
/* Answers every waiter for a load, now and from now on, with an error. Loads that a loader has in hand go on. */
void store_cancel_loads(struct store *store);
/* The same, and ends the loaders. -ETIMEDOUT if one is still in a read after timeout_ms: it is left behind, and the
 * image it reads and the store stay open until the process ends. */
int store_stop(struct store *store, int timeout_ms);
/* -EBUSY, and nothing done, while images are open. */
int store_deinit(struct store *store);
void store_count(struct store *store, struct store_counters *counters_out);
/* Borrowed eventfds: room is short; a guest stopped or broke. */
int store_pressure_fd(const struct store *store);
int store_notice_fd(const struct store *store);
/* Takes the extents that became resident since the last call, as image_no << 32 | extent, in order; returns how many.
 * -EOVERFLOW: some were lost. */
int64_t store_take_inserted(struct store *store, uint64_t *inserted_out, uint64_t nr_max);

/* Queues loads of absent extents in [first, first + nr), behind all demand loads; returns how many extents. */
int64_t store_prefetch(struct image *image, uint64_t first, uint64_t nr);
/* Waits until no extent in [first, first + nr) is LOADING: 0, or -ETIMEDOUT. */
int store_wait_loaded(struct image *image, uint64_t first, uint64_t nr, int timeout_ms);
/* Forbids eviction of nr extents from first, resident or not; counted.  -ENOSPC, and nothing done, if more than
 * max_pinned extents would be pinned in the store. */
int store_pin(struct image *image, uint64_t first, uint64_t nr, uint64_t max_pinned);
/* Takes one pin back from each; -ENOENT, and nothing done, if one of them has none. */
int store_unpin(struct image *image, uint64_t first, uint64_t nr);
/* The same for a zerocopy guest: its loans are counted apart and end with the guest. */
int store_lend(struct image *image, uint64_t first, uint64_t nr, uint64_t max_pinned);
int store_end_loan(struct image *image, uint64_t first, uint64_t nr);
/* Punches stray frames out of ABSENT extents; returns how many extents had some. */
int64_t store_scrub(struct image *image);
/* Recomputes the invariants of the store and its images; returns one that does not hold, or NULL. For tests; O(extents,
 * queued loads squared) under the lock. */
const char *store_check(struct store *store);
/* cdef-end */

#define INSERTED_SHIFT 32

/*
 * Invariants, all under lock: (1) reserved_extents counts the extents in state RESIDENT or EVICTING (but not those that
 * are being scrubbed) plus those a loader is filling; (2) reserved_extents <= capacity_extents; (3) an extent is in at
 * most one load of the queues; (4) a queue's nr is the number of its loads;
 * (5) nr_prefetching counts the loaders with a prefetch that are not stuck; (6) no image has more than nr_loaders
 * loaders at work; (7) pinned_extents counts the extents with a pin or a loan. store_check recomputes them.
 */
struct store {
	pthread_mutex_t lock;
	pthread_cond_t work;   /* a load was queued, room came free, or stop */
	pthread_cond_t loaded; /* a load ended, or stop */
	struct image *images;
	uint32_t nr_images_ever;
	uint32_t extent_pages;
	uint64_t capacity_extents, low_free;
	uint64_t reserved_extents, loading_extents, pinned_extents;
	int pressure_fd, notice_fd;

	struct load_queue demand, prefetch;
	/* nr_loaders: as configured; nr_alive: threads that exist; nr_stuck: of these, stuck in one read. */
	uint32_t nr_loaders, nr_alive, nr_stuck, nr_prefetching, nr_waiting_room;
	struct loader *loaders;
	pthread_t watcher; /* looks for stuck loaders while loads are in hand */
	pthread_cond_t watch;
	pthread_cond_t ended; /* a loader ended */
	bool watch_sleeps, is_watched, cancelled;
	_Atomic bool stop;

	uint64_t *inserted; /* ring */
	uint64_t nr_inserted_slots, inserted_head, inserted_tail;
};

uint32_t store_extent_pages(const struct store *store);
void store_add_image(struct store *store, struct image *image);
/* See image_read_wait_ns. */
uint64_t store_read_wait_ns(struct store *store, const struct image *image);
/* Mends the arrays of an image that another process left (arrays.h) and adds it with what stays resident. */
int store_adopt_image(struct store *store, struct image *image);
/* Under lock: queues the extent for store_take_inserted. */
void inserted_push(struct store *store, const struct image *image, uint64_t extent);
/* Waits for the image's loads, evicts its extents, forgets it. -ETIMEDOUT if the store was stopped while a loader has a
 * load of it in hand; then only its queued loads are dropped. */
int store_remove_image(struct store *store, struct image *image);

/* Requests an extent for a fault: 1 if it is RESIDENT (the caller must hold it); 0 if waiter was queued: a loader will
 * answer it in its own thread, without locks, with the extent held if status is 0. -ESHUTDOWN after
 * store_cancel_loads. */
int store_want(struct image *image, uint64_t extent, struct load_waiter *waiter);

/* Eviction in three steps; accounting does the middle one (accounting/core/evict.c). */
/* Marks those of nr extents that may be evicted EVICTING and moves them to the front; returns how many. */
uint64_t store_begin_evict(struct image *image, uint32_t *extents, uint64_t nr);
/* Makes EVICTING extents ABSENT, gives back their room, and queues loads for their waiters. */
void store_end_evict(struct image *image, const uint32_t *extents, uint64_t nr);

void store_raise(int eventfd);
/* Raises it, unless a test makes this notification fail (points.h). */
void store_raise_at(int point, int eventfd);

#endif
