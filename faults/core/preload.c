/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Preloaded pages: private pages that a guest arrived with (accounting/core/preload.h), copied into its memory.
 *
 * A fault on one is answered by UFFDIO_COPY from the source, with those that follow it; the rest is copied in the
 * thread's idle time, once from the first page to the last. That begins a while after the guest arrived: guests of a
 * drain arrive together, and those that wait to be attached need the CPU more. While private pages are tracked, copies
 * are installed write-protected, so that later writes are seen.
 */
#include "faults/core/preload.h"

#include "accounting/core/preload.h"
#include "cache/core/abi.h"
#include "cache/core/points.h"
#include "faults/core/answer.h"
#include "faults/core/guest.h"
#include "faults/core/uffd.h"

#include <errno.h>

#define PRELOAD_AT_ONCE 16 /* for a fault */
#define PRELOAD_PUSHED 64  /* between two looks at the faults */
#define PRELOAD_AFTER_NS 50000000u

/* Under write_lock: copies the run of preloaded pages that begins with page, nr_max at most. *nr_out is how many are
 * there now. */
static int copy_run(struct guest *guest, uint64_t page, uint64_t nr_max, uint64_t *nr_out)
{
	struct account *account = guest->account;
	uint64_t nr_pages = account->image->shape.nr_pages;
	uint64_t end = nr_max < nr_pages - page ? page + nr_max : nr_pages;
	struct account_span span;
	uint64_t done = 0;

	*nr_out = 0;
	if (!account->preloaded_bytes)
		return -EFAULT;
	if (!account_span(account, page, bits_next_clear(account->preloaded, page, end), &span) || span.page != page)
		return -ENOENT;
	bool protect = account->dirty || account_is_frozen(account);
	int err = uffd_copy(guest->uffd, span.address, account->preloaded_bytes + (page << PAGE_SHIFT),
	                    span.nr_pages << PAGE_SHIFT, protect, &done);
	*nr_out = done >> PAGE_SHIFT;
	count_add(COUNTER(account->header, mapped_pages), *nr_out);
	account_preload_installed(account, page, *nr_out);
	return err;
}

bool answer_preloaded(struct guest *guest, uint64_t page, uint64_t read_ns)
{
	struct account *account = guest->account;
	uint64_t nr = 0;
	int err = 0;

	if (!atomic_load_explicit(&account->header->preloaded_pages, memory_order_acquire) ||
	    !bits_test(account->preloaded, page))
		return false;
	pthread_mutex_lock(&account->write_lock);
	bool preloaded = bits_test(account->preloaded, page);
	if (preloaded)
		err = copy_run(guest, page, PRELOAD_AT_ONCE, &nr);
	if (nr)
		err = 0;
	if (err == -EFAULT) { /* its bytes cannot be read */
		err = answer_poison(guest, page);
		count_access(account->header, false, FAULT_FAILED);
	}
	pthread_mutex_unlock(&account->write_lock);
	answer_failed(guest, err);
	if (nr) {
		count_access(account->header, false, FAULT_HIT);
		account_note_latency(account, LATENCY_HIT, clock_now_ns() - read_ns);
	}
	return preloaded;
}

/* Whether the guest arrived a while ago; if not, has the thread wake then. */
static bool is_settled_in(struct guest *guest)
{
	uint64_t now = clock_now_ns();

	if (!guest->preload_at_ns)
		guest->preload_at_ns = now + PRELOAD_AFTER_NS;
	if (now >= guest->preload_at_ns)
		return true;
	guest->idle_at_ns = guest->preload_at_ns;
	return false;
}

bool preload_push(struct guest *guest)
{
	struct account *account = guest->account;
	uint64_t nr_pages = account->image->shape.nr_pages, nr = 0;

	if (!atomic_load_explicit(&account->header->preloaded_pages, memory_order_relaxed) ||
	    guest->preload_page >= nr_pages || !is_settled_in(guest) || point_reach(POINT_PRELOAD_PUSH) < 0)
		return false;
	pthread_mutex_lock(&account->write_lock);
	guest->preload_page = bits_next(account->preloaded, guest->preload_page, nr_pages);
	int err = guest->preload_page < nr_pages ? copy_run(guest, guest->preload_page, PRELOAD_PUSHED, &nr) : 0;
	pthread_mutex_unlock(&account->write_lock);
	if (err == -EAGAIN && !nr) { /* its memory is changing: an event must be read first */
		guest->idle_at_ns = clock_now_ns() + 1000000;
		return false;
	}
	/* Skip a page that cannot be copied now: its fault handles that. */
	guest->preload_page += err && !nr ? 1 : nr;
	return true;
}
