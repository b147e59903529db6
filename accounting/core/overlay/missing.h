/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Pages of an overlay that are missing: private and charged, but their bytes are still with the backend that the guest
 * came from (a handoff by post-copy).
 *
 * Which they are is the account's bitmap "preloaded" (ledger.h: private, and not in the guest's memory yet; an overlay
 * is that memory), which outlives the process, and counted in its preloaded_pages; files say so too (overlay_disk.c).
 * Pages are made missing while nobody uses the overlay yet. After that a missing page only ever ceases to be so: its
 * bytes arrive, the guest writes the whole of it, or gives it back; what arrives after that is dropped.
 *
 * Who needs the bytes of a missing page waits: nobody is shown zeros or the image in its place. What is waited for is
 * *wanted*, and is to be fetched first.  A page can be lost, if there is nobody to fetch it from: then who needs it
 * fails with -EIO, until it arrives after all.  Wanted and lost are the process's own: a successor asks again.
 *
 * A missing bit is cleared after the bytes are there, under the stripe's lock; waits are under missing->lock, which is
 * within it, and outside of whatever lock go takes.
 */
#ifndef COWSHED_OVERLAY_MISSING_H
#define COWSHED_OVERLAY_MISSING_H

#include "accounting/core/overlay/overlay.h"

/* cdef-begin */
/* Makes nr pages from first private, past the quota too, and missing.  Nobody may use the overlay yet.  -EEXIST: one of
 * them is private already. */
int overlay_expect(struct overlay *overlay, uint64_t first, uint64_t nr);
/* Bytes of nr pages from first: those that are missing are not any more; others stay as they are.  How many were
 * missing, or -errno; then some are missing still. */
int64_t overlay_arrive(struct overlay *overlay, uint64_t first, uint64_t nr, const uint8_t *bytes);
/* The missing pages: (nr_pages + 63) / 64 words; how many. */
int64_t overlay_missing(struct overlay *overlay, uint64_t *words_out, uint64_t nr_words);
/* Of those, the ones that somebody came to wait for since the last call; how many. */
int64_t overlay_take_wanted(struct overlay *overlay, uint64_t *words_out, uint64_t nr_words);
/* An eventfd that counts up when a page is wanted, or the last one is not missing any more; the overlay's own; -ENOENT:
 * no page was ever missing. */
int overlay_missing_fd(const struct overlay *overlay);
/* Nobody has the missing ones of nr pages from first any more; how many were not lost before. */
int64_t overlay_lose(struct overlay *overlay, uint64_t first, uint64_t nr);
/* The missing pages that are lost. */
int64_t overlay_nr_lost(struct overlay *overlay);
/* No page is lost: somebody may have them after all. */
void overlay_find(struct overlay *overlay);
/* Returns once all that was written is as durable as it gets. */
int overlay_flush_now(struct overlay *overlay);
/* cdef-end */

/* Waits until no page of a range is missing (0), one of them is lost (-EIO), or who waits is gone (-ESHUTDOWN); go is
 * called once, under missing->lock. */
struct overlay_wait {
	struct overlay_wait *next;
	uint64_t first, end;
	const void *owner;
	void (*go)(struct overlay_wait *wait, int status);
};

struct overlay_missing {
	pthread_mutex_t lock;
	struct overlay_wait *waits;
	bits_word *wanted, *lost;
	int event_fd;
};

static inline bool overlay_has_missing(const struct overlay *overlay)
{
	return atomic_load_explicit(&overlay->account->header->preloaded_pages, memory_order_acquire) != 0;
}

static inline bool overlay_is_missing(const struct overlay *overlay, uint64_t page)
{
	return overlay_has_missing(overlay) && bits_test(overlay->account->preloaded, page);
}

/* 0: no page of the range is missing; -EIO: one is lost; -EINPROGRESS: it has to be waited for. */
int overlay_look_missing(struct overlay *overlay, uint64_t first, uint64_t nr);
/* The same, and those that are missing are wanted: -EINPROGRESS: go will be called.  first, end, owner and go are set.
 */
int overlay_await(struct overlay *overlay, struct overlay_wait *wait);
/* Ends the waits of an owner, with -ESHUTDOWN. */
void overlay_cancel_waits(struct overlay *overlay, const void *owner);
/* Under the stripe's lock: pages of one group have bytes, or are not private any more. */
void overlay_come(struct overlay *overlay, uint64_t first, uint64_t nr);

/* An account was adopted that may have missing pages. */
int overlay_missing_init(struct overlay *overlay);
void overlay_missing_deinit(struct overlay *overlay);

#endif
