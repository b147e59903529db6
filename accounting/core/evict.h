/* SPDX-License-Identifier: Apache-2.0 */
/* Eviction: victims lose their frames, in every guest at once, and all grants on them are revoked. */
#ifndef COWSHED_EVICT_H
#define COWSHED_EVICT_H

#include "accounting/core/ledger.h"

/* cdef-begin */
/* Evicts those of nr extents that are resident, unpinned and idle; moves them to the front of the array; returns how
 * many. reason: enum evict_reason, selects the counter and whether the bytes go to the standby list. Cost: a punch for
 * each run of neighbours, which walks every guest's mapping of it; for the standby list, also a copy of each extent. */
int64_t evict_extents(struct image *image, uint32_t *extents, uint64_t nr, int reason);
/* cdef-end */

#endif
