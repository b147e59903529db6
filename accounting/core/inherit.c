/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A mapping inherited over fork().
 *
 * The child has its parent's page tables without the write protection: it has private pages, a write copies its shared
 * pages without a fault, and its account is empty. So shared pages are protected first, and looked at again; then
 * private pages are charged, and shared ones granted.
 */
#include "accounting/core/settle.h"

#include "cache/core/abi.h"
#include "cache/core/extent.h"

#include <errno.h>
#include <string.h>
#include <time.h>

#define BATCH_PAGES 512
#define PATIENCE_MS 1000

/* Under write_lock: the guest has the private page already, so it is charged past the quota too. */
static void charge_anyway(struct account *account, uint64_t page)
{
	if (bits_test(account->private, page))
		return;
	quota_take_anyway(account->quota, 1);
	account_charge(account, page);
	bits_clear(account->unsettled, page);
}

/* Grants the extent of a mapped page, unless it is being evicted: then the punch takes the page. */
static void grant_page(struct account *account, uint64_t page)
{
	uint64_t extent = page / account->image->shape.extent_pages;

	if (bits_test(account->granted, extent) || !extent_hold(&account->image->states[extent]))
		return;
	account_grant(account, extent);
	extent_release(&account->image->states[extent]);
}

/* Under write_lock. */
static int adopt_batch(struct account *account, uint64_t first, uint64_t nr)
{
	uint8_t looks[BATCH_PAGES];
	bool protected[BATCH_PAGES] = {false};
	int err = account_look(account, first, nr, looks);

	for (uint64_t i = 0, run; i < nr && !err; i += run) {
		for (run = 1; i + run < nr && looks[i + run] == looks[i]; run++)
			;
		if (looks[i] != PAGE_LOOK_OPEN)
			continue;
		err = account_protect(account, first + i, run, true);
		memset(protected + i, true, run);
	}
	if (!err)
		err = account_look(account, first, nr, looks);
	for (uint64_t i = 0; i < nr && !err; i++) {
		if (looks[i] == PAGE_LOOK_PRIVATE) {
			charge_anyway(account, first + i);
			/* Copied between the looks: private pages are protected only while they are tracked. */
			if (protected[i])
				err = account_protect(account, first + i, 1, false);
		} else if (looks[i] != PAGE_LOOK_ABSENT) {
			grant_page(account, first + i);
		}
	}
	return err;
}

int64_t account_adopt_private(struct account *account)
{
	uint64_t nr_pages = account->image->shape.nr_pages;
	uint64_t before = atomic_load(&account->header->private_pages);
	struct account_span span;
	int patience = PATIENCE_MS;

	for (uint64_t page = 0; account_span(account, page, nr_pages, &span);) {
		uint64_t nr = span.nr_pages < BATCH_PAGES ? span.nr_pages : BATCH_PAGES;

		pthread_mutex_lock(&account->write_lock);
		int err = adopt_batch(account, span.page, nr);
		pthread_mutex_unlock(&account->write_lock);
		if (err == -EAGAIN && patience-- > 0) { /* an event is unread: the fault thread must read it */
			nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
			continue;
		}
		if (err)
			return err;
		page = span.page + nr;
	}
	return (int64_t)(atomic_load(&account->header->private_pages) - before);
}
