/* SPDX-License-Identifier: Apache-2.0 */
/*
 * READ and PREFETCH.
 *
 * A read of resident bytes refers to the frames with their extents held; private pages are copied from the overlay.
 * If one extent is not resident, the whole run waits in a buffer of its own: the bytes that are there are copied, the
 * others as they are loaded. A long read goes run by run where it may be split, so that it needs no more memory than a
 * few runs; otherwise it needs a buffer of its whole length.
 */
#include "transport/core/blocks/wait.h"

#include <errno.h>
#include <string.h>

static void extent_was_read(struct image *image, uint64_t extent)
{
	image_touch(image, extent);
	image_note_first_touch(image, extent);
}

/* How many of length bytes at offset are in the extent there. */
static uint64_t in_extent(const struct blk_device *device, uint64_t offset, uint64_t length)
{
	uint64_t left = device->extent_bytes - offset % device->extent_bytes;

	return left < length ? left : length;
}

/* Refers to shared bytes; false, with some extents held, if one is not resident. */
static bool refer_shared(struct blk_queue *queue, uint64_t offset, uint64_t length)
{
	struct blk_device *device = queue->device;

	while (length) {
		uint64_t extent = offset / device->extent_bytes, here = in_extent(device, offset, length);

		if (!extent_hold(&device->image->states[extent]))
			return false;
		extent_was_read(device->image, extent);
		queue->nr_hits++;
		queue->sink->refer(queue, device->frames->base + offset, here, &device->image->states[extent]);
		offset += here;
		length -= here;
	}
	return true;
}

/* Gives a run of at most BLK_RUN_BYTES; 0, -EAGAIN if that needs a load, or the overlay's error. */
static int give_resident(struct blk_queue *queue, struct blk_request *request, uint64_t offset, uint64_t length,
                         bool whole)
{
	struct overlay *overlay = queue->device->overlay;
	uint64_t nr_hits = queue->nr_hits;
	int err = 0;

	queue->sink->begin(queue, request, offset, (uint32_t)length, whole);
	while (length && !err) {
		bool private = false;
		int64_t run = (int64_t)length;

		if (overlay)
			run = overlay_read_run(overlay, offset, length, queue->sink->room(queue), &private);
		if (run < 0)
			err = (int)run;
		else if (private)
			queue->sink->fill(queue, (uint64_t)run);
		else if (!refer_shared(queue, offset, (uint64_t)run))
			err = -EAGAIN;
		offset += (uint64_t)run;
		length -= (uint64_t)run;
	}
	if (err) {
		queue->sink->undo(queue);
		queue->nr_hits = nr_hits;
	}
	return err;
}

/* Copies or waits for shared bytes of a run. */
static void wait_shared(struct blk_wait *wait, uint64_t offset, uint64_t length)
{
	struct blk_queue *queue = wait->queue;
	struct blk_device *device = queue->device;

	while (length) {
		uint64_t extent = offset / device->extent_bytes, here = in_extent(device, offset, length);

		if (blk_wait_extent(wait, offset, (uint32_t)here)) {
			if (wait->bytes)
				memcpy(wait->bytes + (offset - wait->offset), device->frames->base + offset, here);
			extent_release(&device->image->states[extent]);
			queue->nr_hits++;
		} else {
			queue->nr_misses++;
			wait->request->missed = true;
		}
		extent_was_read(device->image, extent);
		offset += here;
		length -= here;
	}
}

/* Makes a request wait for the bytes of a run; -ENOMEM. */
static int wait_run(struct blk_queue *queue, struct blk_request *request, uint64_t offset, uint64_t length)
{
	struct overlay *overlay = queue->device->overlay;
	uint64_t step = overlay ? 4096 : queue->device->extent_bytes;
	struct blk_wait *wait =
		blk_wait_new(queue, request, BLK_WAIT_READ, offset, (uint32_t)length, (uint32_t)(length / step) + 2);

	if (!wait)
		return -ENOMEM;
	while (length) {
		bool private = false;
		int64_t run = (int64_t)length;

		if (overlay)
			run = overlay_read_run(overlay, offset, length, wait->bytes + (offset - wait->offset),
			                       &private);
		if (run < 0) {
			atomic_store(&wait->status, (int)run);
			break;
		}
		if (!private)
			wait_shared(wait, offset, (uint64_t)run);
		offset += (uint64_t)run;
		length -= (uint64_t)run;
	}
	blk_wait_all(wait);
	return 0;
}

void blk_read_begin(struct blk_queue *queue, struct blk_request *request)
{
	int err = -EAGAIN;

	if (request->length <= BLK_RUN_BYTES)
		request->flags &= ~BLK_SPLIT;
	blk_note_read(queue, request->offset, request->length);
	int missing = blk_look_missing(queue->device, request->offset, request->length);
	if (missing == -EIO)
		err = missing;
	else if (!missing && request->length <= BLK_RUN_BYTES)
		err = give_resident(queue, request, request->offset, request->length, true);
	blk_read_ahead(queue, err == -EAGAIN);
	if (err == -EAGAIN && (missing || request->flags & BLK_SPLIT)) {
		if (missing)
			blk_await_missing(queue, request, request->offset, request->length);
		blk_request_queue(queue, request);
		return;
	}
	request->given = !err;
	request->err = err == -EAGAIN ? wait_run(queue, request, request->offset, request->length) : err;
	blk_request_begun(queue, request);
}

enum blk_step blk_read_step(struct blk_queue *queue, struct blk_request *request)
{
	uint64_t length = BLK_RUN_BYTES - request->at % BLK_RUN_BYTES;

	if (request->awaits_pages)
		return BLK_STEP_WAIT;
	if (request->err)
		return BLK_STEP_DONE;
	if (!(request->flags & BLK_SPLIT)) { /* its pages were missing */
		request->err = wait_run(queue, request, request->at, request->end - request->at);
		request->at = request->end;
		return BLK_STEP_DONE;
	}
	length = length < request->end - request->at ? length : request->end - request->at;
	int err = give_resident(queue, request, request->at, length, false);
	if (err == -EAGAIN && request->nr_waits >= BLK_WAITS_MAX)
		return BLK_STEP_WAIT;
	if (err == -EAGAIN)
		err = wait_run(queue, request, request->at, length);
	if (err)
		request->err = err;
	request->at += length;
	return err || request->at == request->end ? BLK_STEP_DONE : BLK_STEP_MORE;
}

enum blk_step blk_prefetch_step(struct blk_queue *queue, struct blk_request *request)
{
	const struct blk_device *device = queue->device;
	uint64_t extents_max = BLK_RUN_BYTES / device->extent_bytes + 1;
	uint64_t nr_max = 4096;

	while (request->at < request->end) {
		uint64_t extent = request->at / device->extent_bytes;
		uint64_t end = (extent + extents_max) * device->extent_bytes;

		if (extent_state(&device->image->states[extent]) == EXTENT_RESIDENT) {
			request->at = (extent + 1) * device->extent_bytes;
			if (--nr_max == 0)
				return BLK_STEP_MORE;
			continue;
		}
		if (request->nr_waits >= BLK_WAITS_MAX)
			return BLK_STEP_WAIT;
		end = end < request->end ? end : request->end;
		struct blk_wait *wait = blk_wait_new(queue, request, BLK_WAIT_PREFETCH, request->at,
		                                     (uint32_t)(end - request->at), (uint32_t)extents_max + 1);
		if (!wait) {
			request->err = -ENOMEM;
			break;
		}
		wait_shared(wait, request->at, end - request->at);
		blk_wait_all(wait);
		request->at = end;
	}
	return BLK_STEP_DONE;
}
