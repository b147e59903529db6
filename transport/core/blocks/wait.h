/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Waits of the engine's requests, and what its files share beside the public blocks.h.
 *
 * A loader answers with the extent held. It copies a read's bytes at once: a wait that kept its extents until the last
 * of them came could need more than the store has room for. A patch has one extent, takes a hold of its own and is
 * applied when its queue is collected, whether or not the client reads. So no hold lasts longer than until a worker
 * collects, however slow a client is.
 */
#ifndef COWSHED_BLOCK_WAIT_H
#define COWSHED_BLOCK_WAIT_H

#include "cache/core/loader.h"
#include "cache/core/store.h"
#include "transport/core/blocks/blocks.h"

#define BLK_WAITS_MAX 4 /* of a PREFETCH, or of a long read, at once */

enum blk_wait_kind { BLK_WAIT_READ, BLK_WAIT_PREFETCH, BLK_WAIT_PATCH, BLK_WAIT_FLUSH, BLK_WAIT_PAGES };

/* Bytes of one extent that a wait needs. */
struct blk_load {
	struct load_waiter waiter;
	struct blk_wait *wait;
	uint64_t offset;
	uint32_t length;
	bool held;
};

struct blk_wait {
	struct blk_wait *next; /* of its queue's ready or finished list; then the sink's */
	struct blk_queue *queue;
	struct blk_request *request;
	struct overlay_sync sync;
	struct overlay_wait missing;
	enum blk_wait_kind kind;
	uint64_t offset;
	uint32_t length;
	_Atomic uint32_t nr_awaited; /* loads, pages and a flush that have not come; and 1 until all are asked for */
	_Atomic int status;
	uint32_t nr_loads;
	uint8_t *bytes; /* READ: what was read; PATCH: what is written, NULL: zeros */
	struct blk_load loads[];
};

/* Makes a wait of a request, for at most nr_loads extents, that lasts at least until blk_wait_all; NULL without
 * memory. */
struct blk_wait *blk_wait_new(struct blk_queue *queue, struct blk_request *request, enum blk_wait_kind kind,
                              uint64_t offset, uint32_t length, uint32_t nr_loads);
void blk_wait_free(struct blk_wait *wait);
/* Returns true, with the extent of offset held, if it is resident; else makes the wait wait for it. */
bool blk_wait_extent(struct blk_wait *wait, uint64_t offset, uint32_t length);
/* Makes it wait for its missing pages. */
void blk_wait_pages(struct blk_wait *wait);
/* Must be called once everything that it waits for was asked for. */
void blk_wait_all(struct blk_wait *wait);
/* One thing that a wait needs has come (status 0), or has failed; for any thread. */
void blk_wait_answer(struct blk_wait *wait, int status);

/* queue.c */
/* All of a request was begun: completes it, or leaves that to its last wait. */
void blk_request_begun(struct blk_queue *queue, struct blk_request *request);
/* Makes a request go on step by step (blk_queue_step). */
void blk_request_queue(struct blk_queue *queue, struct blk_request *request);
/* Checks the err of a change. true: it and everything after it must wait for the overlay's thaw. false, and err is
 * -EBUSY: the overlay was thawed meanwhile. */
bool blk_queue_freeze(struct blk_queue *queue, int err);

/* missing.c */
/* 0: no page of the range is missing; -EIO: one is lost; -EINPROGRESS: one has to be waited for. */
int blk_look_missing(const struct blk_device *device, uint64_t offset, uint64_t length);
/* Makes a request wait for the missing pages of a range. */
void blk_await_missing(struct blk_queue *queue, struct blk_request *request, uint64_t offset, uint64_t length);

/* ahead.c */
/* Notes a read, to detect sequential ones. */
void blk_note_read(struct blk_queue *queue, uint64_t offset, uint64_t length);
/* Prefetches what a client that reads sequentially will read next, once it has missed. */
void blk_read_ahead(struct blk_queue *queue, bool missed);

/* patch.c */
/* Writes a part of one page (bytes NULL: zeros), at once or when the image's page is there; false: call again after the
 * thaw. */
bool blk_patch(struct blk_queue *queue, struct blk_request *request, uint64_t offset, uint32_t length,
               const uint8_t *bytes);
/* Applies a patch whose wait is ready. false: not now; the wait will be ready again. */
bool blk_patch_complete(struct blk_wait *wait);

enum blk_step { BLK_STEP_MORE, BLK_STEP_WAIT, BLK_STEP_DONE };

void blk_read_begin(struct blk_queue *queue, struct blk_request *request);
enum blk_step blk_read_step(struct blk_queue *queue, struct blk_request *request);
enum blk_step blk_prefetch_step(struct blk_queue *queue, struct blk_request *request);
void blk_write_begin(struct blk_queue *queue, struct blk_request *request);
void blk_clear_begin(struct blk_queue *queue, struct blk_request *request);
enum blk_step blk_clear_step(struct blk_queue *queue, struct blk_request *request);
void blk_flush_begin(struct blk_queue *queue, struct blk_request *request);
/* Makes a request wait until everything that was written is durable; false: nothing to wait for, or no memory. */
bool blk_flush_wait(struct blk_queue *queue, struct blk_request *request);

/* The first page that begins at or after an offset. */
static inline uint64_t page_after(uint64_t offset)
{
	return (offset >> 12) + (offset % 4096 != 0);
}

#endif
