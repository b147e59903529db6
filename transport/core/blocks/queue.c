/* SPDX-License-Identifier: Apache-2.0 */
/* Queues: requests come in, and end once what they waited for has come. */
#include "transport/core/blocks/wait.h"

#include <assert.h>
#include <errno.h>
#include <stddef.h>

/* The queue's overlay was thawed. */
static void queue_go(struct overlay_thaw_wait *thaw)
{
	struct blk_queue *queue = (struct blk_queue *)((char *)thaw - offsetof(struct blk_queue, thaw));

	queue->sink->wake(queue);
}

void blk_queue_init(struct blk_queue *queue, struct blk_device *device, const struct blk_sink *sink)
{
	*queue = (struct blk_queue){.device = device, .sink = sink, .thaw.go = queue_go};
	pthread_mutex_init(&queue->lock, NULL);
	queue->ready_tail = &queue->ready;
	queue->steps_tail = &queue->steps;
	queue->finished_tail = &queue->finished;
}

void blk_queue_deinit(struct blk_queue *queue)
{
	if (queue->device->overlay)
		overlay_cancel_thaw_wait(queue->device->overlay, &queue->thaw);
	pthread_mutex_lock(&queue->lock); /* wait for the thread that made the last wait ready */
	assert(!queue->nr_requests && !queue->nr_waits && !queue->buffered_bytes);
	assert(!queue->ready && !queue->steps && !queue->finished);
	pthread_mutex_unlock(&queue->lock);
	pthread_mutex_destroy(&queue->lock);
}

bool blk_queue_accepts(const struct blk_queue *queue)
{
	return !queue->frozen && queue->nr_requests < BLK_REQUESTS_MAX && queue->buffered_bytes < BLK_BUFFERED_MAX;
}

bool blk_queue_freeze(struct blk_queue *queue, int err)
{
	if (err != -EBUSY || !overlay_await_thaw(queue->device->overlay, &queue->thaw))
		return false;
	queue->frozen = true;
	return true;
}

void blk_submit(struct blk_queue *queue, struct blk_request *request)
{
	*request = (struct blk_request){
		.op = request->op,
		.flags = request->flags,
		.offset = request->offset,
		.length = request->length,
		.err = request->err,
		.at = request->offset,
		.end = request->offset + request->length,
	};
	assert(request->err || (request->offset <= queue->device->size_bytes &&
	                        request->length <= queue->device->size_bytes - request->offset));
	queue->nr_requests++;
	if (request->op == BLK_WRITE)
		blk_write_begin(queue, request);
	else if (request->err)
		blk_request_begun(queue, request);
	else if (request->op == BLK_READ)
		blk_read_begin(queue, request);
	else if (request->op == BLK_FLUSH)
		blk_flush_begin(queue, request);
	else if (request->op == BLK_PREFETCH)
		blk_request_queue(queue, request);
	else
		blk_clear_begin(queue, request);
}

void blk_request_queue(struct blk_queue *queue, struct blk_request *request)
{
	request->waited = true;
	request->next = NULL;
	*queue->steps_tail = request;
	queue->steps_tail = &request->next;
}

static void request_end(struct blk_queue *queue, struct blk_request *request)
{
	if (request->reserved_pages)
		overlay_give(queue->device->overlay, request->reserved_pages);
	request->reserved_pages = 0;
	if (!request->err && request->flags & BLK_FUA && !request->synced && blk_flush_wait(queue, request))
		return;
	queue->nr_requests--;
	queue->sink->complete(queue, request);
}

void blk_request_begun(struct blk_queue *queue, struct blk_request *request)
{
	request->begun = true;
	if (!request->nr_waits)
		request_end(queue, request);
}

void blk_queue_collect(struct blk_queue *queue)
{
	struct image *image = queue->device->image;

	queue->frozen = false;
	pthread_mutex_lock(&queue->lock);
	struct blk_wait *ready = queue->ready;
	queue->ready = NULL;
	queue->ready_tail = &queue->ready;
	pthread_mutex_unlock(&queue->lock);
	for (struct blk_wait *wait; (wait = ready);) {
		ready = wait->next;
		if (wait->kind == BLK_WAIT_PATCH) {
			if (!blk_patch_complete(wait))
				continue;
			if (wait->nr_loads && wait->loads[0].held)
				extent_release(&image->states[wait->loads[0].waiter.extent]);
		}
		wait->next = NULL;
		*queue->finished_tail = wait;
		queue->finished_tail = &wait->next;
	}
}

/* Counts a wait that is over off its request, which may end. */
static void request_waited(struct blk_queue *queue, struct blk_request *request, enum blk_wait_kind kind, int status)
{
	if (status && !request->err)
		request->err = status;
	if (kind == BLK_WAIT_PAGES)
		request->awaits_pages = false;
	if (--request->nr_waits == 0) {
		atomic_fetch_sub_explicit(&queue->device->nr_waiting, 1, memory_order_relaxed);
		atomic_fetch_sub_explicit(&queue->device->frames->nr_waiting, 1, memory_order_relaxed);
		if (request->begun)
			request_end(queue, request);
	}
}

void blk_queue_give(struct blk_queue *queue)
{
	for (struct blk_wait *wait; (wait = queue->finished) && queue->sink->is_ready(queue);) {
		struct blk_request *request = wait->request;
		enum blk_wait_kind kind = wait->kind;
		int status = atomic_load(&wait->status);
		bool whole = !(request->flags & BLK_SPLIT);

		queue->finished = wait->next;
		if (!wait->next)
			queue->finished_tail = &queue->finished;
		if (kind == BLK_WAIT_READ && !status && !queue->broken) {
			request->given = whole;
			queue->sink->give(queue, request, wait, whole);
		} else {
			blk_wait_free(wait);
		}
		request_waited(queue, request, kind, status);
	}
}

bool blk_queue_step(struct blk_queue *queue)
{
	bool more = false;

	for (struct blk_request **at = &queue->steps, *request; (request = *at);) {
		enum blk_step step = BLK_STEP_DONE;

		if (!queue->sink->is_ready(queue))
			return false;
		if (queue->broken)
			request->err = -ESHUTDOWN;
		else if (request->op == BLK_READ)
			step = blk_read_step(queue, request);
		else if (request->op == BLK_PREFETCH)
			step = blk_prefetch_step(queue, request);
		else
			step = blk_clear_step(queue, request);
		more |= step == BLK_STEP_MORE;
		if (step != BLK_STEP_DONE) {
			at = &request->next;
			continue;
		}
		*at = request->next;
		if (!*at)
			queue->steps_tail = at;
		request->next = NULL;
		blk_request_begun(queue, request);
	}
	return more;
}

void blk_queue_abandon(struct blk_queue *queue)
{
	assert(queue->broken);
	if (queue->device->overlay)
		overlay_cancel_waits(queue->device->overlay, queue);
	blk_queue_give(queue);
	blk_queue_step(queue);
}
