/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Windows: how much to map, to map ahead and to load ahead for one fault.  Pure: no memory, no clock.
 *
 * A fault costs as much as mapping 30 to 500 resident pages, so a window is worth its price when a fair part of it is
 * used. Two signs show that. A stream: each fault that walks forward makes its window longer. Density: once half of an
 * aligned block of extents is granted, the rest of the block is mapped too, and then the block twice as large is judged
 * in the same way; so random reads of a small working set converge. Writes are judged by the same two signs, page by
 * page.
 */
#ifndef COWSHED_WINDOW_H
#define COWSHED_WINDOW_H

#include "cache/core/bits.h"

/* cdef-begin */
#define WINDOW_STREAMS 4
#define WINDOW_GROWTH 4
#define WINDOW_NOW_PAGES 512           /* of a stream: mapped before the next fault is read */
#define WINDOW_MAX_PAGES 4096          /* of a stream */
#define WINDOW_PREFETCH_MAX_PAGES 4096 /* loaded ahead of a stream */
#define WINDOW_WRITE_MAX_PAGES 64
#define WINDOW_WRITE_DENSE_PAGES 16 /* the smallest block of random writes that is judged by its density */

struct window_stream {
	uint64_t next_extent; /* the end of the current window: where the stream is expected to fault next */
	uint64_t last_extent; /* of the last fault */
	uint64_t nr_extents;  /* its length */
	uint64_t used;        /* a stamp: the least recent stream is replaced */
};

struct window_state {
	struct window_stream streams[WINDOW_STREAMS];
	uint64_t stamp;
	uint64_t write_next_page;
	uint64_t write_pages;
};

struct window_plan {
	uint64_t first_page, nr_pages;         /* map now, where resident */
	uint64_t ahead_extent, nr_ahead;       /* map in idle time, where resident */
	uint64_t prefetch_extent, nr_prefetch; /* load */
};

struct window_shape {
	uint64_t nr_pages, nr_extents;
	uint64_t extent_pages;
	uint64_t fixed_pages; /* 0: adaptive */
};

/* granted: a bitmap of nr_extents, read only. */
void window_plan_fault(struct window_state *state, const struct window_shape *shape, const uint64_t *granted,
                       uint64_t page, struct window_plan *plan_out);
/* Cuts a plan down to the region of the faulting page. */
void window_clip(struct window_plan *plan, const struct window_shape *shape, uint64_t first_page, uint64_t nr_pages);
/* Which pages a write fault on page should open, if they are charged; page is one of them.  charged: a bitmap of
 * nr_pages, read only. */
void window_plan_write(struct window_state *state, const struct window_shape *shape, const uint64_t *charged,
                       uint64_t page, uint64_t *first_out, uint64_t *nr_out);
/* cdef-end */

#endif
