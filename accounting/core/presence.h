/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Asks the kernel whether a guest has any of its mapping left: no event reports that it unregistered a part.
 */
#ifndef COWSHED_PRESENCE_H
#define COWSHED_PRESENCE_H

#include "accounting/core/ledger.h"

/* cdef-begin */
/* Looks, from *page_io on, for a page that a userfaultfd still guards; the guest's next write there faults. 1: *page_io
 * is one; 0: there is none; -EAGAIN: not among the nr_max looked at, go on from *page_io. Cost: about 1 us a page, and
 * the first page is usually there. */
int account_find_present(struct account *account, uint64_t nr_max, uint64_t *page_io);
/* cdef-end */

#endif
