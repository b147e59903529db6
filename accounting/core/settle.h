/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Settling: reconciles charges with the page tables.
 *
 * A page is charged before it is un-protected, because the guest's write then causes no fault; whether and when the
 * kernel makes the copy is not reported. So a charged page is "unsettled" until PAGEMAP_SCAN shows the copy. Settling a
 * range leaves each charged page of it in one of two states: copied, and charged; or shared and write-protected, and
 * not charged.
 */
#ifndef COWSHED_SETTLE_H
#define COWSHED_SETTLE_H

#include "accounting/core/ledger.h"

/* cdef-begin */
/* Settles every unsettled page of the guest; returns how many charges were given back, or -errno of PAGEMAP_SCAN (the
 * charges stand). Cost: 0.02 us for each page between the first and the last unsettled one. */
int64_t account_settle(struct account *account);

/* For memory that a guest inherited over fork: charges private pages, past the quota too; protects and grants shared
 * ones. Returns how many pages were charged, or -errno of an ioctl. The fault thread must be running. */
int64_t account_adopt_private(struct account *account);

/* Reads how nr pages from first are mapped: a byte each, PAGE_LOOK_ABSENT .. PAGE_LOOK_PRIVATE. A preloaded page
 * (preload.h) that is not in the guest's memory yet is private too. */
enum page_look { PAGE_LOOK_ABSENT, PAGE_LOOK_SHARED, PAGE_LOOK_OPEN, PAGE_LOOK_PRIVATE };
int account_look(struct account *account, uint64_t first, uint64_t nr, uint8_t *looks_out);
/* cdef-end */

/* As account_look, but a preloaded page that is not in memory is absent; and while private pages may be protected, the
 * marker of a page that is gone may be LOOK_DOUBTFUL. */
int account_look_closely(struct account *account, uint64_t first, uint64_t nr, uint8_t *looks_out);
/* 0, or -ESRCH if the guest's memory is gone. */
int account_look_at_life(const struct account *account);
/* Write-protects the pages that the guest has mapped, or removes the protection; 0 or -errno. */
int account_protect(struct account *account, uint64_t first, uint64_t nr, bool on);
/* Under write_lock: as account_settle, for [first, first + nr). */
int64_t account_settle_range(struct account *account, uint64_t first, uint64_t nr);
/* Under write_lock, at the quota: gives back charges that never became copies, or those of open regions; returns how
 * many. -EAGAIN: none, and an event is unread, without which that cannot be known. */
int64_t account_give_back(struct account *account);
/* With no write_lock held: settles the accounts of the account's quota, except those whose write_lock is taken; returns
 * how many charges were given back. -EAGAIN: none, and some could not be looked at. So it is if it ran less than 20 ms
 * ago, and does nothing: the writer of a fresh charge may not have run yet, and threads at the quota would take the
 * last pages from each other for ever. */
int64_t account_settle_quota(struct account *account);
/* Under write_lock: whether a charged page is the guest's own, or open to become so; gives the charge back if not. */
bool account_page_is_private(struct account *account, uint64_t page);

#endif
