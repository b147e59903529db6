/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Loads: who asks for an extent, in which order, and the threads that fill it.
 *
 * A load is a run of LOADING extents of one image.  Demand goes before prefetch, and one loader is always
 * kept free of prefetch, so that a slow readahead never stands in front of a waiting guest.  However many
 * guests wait for an extent, it is loaded once.
 */
#ifndef COWSHED_LOADER_H
#define COWSHED_LOADER_H

#include <stdbool.h>
#include <stdint.h>

struct image;
struct store;

struct load_waiter {
	struct load_waiter *next;
	/* status 0: the extent is resident and held while this runs; else -errno of the failed load. */
	void (*answer)(struct load_waiter *waiter, int status);
	uint64_t extent;
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

/* The most extents' worth of bytes one read asks for. */
#define LOAD_CHUNK_BYTES (1u << 20)

void load_queue_init(struct load_queue *queue);
void load_queue_push(struct load_queue *queue, struct load *load);
struct load *load_queue_pop(struct load_queue *queue);
/* Takes out the load that covers an extent, or NULL. */
struct load *load_queue_take(struct load_queue *queue, const struct image *image, uint64_t extent);

/* The life of a loader thread; arg is the struct store. */
void *loader_main(void *arg);

#endif
