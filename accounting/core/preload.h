/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Private pages that a guest arrives with.
 *
 * A guest that was drained from another backend, and maps its image here, has private pages already, in an overlay's
 * memfd. They are *preloaded*: charged at once, and copied into its memory when it touches them, or in its fault
 * thread's idle time. Until then such a page is private and in no page table, and the image's page is never mapped in
 * its place. Bits are set before the fault thread starts, and only cleared after: when our copy is in the guest's
 * memory, or when the guest discarded the page.
 *
 * A successor of a killed process finds the bits in the ledger. A page that was copied and still has its bit is not
 * copied again: the kernel reports that it is there.
 */
#ifndef COWSHED_PRELOAD_H
#define COWSHED_PRELOAD_H

#include "accounting/core/ledger.h"

/* cdef-begin */
/* Makes private, past the quota too, the pages in words ((nr_pages + 63) / 64) that the account's regions have and that
 * are not private yet; source_fd has their bytes at their offsets in the image. The account must have been placed, and
 * have no fault thread yet. Duplicates the descriptor. Returns how many pages, or -errno; -EINVAL: source_fd is too
 * short; -EBUSY: it has preloaded pages already. */
int64_t account_preload(struct account *account, int source_fd, const uint64_t *words, uint64_t nr_words);
/* Gives an adopted account the source of its remaining preloaded pages (account_status.preloaded_pages). Without a
 * source, touching one is SIGBUS. */
int account_adopt_preloaded(struct account *account, int source_fd);
/* Returns a new descriptor of the preload file, or -errno; -ENOENT: the guest's memory has all pages. Takes write_lock:
 * the fault thread may close the account's own descriptor at any time. */
int account_copy_preload_fd(struct account *account);
/* cdef-end */

/* Under write_lock: notes that preloaded pages are in the guest's memory. */
void account_preload_installed(struct account *account, uint64_t first, uint64_t nr);
/* Closes the source. */
void account_drop_preloaded(struct account *account);

#endif
