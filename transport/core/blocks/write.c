/* SPDX-License-Identifier: Apache-2.0 */
/*
 * WRITE.
 *
 * The quota is taken when the request is submitted; then its payload goes to the overlay as it comes, whole pages at a
 * time, so that a write of 32 MiB needs no buffer. The parts of pages at its two ends are patches.
 */
#include "transport/core/blocks/wait.h"

#include <errno.h>

static bool is_last_short(const struct blk_device *device, uint64_t offset, uint64_t length)
{
	return offset + length == device->size_bytes;
}

void blk_write_begin(struct blk_queue *queue, struct blk_request *request)
{
	uint64_t first = request->offset >> 12;

	if (!request->err)
		request->err = overlay_take(queue->device->overlay, first, page_after(request->end) - first,
		                            &request->reserved_pages);
	if (!request->length)
		blk_request_begun(queue, request);
}

/* Takes one run of payload: whole pages, or the request's part of one page; 0 if that part has not come whole. */
static uint64_t write_run(struct blk_queue *queue, struct blk_request *request, const uint8_t *bytes, uint64_t nr_bytes)
{
	struct blk_device *device = queue->device;
	uint64_t left = request->end - request->at;
	uint64_t nr = nr_bytes < left ? nr_bytes : left;
	uint32_t in_page = request->at % 4096;

	if (request->err)
		return nr;
	if (!in_page && !(nr == left && is_last_short(device, request->at, nr)))
		nr = nr >= 4096 ? nr & ~(uint64_t)4095 : nr;
	if (!in_page && (nr >= 4096 || is_last_short(device, request->at, nr))) {
		do
			request->err = overlay_write(device->overlay, request->at, nr, bytes, &request->reserved_pages);
		while (request->err == -EBUSY && !blk_queue_freeze(queue, request->err));
		if (request->err != -EBUSY)
			return nr;
		request->err = 0;
		return 0;
	}
	uint64_t part = 4096 - in_page < left ? 4096 - in_page : left;
	if (nr_bytes < part)
		return 0;
	return blk_patch(queue, request, request->at, (uint32_t)part, bytes) ? part : 0;
}

uint64_t blk_write(struct blk_queue *queue, struct blk_request *request, const uint8_t *bytes, uint64_t nr_bytes)
{
	uint64_t nr_taken = 0;

	while (nr_taken < nr_bytes && request->at != request->end) {
		uint64_t nr = write_run(queue, request, bytes + nr_taken, nr_bytes - nr_taken);

		if (!nr)
			return nr_taken;
		request->at += nr;
		nr_taken += nr;
	}
	if (request->at == request->end)
		blk_request_begun(queue, request);
	return nr_taken;
}

void blk_write_cancel(struct blk_queue *queue, struct blk_request *request)
{
	request->err = -ESHUTDOWN;
	blk_request_begun(queue, request);
}
