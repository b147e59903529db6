/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Private pages that a guest brings with it.
 *
 * A guest that was handed over by another backend, and maps its image here, has private pages already: in an overlay's
 * memfd.  They are *preloaded*: charged at once, and copied into its memory when it touches them, or in its
 * fault thread's idle time.  Until then such a page is private, in no page table, and nothing of the image is ever
 * mapped in its place.  Bits are set before the fault thread starts, and only ever cleared after: once
 * the page is there (the guest can have it so only by our copy) or was given back by the guest.
 *
 * A successor of a killed process finds the bits in the ledger.  A page that was copied and still has its bit is not
 * copied again: the kernel says that it is there.
 */
#ifndef COWSHED_PRELOAD_H
#define COWSHED_PRELOAD_H

#include "accounting/core/ledger.h"

/* cdef-begin */
/* The pages of words ((nr_pages + 63) / 64) that the account's regions have, and that are not private yet, are private
 * from now on, past the quota too; their bytes are in source_fd at their place in the image.  The account has been
 * placed, and has no fault thread yet.  Takes its own copy of the descriptor.  How many pages, or -errno;
 * -EINVAL: source_fd is too short; -EBUSY: it has preloaded pages already. */
int64_t account_preload(struct account *account, int source_fd, const uint64_t *words, uint64_t nr_words);
/* For an adopted account that has preloaded pages left (account_status.preloaded_pages): where they are. Preloaded
 * pages without a source are SIGBUS for their guest. */
int account_adopt_preloaded(struct account *account, int source_fd);
/* A new descriptor of the preload file, or -errno; -ENOENT: the guest's memory has all pages.  Takes write_lock: the
 * account's own descriptor is closed by the fault thread at any time. */
int account_copy_preload_fd(struct account *account);
/* cdef-end */

/* Under write_lock: preloaded pages are in the guest's memory. */
void account_preload_installed(struct account *account, uint64_t first, uint64_t nr);
/* Gives up the source. */
void account_drop_preloaded(struct account *account);

#endif
