/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Loads: the queues of wanted extents, their order, and the threads that fill them.
 *
 * A load is a run of LOADING extents of one image.  Demand goes before prefetch, and one loader is always
 * kept free of prefetch, so that a slow readahead never stands in front of a waiting guest.  However many
 * guests wait for an extent, it is loaded once.
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

struct image;
struct store;

struct load_waiter {
	struct load_waiter *next;
	/* status 0: the extent is resident and held while this runs; else -errno of the failed load. */
	void (*answer)(struct load_waiter *waiter, int status);
	uint64_t extent;
	bool restored; /* from the standby list; set before the answer */
};

struct load {
	struct load *next;
	struct image *image;
	uint64_t first, nr;
};

struct load_queue {
	struct load *head, **tail;
	uint64_t nr;
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

/* The most bytes that one read asks for, unless one extent is larger. */
#define LOAD_CHUNK_BYTES (1u << 20)

void load_queue_init(struct load_queue *queue);
void load_queue_push(struct load_queue *queue, struct load *load);
/* The most extents of an image that one run fills. */
uint64_t load_chunk(const struct image *image);
/* Takes out the first load that begins in the standby list or is of an image that fewer than nr_max loaders read, and
 * whose first extent fits into *room; NULL if there is none. A load that does not fit sets *room to 0, so that smaller
 * ones do not take for ever what it waits for. O(loads passed over). */
struct load *load_queue_pop(struct load_queue *queue, uint32_t nr_max, uint64_t *room);
/* Takes out the load that covers an extent, or NULL. */
struct load *load_queue_take(struct load_queue *queue, const struct image *image, uint64_t extent);

/* The main function of a loader thread; arg is its struct loader, which the thread owns and frees. */
void *loader_main(void *arg);
/* Under lock: wakes loaders for loads that could not be done a moment ago; nobody if none are queued. */
void loaders_wake(struct store *store);
/* Under lock: marks the loaders that are stuck; returns how many are not. */
uint32_t loaders_note_stuck(struct store *store);
/* Writes frames, whole pages; an error may leave some of them written. */
int frames_write(struct image *image, const char *from, uint64_t length, uint64_t offset);
/* Nanoseconds on CLOCK_MONOTONIC; of CPU time that this thread has used. */
uint64_t loader_now_ns(void);
uint64_t loader_cpu_ns(void);

#endif
