/* SPDX-License-Identifier: Apache-2.0 */
#include "accounting/core/presence.h"

#include "accounting/core/region_guard.h"
#include "accounting/core/settle.h"

#include <errno.h>

/*
 * Under write_lock. UFFDIO_WRITEPROTECT fails with ENOENT where no userfaultfd guards the page, but does not report
 * which one does: the guest may have mapped the image anew at the address. So the probe only protects. A shared page is
 * protected anyway, and the next write fault opens a private one again.
 */
static bool is_present(struct account *account, uint64_t page)
{
	int err;

	if (account->dirty || account_is_frozen(account)) /* protection marks clean or frozen pages now: do not probe */
		return true;
	if (account_is_open(account, page))
		return account_is_bare(account, page);
	err = account_protect(account, page, 1, true);
	return err != -ENOENT && err != -ESRCH;
}

int account_find_present(struct account *account, uint64_t nr_max, uint64_t *page_io)
{
	uint64_t nr_pages = account->image->shape.nr_pages;
	uint64_t page = *page_io;
	struct account_span span;

	for (; account_span(account, page, nr_pages, &span); page++) {
		bool found = false;

		page = span.page;
		if (bits_test(account->unmapped, page))
			continue;
		if (nr_max-- == 0) {
			*page_io = page;
			return -EAGAIN;
		}
		pthread_mutex_lock(&account->write_lock);
		found = is_present(account, page);
		pthread_mutex_unlock(&account->write_lock);
		if (found) {
			*page_io = page;
			return 1;
		}
	}
	*page_io = nr_pages;
	return 0;
}
