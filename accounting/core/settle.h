/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Settling: what was charged against what the kernel did.
 *
 * A page is charged before it is un-protected, because afterwards nobody asks us again; whether and when the
 * guest's write then makes the copy is the kernel's business.  So a charged page is "unsettled" until
 * PAGEMAP_SCAN shows the copy.  Settling a range leaves each charged page of it in one of two states: copied,
 * and charged; or shared and write-protected, and not charged.
 */
#ifndef COWSHED_SETTLE_H
#define COWSHED_SETTLE_H

#include "accounting/core/ledger.h"

/* cdef-begin */
/* Settles every unsettled page of the guest; how many charges were given back, or -errno of PAGEMAP_SCAN (the
 * charges stand).  Cost: 0.02 us for each page between the first and the last unsettled one. */
int64_t account_settle(struct account *account);

/* For memory that its guest inherited over fork: charges what is private, past the quota too, protects and grants
 * what is shared.  How many pages were charged, or -errno of an ioctl.  The fault thread is running. */
int64_t account_adopt_private(struct account *account);

/* What the kernel says of nr pages from first: a byte each, PAGE_LOOK_ABSENT .. PAGE_LOOK_PRIVATE.  A preloaded page
 * (preload.h) that it has not got yet is private too. */
enum page_look { PAGE_LOOK_ABSENT, PAGE_LOOK_SHARED, PAGE_LOOK_OPEN, PAGE_LOOK_PRIVATE };
int account_look(struct account *account, uint64_t first, uint64_t nr, uint8_t *looks_out);
/* cdef-end */

/* Write-protects pages where the guest has them, or takes that off; -errno. */
int account_protect(struct account *account, uint64_t first, uint64_t nr, bool on);
/* Under write_lock: the same for unsettled pages in [first, first + nr). */
int64_t account_settle_range(struct account *account, uint64_t first, uint64_t nr);
/* With no write_lock held: settles the accounts of the account's quota, but those that are charged this moment; how
 * many charges were given back.  A charge was perhaps made only just, and its writer is on its way: so that those who
 * are at the quota together do not take the last pages from each other for ever, it does nothing if it did something
 * less than 20 ms ago. */
int64_t account_settle_quota(struct account *account);
/* Under write_lock: whether a charged page is the guest's own, or open to become so; gives the charge back if not. */
bool account_page_is_private(struct account *account, uint64_t page);

#endif
