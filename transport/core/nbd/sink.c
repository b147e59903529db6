/* SPDX-License-Identifier: Apache-2.0 */
/* The engine's sink: bytes that it reads go to the list of iovecs to send, and completions become replies. */
#include "transport/core/nbd/slice.h"

#include <assert.h>
#include <stdlib.h>

static struct nbd_slice *slice_of(struct blk_queue *queue)
{
	return nbd_connection_of(queue)->slice;
}

static struct nbd_submitted *submitted_of(struct blk_request *block)
{
	return (struct nbd_submitted *)((char *)block - offsetof(struct nbd_submitted, block));
}

/* Whether the list has room for a run and its headers. */
static bool has_room(const struct nbd_out *out, uint64_t extent_bytes)
{
	uint64_t nr_extents = BLK_RUN_BYTES / extent_bytes + 2;

	return out->bytes < OUT_BYTES && out->arena_used + BLK_RUN_BYTES + 256 <= ARENA_BYTES &&
	       out->nr_iov + 2 * nr_extents + BLK_RUN_BYTES / 4096 + 8 <= OUT_IOVECS &&
	       out->nr_holds + nr_extents <= OUT_HOLDS;
}

static bool sink_is_ready(struct blk_queue *queue)
{
	while (!nbd_connection_of(queue)->backlog) {
		if (has_room(&slice_of(queue)->out, queue->device->extent_bytes))
			return true;
		out_send(slice_of(queue));
	}
	return false;
}

static void sink_begin(struct blk_queue *queue, struct blk_request *block, uint64_t offset, uint32_t length, bool whole)
{
	struct nbd_out *out = &slice_of(queue)->out;

	out->mark = (struct nbd_out_mark){
		out->nr_iov,
		out->nr_holds,
		out->bytes,
		out->arena_used,
		out->nr_iov ? out->iov[out->nr_iov - 1].iov_len : 0,
	};
	reply_data(slice_of(queue), &submitted_of(block)->request, offset, length, whole);
}

static void sink_undo(struct blk_queue *queue)
{
	struct nbd_out *out = &slice_of(queue)->out;
	const struct nbd_out_mark *mark = &out->mark;

	while (out->nr_holds > mark->nr_holds)
		extent_release(out->holds[--out->nr_holds]);
	out->nr_iov = mark->nr_iov;
	out->bytes = mark->bytes;
	out->arena_used = mark->arena_used;
	if (mark->nr_iov)
		out->iov[mark->nr_iov - 1].iov_len = mark->last_bytes;
}

static void sink_refer(struct blk_queue *queue, const uint8_t *bytes, uint64_t nr_bytes, extent_word *hold)
{
	struct nbd_out *out = &slice_of(queue)->out;

	assert(out->nr_holds < OUT_HOLDS);
	out->holds[out->nr_holds++] = hold;
	out_refer(slice_of(queue), bytes, nr_bytes, NULL);
}

static uint8_t *sink_room(struct blk_queue *queue)
{
	return slice_of(queue)->out.arena + slice_of(queue)->out.arena_used;
}

static void sink_fill(struct blk_queue *queue, uint64_t nr_bytes)
{
	out_reserve(slice_of(queue), nr_bytes);
}

static void sink_give(struct blk_queue *queue, struct blk_request *block, struct blk_wait *wait, bool whole)
{
	struct nbd_slice *slice = slice_of(queue);

	reply_data(slice, &submitted_of(block)->request, wait->offset, wait->length, whole);
	out_refer(slice, wait->bytes, wait->length, wait);
	wait->next = slice->out.spent;
	slice->out.spent = wait;
}

static void note_time(struct nbd_slice *slice, const struct nbd_submitted *submitted, enum nbd_latency kind)
{
	if (submitted->block.waited)
		nbd_export_time(slice->connection->export, kind, clock_ns() - submitted->start_ns, 1);
	else
		slice->nr_prompt[kind]++;
}

static void count(struct nbd_slice *slice, const struct nbd_submitted *submitted)
{
	const struct blk_request *block = &submitted->block;
	struct nbd_counters *counts = &slice->counts;

	switch (submitted->request.type) {
	case NBD_CMD_READ:
		counts->reads++;
		counts->read_bytes += block->err ? 0 : block->length;
		note_time(slice, submitted, block->missed ? NBD_LATENCY_MISS : NBD_LATENCY_HIT);
		break;
	case NBD_CMD_WRITE:
		counts->writes++;
		counts->write_bytes += block->err ? 0 : block->length;
		note_time(slice, submitted, NBD_LATENCY_WRITE);
		break;
	case NBD_CMD_TRIM:
		counts->trims++;
		break;
	case NBD_CMD_WRITE_ZEROES:
		counts->zeroes++;
		break;
	case NBD_CMD_CACHE:
		counts->caches++;
		break;
	case NBD_CMD_FLUSH:
		counts->flushes++;
		note_time(slice, submitted, NBD_LATENCY_FLUSH);
		break;
	}
}

static void sink_complete(struct blk_queue *queue, struct blk_request *block)
{
	struct nbd_slice *slice = slice_of(queue);
	struct nbd_submitted *submitted = submitted_of(block);

	count(slice, submitted);
	if (!block->given)
		reply_status(slice, &submitted->request, block->err);
	if (slice->spare)
		free(submitted);
	else
		slice->spare = submitted;
}

static void sink_wake(struct blk_queue *queue)
{
	nbd_connection_wake(nbd_connection_of(queue));
}

const struct blk_sink nbd_sink = {
	.is_ready = sink_is_ready,
	.begin = sink_begin,
	.undo = sink_undo,
	.refer = sink_refer,
	.room = sink_room,
	.fill = sink_fill,
	.give = sink_give,
	.complete = sink_complete,
	.wake = sink_wake,
};
