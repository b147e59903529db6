/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Requests for pages that are missing: still with the backend that the guest came from
 * (accounting/core/overlay/missing.h).
 *
 * A read waits until no page of its range is missing, and then goes on as any other: a page is never missing again. A
 * write of a part of a page waits as it does for the image's page. Writing, zeroing or discarding whole pages waits for
 * nothing.
 */
#include "transport/core/blocks/wait.h"

#include <errno.h>
#include <stddef.h>

static void pages_came(struct overlay_wait *missing, int status)
{
	blk_wait_answer((struct blk_wait *)((char *)missing - offsetof(struct blk_wait, missing)), status);
}

void blk_wait_pages(struct blk_wait *wait)
{
	wait->missing = (struct overlay_wait){
		.first = wait->offset >> 12,
		.end = page_after(wait->offset + wait->length),
		.owner = wait->queue,
		.go = pages_came,
	};
	atomic_fetch_add(&wait->nr_awaited, 1);
	int state = overlay_await(wait->queue->device->overlay, &wait->missing);
	if (state != -EINPROGRESS)
		blk_wait_answer(wait, state);
}

int blk_look_missing(const struct blk_device *device, uint64_t offset, uint64_t length)
{
	if (!device->overlay || !overlay_has_missing(device->overlay))
		return 0;
	return overlay_look_missing(device->overlay, offset >> 12, page_after(offset + length) - (offset >> 12));
}

void blk_await_missing(struct blk_queue *queue, struct blk_request *request, uint64_t offset, uint64_t length)
{
	struct blk_wait *wait = blk_wait_new(queue, request, BLK_WAIT_PAGES, offset, (uint32_t)length, 0);

	if (!wait) {
		request->err = -ENOMEM;
		return;
	}
	request->awaits_pages = request->missed = true;
	blk_wait_pages(wait);
	blk_wait_all(wait);
}
