/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Poisons the pages that are not in a guest's memory. This is the last step for a guest that may have no userfaultfd of
 * its own any more, before ours is closed: without it those pages would read as zeros.
 */
#include "accounting/core/open_regions.h"
#include "accounting/core/settle.h"
#include "cache/core/abi.h"
#include "faults/core/guest.h"
#include "faults/core/uffd.h"

#define BATCH_PAGES 512

/* Removes the markers of punched pages first; pages that are mapped meanwhile stay (EEXIST). */
static void poison_run(struct guest *guest, uint64_t page, uint64_t nr)
{
	uint64_t address = account_address(guest->account, page);

	if (account_protect(guest->account, page, nr, false) == 0 &&
	    uffd_poison_range(guest->uffd, address, nr << PAGE_SHIFT) < 0)
		for (uint64_t i = 0; i < nr; i++)
			uffd_poison_range(guest->uffd, address + (i << PAGE_SHIFT), PAGE_BYTES);
}

static int poison_batch(struct guest *guest, const struct account_span *span)
{
	uint8_t looks[BATCH_PAGES];
	int err = account_look(guest->account, span->page, span->nr_pages, looks);

	for (uint64_t i = 0, run; i < span->nr_pages && !err; i += run) {
		for (run = 1; i + run < span->nr_pages && looks[i + run] == looks[i]; run++)
			;
		if (looks[i] == PAGE_LOOK_ABSENT)
			poison_run(guest, span->page + i, run);
	}
	return err;
}

int guest_poison_absent(struct guest *guest)
{
	struct account *account = guest->account;
	uint64_t nr_pages = guest->image->shape.nr_pages;
	struct account_span span;
	int err = 0;

	account_close_regions(account, 0, image_nr_regions(guest->image), CLOSE_GUEST);
	for (uint64_t page = 0; !err && account_span(account, page, nr_pages, &span);
	     page = span.page + span.nr_pages) {
		span.nr_pages = span.nr_pages < BATCH_PAGES ? span.nr_pages : BATCH_PAGES;
		pthread_mutex_lock(&account->write_lock);
		err = poison_batch(guest, &span);
		pthread_mutex_unlock(&account->write_lock);
	}
	return err;
}
