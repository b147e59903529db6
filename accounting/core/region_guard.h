/* SPDX-License-Identifier: Apache-2.0 */
/* How a guest's userfaultfd guards a region: for all faults, or for missing ones alone. */
#ifndef COWSHED_REGION_GUARD_H
#define COWSHED_REGION_GUARD_H

#include "accounting/core/ledger.h"

enum guard_modes { GUARD_MISSING, GUARD_ALL };

/* The first piece of [first, end) that the guest has mapped, as far as we know; false if there is none. */
bool guard_next_piece(const struct account *account, uint64_t first, uint64_t end, struct account_span *piece_out);
/* Adds modes; only guard_unregister takes any away. It wakes the range, and removes write protection there. */
int guard_register(int uffd, const struct account_span *piece, int modes);
int guard_unregister(int uffd, const struct account_span *piece);
/* Where only missing faults are registered: maps a page from the frames; 0 if one is mapped. -EINVAL, -EFAULT: the
 * memory is not of the frames, or the page has none; -EAGAIN: an event is unread. */
int guard_map_page(int uffd, uint64_t address);
/*
 * Where only missing faults are registered: -ENOENT if a page of the range is missing, or other memory is in its place;
 * -EAGAIN: an event is unread. A guest may have cut the range up by mprotect, which does no harm; then each page is
 * mapped, which is possible only if it is of the frames.
 */
int guard_check_all(const struct account *account, const struct account_span *span);
/* Whether all of the range is one mapping that is registered for all faults; its pages, which are resident, are mapped
 * then. */
bool guard_is_whole(int uffd, const struct account_span *span);
/* Whether the page is registered for missing faults only. */
bool account_is_bare(const struct account *account, uint64_t page);

#endif
