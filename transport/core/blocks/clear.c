/* SPDX-License-Identifier: Apache-2.0 */
/*
 * DISCARD and ZERO.
 *
 * A discard gives the whole pages inside its range back to the image. Zeros are private pages that hold nothing; with
 * BLK_ALLOCATE they are stored. BLK_FAST is refused where it could be as slow as a write: if zeros have to be stored,
 * or a page of the image has to be read first.
 */
#include "transport/core/blocks/wait.h"

#include <errno.h>

#define STEP_BYTES ((uint64_t)16 << 20) /* at a time, before other requests go on */

/* The whole pages in the rest of a request; *nr_out is 0 if there is none. */
static void whole_pages(const struct blk_device *device, const struct blk_request *request, uint64_t *first_out,
                        uint64_t *nr_out)
{
	uint64_t end = request->end == device->size_bytes ? page_after(request->end) : request->end >> 12;

	*first_out = page_after(request->at);
	*nr_out = end > *first_out ? end - *first_out : 0;
}

void blk_clear_begin(struct blk_queue *queue, struct blk_request *request)
{
	struct blk_device *device = queue->device;

	if (request->op == BLK_ZERO) {
		uint64_t first = request->at >> 12;
		bool parts = request->at % 4096 || (request->end % 4096 && request->end != device->size_bytes);

		if (request->flags & BLK_FAST && (parts || request->flags & BLK_ALLOCATE))
			request->err = -ENOTSUP;
		else
			request->err = overlay_take(device->overlay, first, page_after(request->end) - first,
			                            &request->reserved_pages);
	}
	if (request->err || blk_clear_step(queue, request) == BLK_STEP_DONE)
		blk_request_begun(queue, request);
	else
		blk_request_queue(queue, request);
}

static void zero_step(struct blk_queue *queue, struct blk_request *request)
{
	struct blk_device *device = queue->device;
	uint64_t first, nr;

	whole_pages(device, request, &first, &nr);
	if (nr && request->at % 4096 == 0) {
		uint64_t length = request->end - request->at;

		if (length != device->size_bytes - request->at)
			length = nr << 12;
		length = length < STEP_BYTES ? length : STEP_BYTES;
		request->err = overlay_zero(device->overlay, request->at, length, request->flags & BLK_ALLOCATE,
		                            &request->reserved_pages);
		if (request->err == -EBUSY) {
			blk_queue_freeze(queue, request->err);
			request->err = 0;
			return;
		}
		request->at += length;
	} else {
		uint64_t page_end = ((request->at >> 12) + 1) << 12;
		uint64_t end = page_end < request->end ? page_end : request->end;

		if (blk_patch(queue, request, request->at, (uint32_t)(end - request->at), NULL))
			request->at = end;
	}
}

static int discard_step(struct blk_queue *queue, struct blk_request *request)
{
	uint64_t first, nr, nr_max = STEP_BYTES >> 12;

	whole_pages(queue->device, request, &first, &nr);
	int err = overlay_trim(queue->device->overlay, first, nr < nr_max ? nr : nr_max);
	if (err != -EBUSY)
		request->at = nr <= nr_max ? request->end : (first + nr_max) << 12;
	return err;
}

enum blk_step blk_clear_step(struct blk_queue *queue, struct blk_request *request)
{
	if (request->op == BLK_ZERO) {
		uint64_t until = request->at + STEP_BYTES;

		while (request->at < request->end && request->at < until && !request->err && !queue->frozen)
			zero_step(queue, request);
	} else {
		request->err = discard_step(queue, request);
		if (request->err == -EBUSY) {
			request->err = 0;
			return blk_queue_freeze(queue, -EBUSY) ? BLK_STEP_WAIT : BLK_STEP_MORE;
		}
	}
	if (queue->frozen && !request->err && request->at < request->end)
		return BLK_STEP_WAIT;
	return request->err || request->at == request->end ? BLK_STEP_DONE : BLK_STEP_MORE;
}
