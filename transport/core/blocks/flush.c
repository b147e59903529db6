/* SPDX-License-Identifier: Apache-2.0 */
/* FLUSH, and changes that must be durable when they complete. */
#include "transport/core/blocks/wait.h"

#include <errno.h>
#include <stddef.h>

static void flushed(struct overlay_sync *sync, int status)
{
	blk_wait_answer((struct blk_wait *)((char *)sync - offsetof(struct blk_wait, sync)), status);
}

bool blk_flush_wait(struct blk_queue *queue, struct blk_request *request)
{
	struct overlay *overlay = queue->device->overlay;

	request->synced = true;
	if (!overlay || !overlay->disk)
		return false;
	struct blk_wait *wait = blk_wait_new(queue, request, BLK_WAIT_FLUSH, 0, 0, 0);
	if (!wait) {
		request->err = -ENOMEM;
		return false;
	}
	wait->sync.done = flushed;
	request->begun = true;
	if (overlay_flush(overlay, &wait->sync) == 1)
		flushed(&wait->sync, 0);
	return true;
}

void blk_flush_begin(struct blk_queue *queue, struct blk_request *request)
{
	if (!blk_flush_wait(queue, request))
		blk_request_begun(queue, request);
}
