/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Pages of an overlay that are missing: private and charged, but their bytes are still with the backend that the guest
 * came from (a handoff by post-copy).
 *
 * The account's bitmap "preloaded" marks them (ledger.h: private, and not in the guest's memory yet; an overlay is that
 * memory); it outlives the process, and preloaded_pages counts them. An overlay's files mark them too (files.c). Pages
 * are made missing before the overlay is in use. A missing page then ceases to be missing when its bytes arrive, or
 * when the guest writes all of it or gives it back; bytes that arrive after that are dropped.
 *
 * A request that needs the bytes of a missing page waits: it never reads zeros or the image in its place. A page that a
 * request waits for is *wanted*, and should be fetched first. A page is *lost* if no backend has it any more: requests
 * that need it fail with -EIO, until it arrives after all. Wanted and lost bits end with the process: a successor asks
 * again.
 *
 * A missing bit is cleared after the bytes are there, under the stripe's lock; missing->lock protects the waits; it is
 * taken within the stripe's lock, and go takes its locks within missing->lock.
 */
#ifndef COWSHED_OVERLAY_MISSING_H
#define COWSHED_OVERLAY_MISSING_H

#include "accounting/core/overlay/overlay.h"

/* cdef-begin */
/* Makes nr pages from first private, past the quota too, and missing. The overlay must not be in use yet. -EEXIST: one
 * of them is private already. */
int overlay_expect(struct overlay *overlay, uint64_t first, uint64_t nr);
/* Stores the bytes of those of nr pages from first that are missing; others stay as they are. Returns how many were
 * missing, or -errno: then some are still missing. */
int64_t overlay_arrive(struct overlay *overlay, uint64_t first, uint64_t nr, const uint8_t *bytes);
/* Copies the missing pages: (nr_pages + 63) / 64 words; returns how many. */
int64_t overlay_missing(struct overlay *overlay, uint64_t *words_out, uint64_t nr_words);
/* Takes the missing pages that became wanted since the last call; returns how many. */
int64_t overlay_take_wanted(struct overlay *overlay, uint64_t *words_out, uint64_t nr_words);
/* A borrowed eventfd, raised when a page becomes wanted or the last missing page is missing no more; -ENOENT: no page
 * was ever missing. */
int overlay_missing_fd(const struct overlay *overlay);
/* Marks the missing ones of nr pages from first as lost; returns how many were not lost before. */
int64_t overlay_lose(struct overlay *overlay, uint64_t first, uint64_t nr);
/* Counts the missing pages that are lost; O(pages). */
int64_t overlay_nr_lost(struct overlay *overlay);
/* Marks no page as lost any more: a backend may have them after all. */
void overlay_find(struct overlay *overlay);
/* Returns once all that was written is as durable as it gets. */
int overlay_flush_now(struct overlay *overlay);
/* cdef-end */

/* Waits until no page of a range is missing (0), one of them is lost (-EIO), or the owner's waits are cancelled
 * (-ESHUTDOWN); go is called once, under missing->lock. */
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

/* 0: no page of the range is missing; -EIO: one is lost; -EINPROGRESS: the caller has to wait. */
int overlay_look_missing(struct overlay *overlay, uint64_t first, uint64_t nr);
/* The same, and marks missing pages as wanted; -EINPROGRESS: go will be called. The caller must set first, end, owner
 * and go. */
int overlay_await(struct overlay *overlay, struct overlay_wait *wait);
/* Ends the waits of an owner, with -ESHUTDOWN. */
void overlay_cancel_waits(struct overlay *overlay, const void *owner);
/* Under the stripe's lock: clears the missing bits of pages of one group, which have bytes or are not private any
 * more. */
void overlay_come(struct overlay *overlay, uint64_t first, uint64_t nr);

/* Sets up overlay->missing if the account has missing pages. */
int overlay_missing_init(struct overlay *overlay);
void overlay_missing_deinit(struct overlay *overlay);

#endif
