/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Loaders: the threads that load extents from local sources and from the standby list.
 *
 * Demand goes before prefetch, and one loader is always kept free of prefetch, so that a slow readahead never stands in
 * front of a waiting guest. No loader waits for a network: loads of an image with an origin go to its fetch threads
 * (fetch.h).
 *
 * A read can hang for as long as the file system does; nothing can interrupt it. A loader that has been in one read for
 * LOAD_STUCK_MS counts as stuck: another thread is started in its place, and one image never occupies more threads than
 * the store has loaders. So a source that hangs delays no other image. When the read returns, surplus threads end.
 */
#ifndef COWSHED_LOADER_H
#define COWSHED_LOADER_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <time.h>

struct image;
struct store;

struct load_waiter {
	struct load_waiter *next;
	/* status 0: the extent is resident and held while this runs; else -errno of the failed load. */
	void (*answer)(struct load_waiter *waiter, int status);
	uint64_t extent;
	bool restored; /* from the standby list; set before the answer */
};

/* A loader thread; all under the store's lock but reading_since_ns. */
struct loader {
	struct loader *next;
	struct store *store;
	struct image *image; /* of the load that it has in hand, or NULL */
	bool restores_only;  /* no slow source may stand before a soft hit */
	bool prefetch, restoring, stuck;
	bool lacks_room;                   /* the first load that it could do needs more room than there is */
	_Atomic uint64_t reading_since_ns; /* CLOCK_MONOTONIC, 0: in no read of a source */
};

#define LOAD_STUCK_MS 1000

/* The main function of a loader thread; arg is its struct loader, which the thread owns and frees. */
void *loader_main(void *arg);
/* Under lock: wakes loaders and fetch threads for loads that could not be done a moment ago; nobody if none are queued.
 */
void loaders_wake(struct store *store);
/* Under lock: marks the loaders that are stuck; returns how many are not. */
uint32_t loaders_note_stuck(struct store *store);
/* Nanoseconds on CLOCK_MONOTONIC; of CPU time that this thread has used. */
uint64_t loader_now_ns(void);
uint64_t loader_cpu_ns(void);
/* A moment on CLOCK_MONOTONIC. */
struct timespec loader_deadline_in(int timeout_ms);

#endif
