/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "accounting/core/settle.h"

#include "accounting/core/open_regions.h"
#include "cache/core/abi.h"
#include "cache/core/points.h"

#include <errno.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define SCANNED_MAX 64
#define SETTLE_QUOTA_EVERY_NS 20000000u
#define LOOK_DOUBTFUL 0xff /* a copy in swap, or no page; only within this file */

/*
 * PAGE_IS_WRITTEN means "not write-protected by userfaultfd". A swap-like entry that is write-protected is the marker
 * the kernel leaves where a protected page was punched away; one that is not is a copy in swap, or the marker of a
 * poisoned page, which the ledger knows. Once private pages may be protected (track.h), a protected entry may also be a
 * copy in swap. Only removing the protection distinguishes the two: it removes a marker.
 */
static uint8_t page_look(const struct account *account, uint64_t page, uint64_t categories)
{
	bool written = categories & PAGE_IS_WRITTEN;

	if (bits_test(account->unmapped, page))
		return PAGE_LOOK_ABSENT;
	if (categories & PAGE_IS_PRESENT) {
		if (!(categories & PAGE_IS_FILE))
			return PAGE_LOOK_PRIVATE;
		return written ? PAGE_LOOK_OPEN : PAGE_LOOK_SHARED;
	}
	if (!(categories & PAGE_IS_SWAPPED) || categories & PAGE_IS_FILE || bits_test(account->poisoned, page))
		return PAGE_LOOK_ABSENT;
	if (written)
		return PAGE_LOOK_PRIVATE;
	return atomic_load(&account->header->protected) && bits_test(account->private, page) ? LOOK_DOUBTFUL
	                                                                                     : PAGE_LOOK_ABSENT;
}

static int look_at_span(struct account *account, const struct account_span *span, uint8_t *looks_out)
{
	struct page_region scanned[SCANNED_MAX];
	struct pm_scan_arg scan = {
		.size = sizeof scan,
		.start = span->address,
		.end = span->address + (span->nr_pages << PAGE_SHIFT),
		.vec = (uint64_t)(uintptr_t)scanned,
		.vec_len = SCANNED_MAX,
		.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
		.return_mask = PAGE_IS_WRITTEN | PAGE_IS_FILE | PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
	};

	while (scan.start < scan.end) {
		int nr_scanned = ioctl(account->pagemap_fd, PAGEMAP_SCAN, &scan);

		if (nr_scanned < 0)
			return -errno;
		for (int i = 0; i < nr_scanned; i++)
			for (uint64_t at = scanned[i].start; at < scanned[i].end; at += PAGE_BYTES) {
				uint64_t no = (at - span->address) >> PAGE_SHIFT;

				looks_out[no] = page_look(account, span->page + no, scanned[i].categories);
			}
		if (scan.walk_end <= scan.start)
			break;
		scan.start = scan.walk_end;
	}
	return 0;
}

/*
 * PAGEMAP_SCAN reports no pages, and no error, for a process that has ended (Linux 6.18.44). A read then returns no
 * bytes, at any offset.
 */
int account_look_at_life(const struct account *account)
{
	uint64_t entry;
	ssize_t got = pread(account->pagemap_fd, &entry, sizeof entry, 0);

	return got > 0 ? 0 : got < 0 ? -errno : -ESRCH;
}

int account_look_closely(struct account *account, uint64_t first, uint64_t nr, uint8_t *looks_out)
{
	struct account_span span;
	uint64_t end = first + nr;
	int err = 0;

	if (first > account->image->shape.nr_pages || nr > account->image->shape.nr_pages - first)
		return -ERANGE;
	memset(looks_out, PAGE_LOOK_ABSENT, nr);
	for (uint64_t page = first; !err && account_span(account, page, end, &span); page = span.page + span.nr_pages)
		err = look_at_span(account, &span, looks_out + (span.page - first));
	return err ? err : account_look_at_life(account);
}

/* A doubtful page that was settled is a copy: the event of a discard would have been read. */
int account_look(struct account *account, uint64_t first, uint64_t nr, uint8_t *looks_out)
{
	int err = account_look_closely(account, first, nr, looks_out);

	for (uint64_t i = 0; i < nr && !err; i++) {
		if (looks_out[i] == LOOK_DOUBTFUL)
			looks_out[i] = bits_test(account->unsettled, first + i) ? PAGE_LOOK_ABSENT : PAGE_LOOK_PRIVATE;
		else if (looks_out[i] == PAGE_LOOK_ABSENT && bits_test(account->preloaded, first + i))
			looks_out[i] = PAGE_LOOK_PRIVATE;
	}
	return err;
}

int account_protect(struct account *account, uint64_t first, uint64_t nr, bool on)
{
	struct account_span span;
	uint64_t end = first + nr;
	int err = 0;

	if (!on)
		account_mark_dirty(account, first, nr);
	for (; !err && account_span(account, first, end, &span); first = span.page + span.nr_pages) {
		struct uffdio_writeprotect order = {
			.range = {.start = span.address, .len = span.nr_pages << PAGE_SHIFT},
			.mode = on ? UFFDIO_WRITEPROTECT_MODE_WP : UFFDIO_WRITEPROTECT_MODE_DONTWAKE,
		};

		err = ioctl(account->uffd, UFFDIO_WRITEPROTECT, &order) < 0 ? -errno : 0;
	}
	return err;
}

static void settle_page(struct account *account, uint64_t page, uint8_t look, int64_t *nr_returned)
{
	if (look == PAGE_LOOK_PRIVATE) {
		if (!bits_test(account->discarded, page))
			bits_clear(account->unsettled, page);
	} else if (look != PAGE_LOOK_OPEN) {
		account_uncharge(account, page);
		count_add(COUNTER(account->header, uncharged_pages), 1);
		++*nr_returned;
	}
}

/* Under write_lock, and not frozen.  The page may be written meanwhile, and counts as dirty. */
static int look_in_doubt(struct account *account, uint64_t page, uint8_t *look_out)
{
	int err = account_protect(account, page, 1, false);

	if (!err)
		err = account_look_closely(account, page, 1, look_out);
	return err ? err : account_protect(account, page, 1, true);
}

/*
 * An open page (un-protected, not written yet) is protected again and then looked at once more: between the first look
 * and the protection its guest may have made the copy after all. Such a copy is un-protected again at once: private
 * pages are protected only while they are tracked (track.h).
 */
static int64_t settle_batch(struct account *account, uint64_t first, uint64_t nr)
{
	uint8_t looks[OPEN_PAGES];
	int64_t nr_returned = 0;
	int err = account_look_closely(account, first, nr, looks);

	for (uint64_t i = 0; i < nr && !err; i++)
		if (looks[i] == LOOK_DOUBTFUL && bits_test(account->unsettled, first + i))
			err = look_in_doubt(account, first + i, &looks[i]);
	for (uint64_t i = 0; i < nr && !err; i++) {
		uint64_t run = 0;

		while (i + run < nr && looks[i + run] == PAGE_LOOK_OPEN &&
		       bits_test(account->unsettled, first + i + run))
			run++;
		if (!run)
			continue;
		err = account_protect(account, first + i, run, true);
		point_reach(POINT_SETTLE_PROTECTED);
		if (!err)
			err = account_look_closely(account, first + i, run, looks + i);
		for (uint64_t j = i; j < i + run && !err; j++)
			if (looks[j] == PAGE_LOOK_PRIVATE)
				err = account_protect(account, first + j, 1, false);
		i += run - 1;
	}
	if (err)
		return err;
	for (uint64_t i = 0; i < nr; i++)
		if (bits_test(account->unsettled, first + i))
			settle_page(account, first + i, looks[i], &nr_returned);
	return nr_returned;
}

int64_t account_settle_range(struct account *account, uint64_t first, uint64_t nr)
{
	uint64_t end = first + nr;
	int64_t nr_returned = 0;

	/* A frozen account was settled when it froze. */
	if (account->pagemap_fd < 0 || account_is_frozen(account))
		return 0;
	for (uint64_t page = first; (page = bits_next(account->unsettled, page, end)) < end;) {
		uint64_t region_end = (page / OPEN_PAGES + 1) * OPEN_PAGES;
		uint64_t batch = (end < region_end ? end : region_end) - page;
		int64_t nr_here = account_is_open(account, page) ? account_settle_open(account, page, batch)
		                                                 : settle_batch(account, page, batch);

		if (nr_here < 0)
			return nr_here;
		nr_returned += nr_here;
		page += batch;
	}
	return nr_returned;
}

int64_t account_settle(struct account *account)
{
	pthread_mutex_lock(&account->write_lock);
	int64_t nr = account_settle_range(account, 0, account->image->shape.nr_pages);
	pthread_mutex_unlock(&account->write_lock);
	return nr;
}

int64_t account_give_back(struct account *account)
{
	int64_t settled = account_settle_range(account, 0, account->image->shape.nr_pages);
	int64_t closed = settled > 0 ? 0 : account_close_for_quota(account);

	if (settled > 0 || closed > 0)
		return settled > 0 ? settled : closed;
	return settled == -EAGAIN || closed == -EAGAIN ? -EAGAIN : 0;
}

/* Whether the last run is long enough ago; if so, the caller must settle. */
static bool quota_begin_settle(struct quota *quota)
{
	struct timespec now;
	uint64_t before_ns = atomic_load(&quota->settled_at_ns);

	clock_gettime(CLOCK_MONOTONIC, &now);
	uint64_t now_ns = (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
	return now_ns - before_ns >= SETTLE_QUOTA_EVERY_NS &&
	       atomic_compare_exchange_strong(&quota->settled_at_ns, &before_ns, now_ns);
}

int64_t account_settle_quota(struct account *account)
{
	struct image *image = account->image;
	int64_t nr = 0, none = 0;

	if (!quota_begin_settle(account->quota))
		return -EAGAIN;
	pthread_rwlock_rdlock(&image->accounts_lock);
	for (struct account *other = image->accounts; other; other = other->next) {
		if (other->quota != account->quota)
			continue;
		if (pthread_mutex_trylock(&other->write_lock)) {
			none = -EAGAIN;
			continue;
		}
		int64_t nr_here = account_give_back(other);
		pthread_mutex_unlock(&other->write_lock);
		if (nr_here > 0)
			nr += nr_here;
		else if (nr_here == -EAGAIN)
			none = -EAGAIN;
	}
	pthread_rwlock_unlock(&image->accounts_lock);
	return nr ? nr : none;
}

bool account_page_is_private(struct account *account, uint64_t page)
{
	uint8_t seen = PAGE_LOOK_ABSENT;

	if (!bits_test(account->private, page))
		return false;
	if (account_is_open(account, page)) /* it may be written at any moment */
		return true;
	int err = account_look_closely(account, page, 1, &seen);
	if (!err && seen == LOOK_DOUBTFUL && !account_is_frozen(account))
		err = look_in_doubt(account, page, &seen);
	/* A doubtful page stays charged; so does an open one, because a write may copy it at any moment, without a
	 * fault. */
	if (err || seen == PAGE_LOOK_PRIVATE || seen == PAGE_LOOK_OPEN || seen == LOOK_DOUBTFUL)
		return true;
	account_uncharge(account, page);
	count_add(COUNTER(account->header, uncharged_pages), 1);
	return false;
}
