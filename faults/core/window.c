/* SPDX-License-Identifier: Apache-2.0 */
#include "faults/core/window.h"

static uint64_t least(uint64_t a, uint64_t b)
{
	return a < b ? a : b;
}

static struct window_stream *stream_find(struct window_state *state, uint64_t extent)
{
	for (int i = 0; i < WINDOW_STREAMS; i++) {
		struct window_stream *stream = &state->streams[i];

		if (!stream->used)
			continue;
		/* A stream of one fault must go on just behind that fault's window, or behind the block that density
		 * added; a match inside the block would make streams of random reads in it. */
		if (extent - stream->last_extent <= 1 || extent == stream->next_extent)
			return stream;
		if (stream->nr_extents > 1 && extent > stream->last_extent && extent < stream->next_extent)
			return stream;
	}
	return NULL;
}

static struct window_stream *stream_least_recent(struct window_state *state)
{
	struct window_stream *oldest = &state->streams[0];

	for (int i = 1; i < WINDOW_STREAMS; i++)
		if (state->streams[i].used < oldest->used)
			oldest = &state->streams[i];
	return oldest;
}

/* The size of the largest aligned block round no, from min to max, that is half set, as are the smaller ones; no counts
 * as set. 1 if the smallest block is not. */
static uint64_t dense_block(const bits_word *set, uint64_t nr_all, uint64_t no, uint64_t min, uint64_t max)
{
	uint64_t block = 1;

	for (uint64_t size = min; size <= max; size *= 2) {
		uint64_t first = no / size * size;
		uint64_t end = least(first + size, nr_all);
		uint64_t nr = bits_count(set, first, end) + !bits_test(set, no);

		if (2 * nr < end - first)
			break;
		block = size;
	}
	return block;
}

void window_plan_fault(struct window_state *state, const struct window_shape *shape, const uint64_t *granted,
                       uint64_t page, struct window_plan *plan_out)
{
	uint64_t extent = page / shape->extent_pages;
	uint64_t max = WINDOW_MAX_PAGES / shape->extent_pages;
	struct window_stream *stream = stream_find(state, extent);
	struct window_plan plan = {0};

	if (max == 0)
		max = 1;
	if (stream) {
		if (extent > stream->last_extent) /* another fault on the same extent is no step forward */
			stream->nr_extents = least(stream->nr_extents * WINDOW_GROWTH, max);
	} else {
		stream = stream_least_recent(state);
		*stream = (struct window_stream){.nr_extents = 1};
	}
	stream->last_extent = extent;
	stream->used = ++state->stamp;
	uint64_t end = least(extent + stream->nr_extents, shape->nr_extents);
	if (stream->next_extent < end)
		stream->next_extent = end;

	plan.first_page = extent * shape->extent_pages;
	plan.nr_pages = shape->extent_pages;
	if (stream->nr_extents > 1) {
		uint64_t now = WINDOW_NOW_PAGES / shape->extent_pages;

		now = least(now ? now : 1, end - extent);
		plan.nr_pages = now * shape->extent_pages;
		plan.ahead_extent = extent + now;
		plan.nr_ahead = end - plan.ahead_extent;
		plan.prefetch_extent = extent + 1;
		plan.nr_prefetch = least(stream->nr_extents, WINDOW_PREFETCH_MAX_PAGES / shape->extent_pages);
		plan.nr_prefetch = least(plan.nr_prefetch, shape->nr_extents - plan.prefetch_extent);
	} else {
		uint64_t block = dense_block((const bits_word *)granted, shape->nr_extents, extent, 2, max);

		if (block > 1) {
			plan.ahead_extent = extent / block * block;
			plan.nr_ahead = least(block, shape->nr_extents - plan.ahead_extent);
			stream->next_extent = plan.ahead_extent + plan.nr_ahead;
		}
	}
	if (shape->fixed_pages) {
		plan.first_page = page / shape->fixed_pages * shape->fixed_pages;
		plan.nr_pages = shape->fixed_pages;
		plan.nr_ahead = 0;
	}
	plan.nr_pages = least(plan.nr_pages, shape->nr_pages - plan.first_page);
	*plan_out = plan;
}

/* Cuts [*first, *first + *nr) down to [low, end). */
static void clip(uint64_t *first, uint64_t *nr, uint64_t low, uint64_t end)
{
	uint64_t from = *first > low ? *first : low;
	uint64_t to = least(*first + *nr, end);

	*first = from;
	*nr = to > from ? to - from : 0;
}

void window_clip(struct window_plan *plan, const struct window_shape *shape, uint64_t first_page, uint64_t nr_pages)
{
	uint64_t end_page = first_page + nr_pages;
	uint64_t low = first_page / shape->extent_pages;
	uint64_t end = (end_page + shape->extent_pages - 1) / shape->extent_pages;

	clip(&plan->first_page, &plan->nr_pages, first_page, end_page);
	clip(&plan->ahead_extent, &plan->nr_ahead, low, end);
	clip(&plan->prefetch_extent, &plan->nr_prefetch, low, end);
}

void window_plan_write(struct window_state *state, const struct window_shape *shape, const uint64_t *charged,
                       uint64_t page, uint64_t *first_out, uint64_t *nr_out)
{
	uint64_t first = page, nr = 1;

	if (shape->fixed_pages) {
		nr = shape->fixed_pages;
	} else if (page == state->write_next_page && state->write_pages) {
		nr = least(state->write_pages * 2, WINDOW_WRITE_MAX_PAGES);
	} else {
		nr = dense_block((const bits_word *)charged, shape->nr_pages, page, WINDOW_WRITE_DENSE_PAGES,
		                 WINDOW_WRITE_MAX_PAGES);
		first = page / nr * nr;
	}
	nr = least(nr, shape->nr_pages - first);
	state->write_pages = nr;
	state->write_next_page = first + nr;
	*first_out = first;
	*nr_out = nr;
}
