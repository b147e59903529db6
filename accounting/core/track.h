/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tracking a guest's writes to its private pages, and freezing them.
 *
 * While tracked, private pages are write-protected; a write to one is a fault, which marks the page dirty and opens it,
 * and costs no second charge. Taking the dirty pages protects them again, and returns each that was written since,
 * became private, or is private no more. A caller that reads pages only *after* taking them misses no write:
 *
 *   A page's bit is cleared, then the page is protected, then the call returns, all under write_lock; pages are opened
 *   only under write_lock. A write lands either before the protection, and is in the bytes that are read after the
 *   call; or it faults, and the fault thread marks the page before it opens it. If the page were read before it is
 *   protected, or the bit cleared after a fault had set it, a write in between would be lost.
 *
 * Consequence: every page that the guest can write without a fault is dirty (ledger.h, 5). So a freeze has to protect
 * only the dirty pages.
 *
 * A protected private page that is swapped out looks like the marker of a page that is gone; see settle.c.
 */
#ifndef COWSHED_TRACK_H
#define COWSHED_TRACK_H

#include "accounting/core/ledger.h"

/* cdef-begin */
/* Begins to track the private pages, all of them dirty at first; or ends that and opens them all, -errno if that fails
 * (they are then opened as they are written). Nothing to do is no error. -EOPNOTSUPP: the memory is populated (no page
 * of it can be protected). */
int account_track(struct account *account, int on);
/* Takes the dirty pages, (nr_pages + 63) / 64 words, and protects them; returns how many. -errno leaves all of them
 * dirty; -EINVAL: they are not tracked. Cost: 0.05 us for each, with write_lock held for a batch at a time. */
int64_t account_take_dirty(struct account *account, uint64_t *words_out, uint64_t nr_words);
/* From its return until the thaw, no private page is written. Called by guest_freeze, while the fault thread is paused
 * and so holds back discards. -EAGAIN: an event of its userfaultfd is unread; nothing has changed. */
int account_freeze(struct account *account);
/* Ends the freeze: writes are answered again, once they fault again. */
void account_thaw(struct account *account);
/* cdef-end */

#endif
