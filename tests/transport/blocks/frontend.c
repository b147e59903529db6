/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The smallest frontend of the block request engine: its client is the caller, and its memory is the caller's.
 *
 * front_submit and the others are called by one thread at a time, which is the queue's worker. What is read goes to the
 * memory given with the request. A client that takes nothing (front_stall) is what a full socket is elsewhere.
 */
#define _GNU_SOURCE
#include "transport/core/blocks/wait.h"

#include <assert.h>
#include <poll.h>
#include <stddef.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct front_request {
	struct blk_request block;
	uint8_t *memory; /* block.length bytes of the caller's */
	uint32_t nr_completions, nr_runs;
	bool whole; /* a run was given as the whole of it */
};

struct front {
	struct blk_queue queue;
	struct blk_device device;
	struct blk_frames *frames;
	int wake_fd;
	bool stalled;
	struct front_request *begun; /* whose run is being given */
	uint64_t at, begun_at;       /* in its memory */
	uint64_t nr_undone;
};

static struct front *front_of(struct blk_queue *queue)
{
	return (struct front *)((char *)queue - offsetof(struct front, queue));
}

static struct front_request *request_of(struct blk_request *block)
{
	return (struct front_request *)((char *)block - offsetof(struct front_request, block));
}

static bool is_ready(struct blk_queue *queue)
{
	return !front_of(queue)->stalled || queue->broken;
}

static void begin(struct blk_queue *queue, struct blk_request *block, uint64_t offset, uint32_t length, bool whole)
{
	struct front *front = front_of(queue);

	assert(whole == (length == block->length));
	front->begun = request_of(block);
	front->begun->nr_runs++;
	front->begun->whole |= whole;
	front->at = front->begun_at = offset - block->offset;
}

static void undo(struct blk_queue *queue)
{
	struct front *front = front_of(queue);

	front->begun->nr_runs--;
	front->begun->whole = false;
	memset(front->begun->memory + front->begun_at, 0, front->at - front->begun_at);
	front->nr_undone++;
}

static void refer(struct blk_queue *queue, const uint8_t *bytes, uint64_t nr_bytes, extent_word *hold)
{
	struct front *front = front_of(queue);

	memcpy(front->begun->memory + front->at, bytes, nr_bytes);
	extent_release(hold);
	front->at += nr_bytes;
}

static uint8_t *room(struct blk_queue *queue)
{
	return front_of(queue)->begun->memory + front_of(queue)->at;
}

static void fill(struct blk_queue *queue, uint64_t nr_bytes)
{
	front_of(queue)->at += nr_bytes;
}

static void give(struct blk_queue *queue, struct blk_request *block, struct blk_wait *wait, bool whole)
{
	struct front_request *request = request_of(block);

	(void)queue;
	memcpy(request->memory + (wait->offset - block->offset), wait->bytes, wait->length);
	request->nr_runs++;
	request->whole |= whole;
	blk_wait_free(wait);
}

static void complete(struct blk_queue *queue, struct blk_request *block)
{
	(void)queue;
	request_of(block)->nr_completions++;
}

static void wake(struct blk_queue *queue)
{
	uint64_t one = 1;

	if (write(front_of(queue)->wake_fd, &one, sizeof one) != sizeof one)
		abort();
}

static const struct blk_sink SINK = {
	.is_ready = is_ready,
	.begin = begin,
	.undo = undo,
	.refer = refer,
	.room = room,
	.fill = fill,
	.give = give,
	.complete = complete,
	.wake = wake,
};

struct front *front_new(struct image *image, struct overlay *overlay)
{
	struct front *front = calloc(1, sizeof *front);

	if (!front || blk_device_init(&front->device, &front->frames, image, overlay))
		abort();
	front->wake_fd = eventfd(0, EFD_CLOEXEC);
	blk_queue_init(&front->queue, &front->device, &SINK);
	return front;
}

void front_free(struct front *front)
{
	blk_queue_deinit(&front->queue);
	blk_device_deinit(&front->device, &front->frames);
	assert(!front->frames);
	close(front->wake_fd);
	free(front);
}

struct front_request *front_submit(struct front *front, int op, uint32_t flags, uint64_t offset, uint64_t length,
                                   uint8_t *memory)
{
	struct front_request *request = calloc(1, sizeof *request);

	if (!request)
		abort();
	request->block = (struct blk_request){.op = op, .flags = flags, .offset = offset, .length = length};
	request->memory = memory;
	blk_submit(&front->queue, &request->block);
	return request;
}

uint64_t front_write(struct front *front, struct front_request *request, const uint8_t *bytes, uint64_t nr_bytes)
{
	return blk_write(&front->queue, &request->block, bytes, nr_bytes);
}

void front_cancel(struct front *front, struct front_request *request)
{
	blk_write_cancel(&front->queue, &request->block);
}

/* What a worker does when it is woken, or would go on; whether there is more to do at once. */
int front_run(struct front *front)
{
	bool more;

	blk_queue_collect(&front->queue);
	if (front->queue.broken) {
		blk_queue_abandon(&front->queue);
		return front->queue.frozen;
	}
	blk_queue_give(&front->queue);
	more = blk_queue_step(&front->queue);
	return more || (front->queue.finished && !front->stalled);
}

/* Waits for a wake; 0: none came. */
int front_wait(struct front *front, int timeout_ms)
{
	struct pollfd poll_fd = {.fd = front->wake_fd, .events = POLLIN};
	uint64_t nr;

	return poll(&poll_fd, 1, timeout_ms) == 1 && read(front->wake_fd, &nr, sizeof nr) == sizeof nr;
}

void front_stall(struct front *front, int stalled)
{
	front->stalled = stalled;
}

void front_break(struct front *front)
{
	front->queue.broken = true;
}

struct front_state {
	uint32_t accepts, frozen, nr_requests, nr_waits;
	uint64_t buffered_bytes, nr_waiting, nr_hits, nr_misses, nr_undone;
};

void front_state(const struct front *front, struct front_state *state_out)
{
	*state_out = (struct front_state){
		.accepts = blk_queue_accepts(&front->queue),
		.frozen = front->queue.frozen,
		.nr_requests = front->queue.nr_requests,
		.nr_waits = front->queue.nr_waits,
		.buffered_bytes = front->queue.buffered_bytes,
		.nr_waiting = front->device.nr_waiting,
		.nr_hits = front->queue.nr_hits,
		.nr_misses = front->queue.nr_misses,
		.nr_undone = front->nr_undone,
	};
}

struct front_request_state {
	int err;
	uint32_t nr_completions, nr_runs, whole, missed;
};

void front_request_state(const struct front_request *request, struct front_request_state *state_out)
{
	*state_out = (struct front_request_state){
		.err = request->block.err,
		.nr_completions = request->nr_completions,
		.nr_runs = request->nr_runs,
		.whole = request->whole,
		.missed = request->block.missed,
	};
}

void front_request_free(struct front_request *request)
{
	free(request);
}
