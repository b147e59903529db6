/* SPDX-License-Identifier: Apache-2.0 */
#include "transport/core/blocks/wait.h"

#include <assert.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

struct blk_wait *blk_wait_new(struct blk_queue *queue, struct blk_request *request, enum blk_wait_kind kind,
                              uint64_t offset, uint32_t length, uint32_t nr_loads)
{
	struct blk_wait *wait = malloc(sizeof *wait + nr_loads * sizeof *wait->loads);

	if (!wait)
		return NULL;
	*wait = (struct blk_wait){
		.queue = queue,
		.request = request,
		.kind = kind,
		.offset = offset,
		.length = length,
		.nr_awaited = 1,
	};
	if (kind == BLK_WAIT_READ && !(wait->bytes = malloc(length))) {
		free(wait);
		return NULL;
	}
	queue->buffered_bytes += wait->bytes ? length : 0;
	queue->nr_waits++;
	request->waited = true;
	if (request->nr_waits++ == 0) {
		count_add(&queue->device->nr_waiting, 1);
		count_add(&queue->device->frames->nr_waiting, 1);
	}
	return wait;
}

void blk_wait_free(struct blk_wait *wait)
{
	wait->queue->buffered_bytes -= wait->bytes ? wait->length : 0;
	wait->queue->nr_waits--;
	free(wait->bytes);
	free(wait);
}

static void wait_ready(struct blk_wait *wait)
{
	struct blk_queue *queue = wait->queue;

	pthread_mutex_lock(&queue->lock);
	wait->next = NULL;
	*queue->ready_tail = wait;
	queue->ready_tail = &wait->next;
	queue->sink->wake(queue); /* under the lock: the worker may free the queue as soon as it has collected this */
	pthread_mutex_unlock(&queue->lock);
}

void blk_wait_answer(struct blk_wait *wait, int status)
{
	if (status)
		atomic_store(&wait->status, status);
	if (atomic_fetch_sub(&wait->nr_awaited, 1) == 1)
		wait_ready(wait);
}

static void load_answer(struct load_waiter *waiter, int status)
{
	struct blk_load *load = (struct blk_load *)((char *)waiter - offsetof(struct blk_load, waiter));
	struct blk_wait *wait = load->wait;
	struct blk_device *device = wait->queue->device;

	if (!status && wait->kind == BLK_WAIT_READ) {
		memcpy(wait->bytes + (load->offset - wait->offset), device->frames->base + load->offset, load->length);
	} else if (!status && wait->kind == BLK_WAIT_PATCH) {
		load->held = extent_hold(&device->image->states[waiter->extent]);
		assert(load->held); /* the loader holds it while this runs */
	}
	blk_wait_answer(wait, status);
}

bool blk_wait_extent(struct blk_wait *wait, uint64_t offset, uint32_t length)
{
	struct blk_device *device = wait->queue->device;
	struct image *image = device->image;
	uint64_t extent = offset / device->extent_bytes;
	struct blk_load *load = &wait->loads[wait->nr_loads];

	for (;;) {
		if (extent_hold(&image->states[extent]))
			return true;
		*load = (struct blk_load){
			.waiter = {.answer = load_answer},
			.wait = wait,
			.offset = offset,
			.length = length,
		};
		wait->nr_loads++;
		atomic_fetch_add(&wait->nr_awaited, 1);
		int state = store_want(image, extent, &load->waiter);
		if (state == 0)
			return false;
		/* It became resident meanwhile; or there was no memory to ask for it. */
		wait->nr_loads--;
		atomic_fetch_sub(&wait->nr_awaited, 1);
		if (state < 0) {
			atomic_store(&wait->status, state);
			return false;
		}
	}
}

void blk_wait_all(struct blk_wait *wait)
{
	blk_wait_answer(wait, 0);
}
