/* SPDX-License-Identifier: Apache-2.0 */
/* Writes of a part of a page: the rest of the page is the image's, which may have to be loaded first. */
#include "transport/core/blocks/wait.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

/* Holds the image's extent for a patch, or makes the patch wait for it. */
static void wait_frame(struct blk_wait *wait)
{
	uint64_t extent = wait->offset / wait->queue->device->extent_bytes;

	if (blk_wait_extent(wait, wait->offset, wait->length))
		wait->loads[wait->nr_loads++] = (struct blk_load){.waiter = {.extent = extent}, .held = true};
}

bool blk_patch(struct blk_queue *queue, struct blk_request *request, uint64_t offset, uint32_t length,
               const uint8_t *bytes)
{
	struct blk_device *device = queue->device;
	extent_word *state = &device->image->states[offset / device->extent_bytes];
	const uint8_t *frame = NULL;

	if (extent_hold(state))
		frame = device->frames->base + (offset & ~(uint64_t)4095);
	int err = overlay_patch(device->overlay, offset, length, bytes, frame, &request->reserved_pages);
	if (frame)
		extent_release(state);
	if (err == -EBUSY)
		return !blk_queue_freeze(queue, err) && blk_patch(queue, request, offset, length, bytes);
	if (err != -EAGAIN && err != -EINPROGRESS) {
		request->err = request->err ? request->err : err;
		return true;
	}
	struct blk_wait *wait = blk_wait_new(queue, request, BLK_WAIT_PATCH, offset, length, 1);
	if (wait && bytes && !(wait->bytes = malloc(length)))
		atomic_store(&wait->status, -ENOMEM);
	if (!wait) {
		request->err = -ENOMEM;
		return true;
	}
	if (wait->bytes) {
		memcpy(wait->bytes, bytes, length);
		queue->buffered_bytes += length;
	}
	queue->nr_misses++;
	request->missed = true;
	if (err == -EINPROGRESS)
		blk_wait_pages(wait);
	else
		wait_frame(wait);
	blk_wait_all(wait);
	return true;
}

/* Makes a patch ready again with the thaw; its extent stays held. */
static void patch_freeze(struct blk_wait *wait)
{
	struct blk_queue *queue = wait->queue;

	pthread_mutex_lock(&queue->lock);
	wait->next = queue->ready;
	queue->ready = wait;
	if (!wait->next)
		queue->ready_tail = &wait->next;
	pthread_mutex_unlock(&queue->lock);
}

bool blk_patch_complete(struct blk_wait *wait)
{
	struct blk_queue *queue = wait->queue;
	struct blk_device *device = queue->device;
	int err = atomic_load(&wait->status);

	if (queue->broken)
		err = -ESHUTDOWN;
	if (!err) {
		const uint8_t *frame = device->frames->base + (wait->offset & ~(uint64_t)4095);

		do
			err = overlay_patch(device->overlay, wait->offset, wait->length, wait->bytes,
			                    wait->nr_loads ? frame : NULL, &wait->request->reserved_pages);
		while (err == -EBUSY && !blk_queue_freeze(queue, err));
		if (err == -EBUSY) {
			patch_freeze(wait);
			return false;
		}
		if (err == -EAGAIN) { /* the page was missing, and was given back to the image meanwhile */
			atomic_store(&wait->nr_awaited, 1);
			wait_frame(wait);
			blk_wait_all(wait);
			return false;
		}
	}
	atomic_store(&wait->status, err);
	return true;
}
