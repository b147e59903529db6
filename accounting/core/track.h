/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Following what a guest writes to its private pages, and stopping that.
 *
 * While they are followed, private pages are write-protected; a write to one is a fault, which marks the page dirty and
 * opens it, and costs no second charge. Taking the dirty pages protects them again, and hands out each that
 * was written since, became private, or is private no more.  So who reads the pages *after* they were taken has, with
 * those taken later, everything:
 *
 *   A page's bit is cleared, then the page is protected, then the call returns, and all under write_lock, under
 *   which alone pages are opened.  A write lands either before the protection, and is in the bytes that are read after
 *   the call; or it faults, and the fault thread marks the page before it opens it. Were the page read before it is
 *   protected, or the bit cleared after a fault had set it, a write in between would be lost.
 *
 * What follows from it for the rest: every page that the guest can write without a fault is dirty (ledger.h, 5).  So a
 * freeze has only the dirty pages to protect.
 *
 * A protected private page that is swapped out looks like the marker of a page that is gone; see settle.c.
 */
#ifndef COWSHED_TRACK_H
#define COWSHED_TRACK_H

#include "accounting/core/ledger.h"

/* cdef-begin */
/* Begins to follow the private pages, all of which are dirty at first; or ends that and opens them all, -errno if that
 * can't be done (they are opened as they are written, then).  Nothing to do is no error.  -EOPNOTSUPP: the memory is
 * populated (no page of it can be protected). */
int account_track(struct account *account, int on);
/* Takes the dirty pages, (nr_pages + 63) / 64 words, and protects them; how many. -errno leaves all of them dirty;
 * -EINVAL: they are not followed. Cost: 0.05 us for each, with write_lock held for a batch at a time. */
int64_t account_take_dirty(struct account *account, uint64_t *words_out, uint64_t nr_words);
/* From its return until thaw nothing is written to a private page. For a guest whose fault thread holds discards back
 * (guest_freeze): called by it.  -EAGAIN: an event of its userfaultfd is unread; nothing has changed. */
int account_freeze(struct account *account);
/* Writes are answered again, as they are asked anew. */
void account_thaw(struct account *account);
/* cdef-end */

#endif
