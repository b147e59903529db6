/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Open regions: parts of an image that the kernel maps for a guest by itself, without a fault.
 *
 * A region is OPEN_PAGES pages of the image, from a multiple of them on. Opening it is a write window as large as the
 * region: all its extents are lent, so that none is evicted; its pages are charged, "reserved" until a copy of them is
 * seen; and it is registered for missing faults only. The kernel then maps its frames on a touch, with one page-table
 * entry if they are collapsed (collapse.h), and copies a page on a write.
 *
 * Opening:  lend | charge | UNREGISTER, then REGISTER MISSING (the kernel cannot take a mode away) | check that all of
 *           the range is still ours.
 * Closing:  REGISTER MISSING|MINOR|WP, a superset | write-protect | look: what is the guest's own stays charged, the
 *           rest is given back | end the loan. Nothing is written without a fault once it is protected.
 *
 * Between UNREGISTER and REGISTER, for microseconds, no event tells of a change that the guest makes. Discards do no
 * harm: pages count as unsettled from then on. If a part of the range is not there afterwards, it may have been moved,
 * and be unguarded at its new place: the region is closed, and its frames stay lent until the guest ends ("lost").
 *
 * A mapping that its guest cannot write costs no charge. Opening needs exact private bits, so none is opened while
 * private pages are tracked (track.h) or frozen; these close all regions first.
 */
#ifndef COWSHED_OPEN_REGIONS_H
#define COWSHED_OPEN_REGIONS_H

#include "accounting/core/ledger.h"

/* cdef-begin */
/* An open region that borders on no other takes two of the guest's mappings, of which the kernel allows 65530. */
#define OPEN_REGIONS_MAX 16384

/* Opens a region whose frames are collapsed; 0 if it is open. -ESTALE: not all of it is resident, or not collapsed;
 * -ENOSPC: more than max_pinned extents would be pinned, or the account has OPEN_REGIONS_MAX open; -EDQUOT: the quota
 * has not nr_spare pages more than it needs; -EBUSY: pages of it are preloaded, poisoned or unmapped, or the account is
 * tracked, frozen or broken; -ENXIO: the guest has not mapped all of it in one piece; -EOPNOTSUPP: its memory is
 * populated; -ENOENT: the guest changed the mapping meanwhile, and it is closed again; -ENOMEM: the guest may have no
 * more mappings (vm.max_map_count); -EAGAIN: another region's opening is not over; other errors: of userfaultfd,
 * likewise. Cost: 10 us. */
int account_open_region(struct account *account, uint64_t region_no, uint64_t nr_spare, uint64_t max_pinned);
/* Closes a region; 1 if it was open. -EAGAIN: an event is unread, it stays open, try again; other errors: of
 * PAGEMAP_SCAN, likewise. If the guest has taken a part of it out of our guard, the region is lost. Cost: 15 us, and
 * 0.3 us for each private page. */
int account_close_region(struct account *account, uint64_t region_no, int reason);
/* Closes the open ones of nr regions from first; returns how many, or -EAGAIN after a second of trying. */
int64_t account_close_regions(struct account *account, uint64_t first, uint64_t nr, int reason);
/* Copies the bitmap of open regions: (nr_regions + 63) / 64 words. */
int account_open_bitmap(const struct account *account, uint64_t *words_out, uint64_t nr_words);
/* The same of reserved pages: (nr_pages + 63) / 64 words. */
int account_reserved_bitmap(const struct account *account, uint64_t *words_out, uint64_t nr_words);
/* Closes regions with reserved pages until the quota has room for a page, or none is left. */
int account_shrink(struct account *account);
/* Whether the guest does not write its mapping. Closes all regions; -EAGAIN as account_close_regions. */
int account_set_read_only(struct account *account, int on);
/* For an adopted account whose faults are answered: checks the region that our predecessor was opening when it ended.
 * As account_open_region. */
int account_finish_opening(struct account *account);
/* Takes the numbers of up to nr_max regions that the fault thread found worth opening; returns how many. */
int64_t account_take_wanted(struct account *account, uint32_t *regions_out, uint64_t nr_max);
/* cdef-end */

/* Under write_lock, for each: */
int account_close_all(struct account *account, int reason);
/* Closes regions with reserved pages until the quota has room for a page; returns how many pages came back. -EAGAIN:
 * none did, and an event is unread, without which a region cannot be closed. */
int64_t account_close_for_quota(struct account *account);
/* Settles [first, first + nr), which lies in one open region. */
int account_settle_open(struct account *account, uint64_t first, uint64_t nr);
/* A discard of a charged page in an open region: it may be written again without a fault, so it is reserved anew. */
void account_reserve_again(struct account *account, uint64_t page);
/* A fault in an open region, whose thread must be woken afterwards. -EAGAIN: an event is unread, ask again. */
int account_fault_in_open(struct account *account, uint64_t page, bool missing);

/* For an adopted account, and for one that closes. */
void account_lend_again(struct account *account);
void account_end_loans(struct account *account);

/* A fault that the fault thread answers, in the page's region. Tells the service when it is worth opening. */
void account_note_fault(struct account *account, uint64_t page);

#endif
