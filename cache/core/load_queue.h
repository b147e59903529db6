/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Queues of loads. A load is a run of LOADING extents of one image that nobody has in hand yet; all under the store's
 * lock. However many guests wait for an extent, it is in one load.
 */
#ifndef COWSHED_LOAD_QUEUE_H
#define COWSHED_LOAD_QUEUE_H

#include <stdbool.h>
#include <stdint.h>

struct image;

struct load {
	struct load *next;
	struct image *image;
	uint64_t first, nr;
};

struct load_queue {
	struct load *head, **tail;
	uint64_t nr;
};

void load_queue_init(struct load_queue *queue);
void load_queue_push(struct load_queue *queue, struct load *load);
void load_queue_push_front(struct load_queue *queue, struct load *load);
/* Takes out the first load that begins in the standby list or is of an image that fewer than nr_max loaders read, and
 * whose first extent fits into *room; NULL if there is none. A load that does not fit sets *room to 0, so that smaller
 * ones do not take for ever what it waits for. O(loads passed over). */
struct load *load_queue_pop(struct load_queue *queue, uint32_t nr_max, uint64_t *room);
/* Takes out the load that covers an extent, or NULL. */
struct load *load_queue_take(struct load_queue *queue, const struct image *image, uint64_t extent);
/* Whether the extents of a load come from the standby list: all do, or none. */
bool load_is_restore(const struct load *load);

#endif
