/* SPDX-License-Identifier: Apache-2.0 */
#include "accounting/core/presence.h"

#include "accounting/core/settle.h"

#include <errno.h>

/*
 * Under write_lock.  The kernel answers ENOENT for what no userfaultfd guards, but does not say whose guards a page:
 * the guest may have mapped the image anew at the address.  So a page is only ever protected by the question.  What is
 * shared is protected anyway, and a private one is opened again by its next write.
 */
static bool is_present(struct account *account, uint64_t page)
{
	int err;

	if (account->dirty || account_is_frozen(account)) /* what was protected is to mean something: not now */
		return true;
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
