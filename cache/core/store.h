/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The page store: every image's frames under one capacity.
 *
 * Room is counted in the store's extents, the smallest of all images: "extents" of counters and limits here means that.
 * An extent takes its room (image_room) when a loader begins to fill it and gives it back when it is ABSENT again; one
 * whose bytes go to the standby list keeps it until they are dropped. So frames and list together never exceed the
 * capacity, not by one extent. A loader that finds little room raises the pressure eventfd, and waits if there is too
 * little; the evictor watches that descriptor, chooses victims and evicts them. The store never chooses.
 */
#ifndef COWSHED_STORE_H
#define COWSHED_STORE_H

#include "cache/core/fetch.h"
#include "cache/core/image.h"
#include "cache/core/loader.h"
#include "cache/core/room.h"

/* cdef-begin */
struct store_counters {
	uint64_t capacity_extents;
	uint64_t reserved_extents; /* LOADING, RESIDENT or EVICTING */
	uint64_t loading_extents;  /* of those, being filled; queued ones have no room yet */
	uint64_t standby_extents;  /* unmapped, their bytes kept in the standby list */
	uint64_t standby_limit;    /* of standby_extents */
	uint64_t standby_pages;    /* in standby_extents: the last extent of an image may have fewer */
	uint64_t standby_moving;   /* slots on their way into the list, or being dropped */
	uint64_t room_extents;     /* free, or in the standby list and not about to be loaded: what loaders can have */
	uint64_t pinned_extents;
	uint64_t read_ns, read_extents;       /* time that loaders spent on extents that they read from sources */
	uint64_t fill_cpu_ns, restore_cpu_ns; /* CPU time of copies into the standby list, and out of it */
	uint64_t nr_waiting_loaders;          /* for room */
	uint64_t queued_loads;
};

/* What happened to extents, in order, for the eviction policy. */
enum store_event { EVENT_LOADED, EVENT_SOFT_HIT, EVENT_DROPPED };
#define STANDBY_AGE_MAX 32

/* A sample that left the standby list: a guest touched it, or its room was needed. */
struct sample_end {
	uint32_t image_no, extent;
	uint64_t unmapped_ns, ended_ns; /* CLOCK_MONOTONIC */
	int touched;
};

/* extent_pages: a power of two, at most EXTENT_PAGES_MAX; an image's extents are a multiple of it. low_free: pressure
 * is raised when fewer extents are free or in the standby list. standby_max: the most extents that the standby list may
 * ever hold; store_set_standby turns it on. */
int store_init(uint64_t capacity_extents, uint32_t extent_pages, uint32_t nr_loaders, uint64_t low_free,
               uint64_t standby_max, struct store **store_out);
/* Answers every waiter for a load, now and from now on, with an error. Loads that a loader has in hand go on. */
void store_cancel_loads(struct store *store);
/* The same, and ends the loaders. -ETIMEDOUT if one is still in a read after timeout_ms: it is left behind, and the
 * image it reads and the store stay open until the process ends. */
int store_stop(struct store *store, int timeout_ms);
/* -EBUSY, and nothing done, while images or origins are open. */
int store_deinit(struct store *store);
void store_count(struct store *store, struct store_counters *counters_out);
/* Borrowed eventfds: room is short; a guest stopped or broke. */
int store_pressure_fd(const struct store *store);
int store_notice_fd(const struct store *store);
/* Raised when a guest's fault thread found a region worth opening. */
int store_wanted_fd(const struct store *store);
/* Borrowed: the memory of the standby list, for audits; -1 if there is none. */
int store_standby_fd(const struct store *store);
/* Takes the events since the last call, in order; returns how many. Each is enum store_event << 62 | age << 56 |
 * image_no << 32 | extent. EVENT_LOADED: the extent became RESIDENT, by a read of the source or ahead of any demand;
 * EVENT_SOFT_HIT: it came back from the standby list for a waiter, after so many other extents had come into the list
 * as age/STANDBY_AGE_MAX of its limit, or more if that is 1; EVENT_DROPPED: it left the list for good. -EOVERFLOW: some
 * were lost. */
int64_t store_take_events(struct store *store, uint64_t *events_out, uint64_t nr_max);
/* Takes what ended samples since the last call; returns how many. Those that nobody takes in time are lost. */
int64_t store_take_sample_ends(struct store *store, struct sample_end *ends_out, uint64_t nr_max);

/* Queues loads of absent extents in [first, first + nr), behind all demand loads; returns how many extents. */
int64_t store_prefetch(struct image *image, uint64_t first, uint64_t nr);
/* Queues the return of an extent from the standby list to the frames, for nobody: 1, or 0 if the list does not have it.
 */
int store_restore(struct image *image, uint64_t extent);
/* Waits until no extent in [first, first + nr) is LOADING: 0, or -ETIMEDOUT. */
int store_wait_loaded(struct image *image, uint64_t first, uint64_t nr, int timeout_ms);
/* Forbids eviction of nr extents from first, resident or not; counted.  -ENOSPC, and nothing done, if the room of all
 * that is pinned in the store would be more than max_pinned. */
int store_pin(struct image *image, uint64_t first, uint64_t nr, uint64_t max_pinned);
/* Takes one pin back from each; -ENOENT, and nothing done, if one of them has none. */
int store_unpin(struct image *image, uint64_t first, uint64_t nr);
/* The same for a zerocopy guest or an open region: their loans are counted apart and end with them. -EBUSY, and nothing
 * done: the extents are a part of a huge page. UINT64_MAX: no condition, for what a predecessor had lent. */
int store_lend(struct image *image, uint64_t first, uint64_t nr, uint64_t max_pinned);
int store_end_loan(struct image *image, uint64_t first, uint64_t nr);
/* Punches stray frames out of ABSENT extents; returns how many extents had some. */
int64_t store_scrub(struct image *image);
/* Recomputes the invariants of the store and its images; returns one that does not hold, or NULL. For tests; O(extents,
 * queued loads squared) under the lock. */
const char *store_check(struct store *store);
/* cdef-end */

#define EVENT_IMAGE_SHIFT 32
#define EVENT_AGE_SHIFT 56
#define EVENT_KIND_SHIFT 62
#define NR_SAMPLE_ENDS 1024

/*
 * Invariants, all under lock: (1) reserved_extents is the room of the extents in state RESIDENT or EVICTING (but not
 * those that are being scrubbed) plus those a loader is filling; (2) reserved_extents and the standby list's room
 * together are at most capacity_extents; (3) an extent is in at most one load of the queues; (4) a queue's nr is the
 * number of its loads; (5) nr_prefetching counts the loaders with a prefetch that are not stuck; (6) no image has more
 * than nr_loaders loaders that read its source; (7) pinned_extents counts the extents with a pin or a loan. store_check
 * recomputes them.
 */
struct store {
	pthread_mutex_t lock;
	pthread_cond_t work;   /* a load was queued, room came free, or stop */
	pthread_cond_t soft;   /* a load was queued in restores, or stop */
	pthread_cond_t loaded; /* a load ended, or stop */
	struct image *images;
	struct origin *origins;
	uint32_t nr_images_ever;
	uint32_t extent_pages;
	uint64_t capacity_extents, low_free;
	uint64_t reserved_extents, loading_extents, pinned_extents;
	uint64_t read_ns, read_extents, fill_cpu_ns, restore_cpu_ns; /* as in store_counters */
	int pressure_fd, notice_fd, wanted_fd;

	struct standby standby;
	uint64_t standby_max;

	struct load_queue demand, prefetch, restores; /* restores: demand for one extent of the standby list */
	/* nr_loaders: as configured; nr_alive: threads that exist, but the one that only restores; nr_stuck: of
	 * nr_alive, stuck in one read. */
	uint32_t nr_loaders, nr_alive, nr_stuck, nr_prefetching, nr_waiting_room;
	struct loader *loaders;
	pthread_t watcher; /* looks for stuck loaders while loads are in hand */
	pthread_cond_t watch;
	pthread_cond_t ended; /* a loader ended */
	bool watch_sleeps, is_watched, cancelled;
	bool restorer_waits; /* the loader that only restores, for work */
	_Atomic bool stop;

	uint64_t *events; /* ring */
	uint64_t nr_event_slots, events_head, events_tail;
	struct sample_end *sample_ends; /* ring of NR_SAMPLE_ENDS */
	uint64_t sample_ends_head, sample_ends_tail;
};

uint32_t store_extent_pages(const struct store *store);
void store_add_image(struct store *store, struct image *image);
/* See image_read_wait_ns. */
uint64_t store_read_wait_ns(struct store *store, const struct image *image);
/* Mends the arrays of an image that another process left (arrays.h) and adds it with what stays resident. */
int store_adopt_image(struct store *store, struct image *image);
/* Under lock: queues an event for store_take_events. */
void event_push(struct store *store, enum store_event kind, uint32_t age, const struct image *image, uint64_t extent);
/* Under lock: queues the end of a sample, which it had been since unmapped_ns, for store_take_sample_ends. */
void sample_end_push(struct store *store, const struct image *image, uint64_t extent, uint64_t unmapped_ns,
                     uint64_t ended_ns, bool touched);
/* Waits for the image's loads, but for no fetch; evicts its extents, forgets it. -ETIMEDOUT if the store was stopped
 * while a loader has a load of it in hand; then only its queued loads are dropped. */
int store_remove_image(struct store *store, struct image *image);

/* Requests an extent for a fault: 1 if it is RESIDENT (the caller must hold it); 0 if waiter was queued: a loader will
 * answer it in its own thread, without locks, with the extent held if status is 0. -ESHUTDOWN after
 * store_cancel_loads. */
int store_want(struct image *image, uint64_t extent, struct load_waiter *waiter);

/* Under lock (demand.c): queues the load of an ABSENT extent that has a waiter, or is about to; 0, or -ENOMEM. */
int queue_demand(struct image *image, uint64_t extent);

/* Eviction in steps (unload.c); accounting does those between (accounting/core/evict.c). */
/* Marks those of nr extents that may be evicted EVICTING and moves them to the front; returns how many. */
uint64_t store_begin_evict(struct image *image, uint32_t *extents, uint64_t nr);
/* How many extents store_fill_standby can take at once: 1 to STANDBY_BATCH. */
uint32_t store_standby_batch(const struct store *store);
/* Copies the frames of EVICTING extents to slots of the standby list, as far as it takes them; slots_out: each one's
 * slot, or 0. At most store_standby_batch. */
void store_fill_standby(struct image *image, const uint32_t *extents, uint64_t nr, uint32_t *slots_out);
/* Makes EVICTING extents ABSENT, with their bytes in the standby list where slots (or NULL) names a slot; gives back
 * the room of the others, counts both, and queues loads for waiters. since_ns: when they were unmapped. */
void store_end_evict(struct image *image, const uint32_t *extents, const uint32_t *slots, uint64_t nr,
                     uint64_t since_ns, int reason);

/* Makes EVICTING extents ABSENT without counting: their image goes. */
void store_abandon(struct image *image, const uint32_t *extents, uint64_t nr);

void store_raise(int eventfd);
/* Raises it, unless a test makes this notification fail (points.h). */
void store_raise_at(int point, int eventfd);

/* The most extents on their way into the standby list. */
#define STANDBY_BATCH 16

#endif
