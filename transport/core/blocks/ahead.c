/* SPDX-License-Identifier: Apache-2.0 */
/* Readahead: for a client that reads sequentially and has missed, prefetches twice what it has read so far. */
#include "transport/core/blocks/wait.h"

#define AHEAD_BYTES_MAX ((uint64_t)4 << 20)

void blk_note_read(struct blk_queue *queue, uint64_t offset, uint64_t length)
{
	if (offset != queue->stream_offset) {
		queue->stream_bytes = 0;
		queue->ahead_offset = 0;
	}
	queue->stream_bytes += length;
	queue->stream_offset = offset + length;
}

void blk_read_ahead(struct blk_queue *queue, bool missed)
{
	const struct blk_device *device = queue->device;
	uint64_t window = 2 * queue->stream_bytes;

	window = window < AHEAD_BYTES_MAX ? window : AHEAD_BYTES_MAX;
	if (missed && queue->ahead_offset < queue->stream_offset)
		queue->ahead_offset = queue->stream_offset;
	if (!queue->ahead_offset || window < device->extent_bytes ||
	    queue->stream_offset + window / 2 < queue->ahead_offset)
		return;
	uint64_t first = (queue->ahead_offset + device->extent_bytes - 1) / device->extent_bytes;
	uint64_t nr = window / device->extent_bytes;
	uint64_t nr_extents = device->image->shape.nr_extents;
	if (first >= nr_extents)
		return;
	nr = nr < nr_extents - first ? nr : nr_extents - first;
	store_prefetch(device->image, first, nr);
	queue->ahead_offset = (first + nr) * device->extent_bytes;
}
