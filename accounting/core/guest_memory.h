/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Reads private pages out of the memory of a guest that maps, through its /proc/PID/mem, for a handoff.
 *
 * The guest may run meanwhile. A page that it discards before it is read cannot be read, and a region that it moves is
 * not where it was: such pages come as zeros, are reported, and must be read again.
 */
#ifndef COWSHED_GUEST_MEMORY_H
#define COWSHED_GUEST_MEMORY_H

#include "accounting/core/ledger.h"

/* cdef-begin */
/* Copies the pages of nr_runs runs (page_runs.h), one after another. unread has one byte for each page, and gets 1 for
 * each that must be read again. is_frozen: the guest can discard nothing, so an unreadable page is an error. Returns
 * the number of such pages; -ESRCH: the memory is gone; -ENXIO: a page is in no region; another -errno: it cannot be
 * read. */
int64_t account_load(const struct account *account, int mem_fd, const uint8_t *runs, uint64_t nr_runs, int is_frozen,
                     uint8_t *to, uint8_t *unread);
/* cdef-end */

#endif
