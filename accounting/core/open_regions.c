/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "accounting/core/open_regions.h"

#include "accounting/core/region_guard.h"
#include "accounting/core/settle.h"
#include "cache/core/abi.h"
#include "cache/core/loader.h"
#include "cache/core/points.h"

#include <errno.h>
#include <time.h>

#define WORDS (OPEN_PAGES / 64)
#define PATIENCE_MS 1000
#define QUOTA_SHORT_NS 10000000000u /* no region is opened for so long after one was closed for the quota */

static uint64_t first_page_of(uint64_t region_no)
{
	return region_no * OPEN_PAGES;
}

static int check_openable(const struct account *account, uint64_t region_no, struct account_span *span_out)
{
	const struct ledger_header *header = account->header;
	uint64_t first = first_page_of(region_no), end = first + OPEN_PAGES;

	if (end > header->nr_pages)
		return -ERANGE;
	if (account->populated || account->pagemap_fd < 0)
		return -EOPNOTSUPP;
	if (account->quota_short_ns && loader_now_ns() - account->quota_short_ns < QUOTA_SHORT_NS)
		return -EDQUOT;
	if (account->dirty || atomic_load(&header->protected) || account_is_frozen(account) ||
	    atomic_load(&header->broken) || bits_test(account->lost, region_no))
		return -EBUSY;
	if (bits_next(account->preloaded, first, end) < end || bits_next(account->poisoned, first, end) < end ||
	    bits_next(account->unmapped, first, end) < end)
		return -EBUSY;
	if (!account_span(account, first, end, span_out) || span_out->page != first || span_out->nr_pages != OPEN_PAGES)
		return -ENXIO;
	return 0;
}

/* Charges the pages of the region that are not private yet. Those that are may be discarded while nothing is reported:
 * they count as unsettled. */
static int reserve(struct account *account, uint64_t region_no, uint64_t nr_spare)
{
	uint64_t first = first_page_of(region_no), nr_new = 0;
	uint64_t nr_wanted = OPEN_PAGES - bits_count(account->private, first, first + OPEN_PAGES);

	if (!account_is_read_only(account) && nr_wanted &&
	    (!quota_has_room(account->quota, nr_wanted + nr_spare) ||
	     quota_take(account->quota, nr_wanted, nr_wanted) < nr_wanted))
		return -EDQUOT;
	bits_set(account->opened, region_no);
	for (uint64_t i = first / 64; i < first / 64 + WORDS; i++) {
		uint64_t private = atomic_load(&account->private[i]);

		if (!account_is_read_only(account)) {
			atomic_store(&account->reserved[i], ~private);
			atomic_store(&account->private[i], ~(uint64_t)0);
			nr_new += (uint64_t)__builtin_popcountll(~private);
		}
		atomic_store(&account->unsettled[i], atomic_load(&account->private[i]));
	}
	atomic_fetch_add(&account->nr_reserved, nr_new);
	count_add(&account->header->private_pages, nr_new);
	atomic_fetch_add(&account->nr_open, 1);
	return 0;
}

static void grant_all(struct account *account, uint64_t region_no)
{
	uint64_t extent_pages = account->image->shape.extent_pages;
	uint64_t first = first_page_of(region_no);

	for (uint64_t e = first / extent_pages; e * extent_pages < first + OPEN_PAGES; e++)
		account_grant(account, e);
}

/* The region is no longer open for the kernel; reserved pages that stay charged are charged for a copy. */
static void forget_open(struct account *account, uint64_t region_no, bool keep_loan, int reason)
{
	if (keep_loan && bits_set(account->lost, region_no))
		atomic_fetch_add(&account->nr_lost, 1);
	if (bits_clear(account->opened, region_no))
		atomic_fetch_sub(&account->nr_open, 1);
	if (!keep_loan)
		region_end_loan(account->image, region_no);
	count_add(&account->image->past->closes[reason], 1);
}

/* Gives back what is reserved and not the guest's own, and charges what is its own. own: a bit for each page. */
static void account_for_word(struct account *account, uint64_t word_no, uint64_t own)
{
	uint64_t reserved = atomic_exchange(&account->reserved[word_no], 0);
	uint64_t private = atomic_load(&account->private[word_no]);
	uint64_t returned = reserved & ~own, copied = reserved & own;
	uint64_t nr_returned = (uint64_t)__builtin_popcountll(returned);

	atomic_fetch_and(&account->private[word_no], ~returned);
	atomic_fetch_and(&account->unsettled[word_no], ~returned);
	atomic_fetch_sub(&account->header->private_pages, nr_returned);
	atomic_fetch_sub(&account->nr_reserved, (uint64_t)__builtin_popcountll(reserved));
	quota_give(account->quota, nr_returned);
	count_add(COUNTER(account->header, charged_pages), (uint64_t)__builtin_popcountll(copied));
	atomic_fetch_and(&account->unsettled[word_no], ~(own & ~atomic_load(&account->discarded[word_no])));
	for (uint64_t rest = private & ~reserved & ~own; rest; rest &= rest - 1) {
		account_uncharge(account, word_no * 64 + (uint64_t)__builtin_ctzll(rest));
		count_add(COUNTER(account->header, uncharged_pages), 1);
	}
	for (uint64_t rest = own & ~private; rest; rest &= rest - 1) { /* a mapping that was not to be written */
		quota_take_anyway(account->quota, 1);
		account_charge(account, word_no * 64 + (uint64_t)__builtin_ctzll(rest));
		bits_clear(account->unsettled, word_no * 64 + (uint64_t)__builtin_ctzll(rest));
	}
}

/* Private pages are protected only while they are tracked. If this fails, they are opened as they are written. */
static void open_own(struct account *account, uint64_t first, const uint64_t *own)
{
	for (uint64_t at = 0; (at = bits_next((const bits_word *)own, at, OPEN_PAGES)) < OPEN_PAGES;) {
		uint64_t end = bits_next_clear((const bits_word *)own, at, OPEN_PAGES);

		account_protect(account, first + at, end - at, false);
		at = end;
	}
}

/* Adds the pages that are the guest's own; a copy in swap is seen as such only before it is protected. */
static int look_for_own(struct account *account, uint64_t first, uint64_t *own)
{
	uint8_t looks[OPEN_PAGES];
	int err = account_look_closely(account, first, OPEN_PAGES, looks);

	for (uint64_t i = 0; i < OPEN_PAGES && !err; i++)
		if (looks[i] == PAGE_LOOK_PRIVATE)
			own[i / 64] |= (uint64_t)1 << (i % 64);
	return err;
}

/* Guards a piece of the region. Pages that are not the image's any more count as unmapped, and *lost_io as true: where
 * the image's are, nobody knows. -ESRCH: the guest is gone. */
static int guard_piece(struct account *account, const struct account_span *piece, bool *lost_io)
{
	if (guard_register(account->uffd, piece, GUARD_ALL) == 0)
		return 0;
	if (account_look_at_life(account) < 0)
		return -ESRCH;
	for (uint64_t i = 0; i < piece->nr_pages; i++) {
		struct account_span page = {piece->page + i, 1, piece->address + (i << PAGE_SHIFT)};

		if (guard_register(account->uffd, &page, GUARD_ALL) == 0)
			continue;
		bits_set(account->unmapped, page.page);
		*lost_io = true;
	}
	return 0;
}

/* Guards and protects the region, and finds what is the guest's own. -ESRCH: the guest is gone, nothing is its own. */
static int close_for_kernel(struct account *account, uint64_t first, uint64_t *own, bool *lost_io)
{
	struct account_span piece;
	uint64_t end = first + OPEN_PAGES;
	int err = 0;

	for (uint64_t page = first; !err && guard_next_piece(account, page, end, &piece);
	     page = piece.page + piece.nr_pages)
		err = guard_piece(account, &piece, lost_io);
	point_reach(POINT_CLOSE_GUARDED);
	if (!err)
		err = look_for_own(account, first, own);
	for (uint64_t page = first; !err && guard_next_piece(account, page, end, &piece);
	     page = piece.page + piece.nr_pages)
		err = account_protect(account, piece.page, piece.nr_pages, true);
	point_reach(POINT_CLOSE_PROTECTED);
	if (!err)
		err = look_for_own(account, first, own);
	if (err && err != -EAGAIN && account_look_at_life(account) == -ESRCH)
		err = -ESRCH;
	return err;
}

static int close_locked(struct account *account, uint64_t region_no, bool keep_loan, int reason)
{
	uint64_t first = first_page_of(region_no), own[WORDS] = {0};

	if (!bits_test(account->opened, region_no))
		return 0;
	/* What was never checked may have been moved away. */
	keep_loan |= atomic_load(&account->header->opening) == region_no + 1;
	int err = close_for_kernel(account, first, own, &keep_loan);
	if (err && err != -ESRCH)
		return err;
	keep_loan &= !err;
	for (uint64_t i = 0; i < WORDS; i++)
		account_for_word(account, first / 64 + i, own[i]);
	open_own(account, first, own);
	forget_open(account, region_no, keep_loan, reason);
	return 1;
}

/*
 * After an opening: -ENOENT: a part of the range is gone, perhaps to another address; it is closed, and stays lent.
 * -EAGAIN: an event is unread, and nothing is known; it stays "opening" until it is checked again.
 */
static int check_opened(struct account *account, uint64_t region_no, const struct account_span *span, int err)
{
	if (!err)
		err = guard_check_all(account, span);
	if (err && err != -EAGAIN && close_locked(account, region_no, true, CLOSE_GUEST) == -EAGAIN)
		err = -EAGAIN;
	if (err != -EAGAIN)
		atomic_store(&account->header->opening, 0);
	return err;
}

/* Under write_lock: the region is reserved. If we die before it is checked, our successor does that. */
static int open_for_kernel(struct account *account, uint64_t region_no, const struct account_span *span)
{
	point_reach(POINT_OPEN_CHARGED);
	atomic_store(&account->header->opening, (uint32_t)region_no + 1);
	int err = guard_unregister(account->uffd, span);

	if (err && guard_is_whole(account->uffd, span)) { /* the guest may have no more mappings: nothing was done */
		atomic_store(&account->header->opening, 0);
		close_locked(account, region_no, false, CLOSE_GUEST);
		return err;
	}
	point_reach(POINT_OPEN_BARE);
	if (!err)
		err = guard_register(account->uffd, span, GUARD_MISSING);
	point_reach(POINT_OPEN_DONE);
	return check_opened(account, region_no, span, err);
}

/* Under write_lock. */
static int finish_opening(struct account *account)
{
	uint32_t opening = atomic_load(&account->header->opening);
	struct account_span span;
	int err = 0;

	if (!opening)
		return 0;
	uint64_t first = first_page_of(opening - 1);
	if (!bits_test(account->opened, opening - 1)) { /* closed since, or not opened yet when its backend died */
		atomic_store(&account->header->opening, 0);
		return 0;
	}
	if (!account_span(account, first, first + OPEN_PAGES, &span) || span.nr_pages != OPEN_PAGES)
		err = -ENOENT;
	else
		err = guard_register(account->uffd, &span, GUARD_MISSING);
	return check_opened(account, opening - 1, &span, err);
}

int account_finish_opening(struct account *account)
{
	int err, patience = PATIENCE_MS;

	for (;;) {
		pthread_mutex_lock(&account->write_lock);
		err = finish_opening(account);
		pthread_mutex_unlock(&account->write_lock);
		if (err != -EAGAIN || patience-- <= 0)
			return err;
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	}
}

static int open_locked(struct account *account, uint64_t region_no, uint64_t nr_spare, uint64_t max_pinned)
{
	struct account_span span;

	if (bits_test(account->opened, region_no))
		return 0;
	if (atomic_load(&account->header->opening))
		return -EAGAIN;
	if (atomic_load(&account->nr_open) >= OPEN_REGIONS_MAX)
		return -ENOSPC;
	int err = check_openable(account, region_no, &span);
	if (!err)
		err = region_lend(account->image, region_no, max_pinned);
	if (err)
		return err;
	err = image_is_collapsed(account->image, region_no) ? reserve(account, region_no, nr_spare) : -ESTALE;
	if (err) {
		region_end_loan(account->image, region_no);
		return err;
	}
	grant_all(account, region_no);
	count_add(&account->image->past->opens, 1);
	return open_for_kernel(account, region_no, &span);
}

int account_open_region(struct account *account, uint64_t region_no, uint64_t nr_spare, uint64_t max_pinned)
{
	if (region_no >= image_nr_regions(account->image))
		return -ERANGE;
	pthread_mutex_lock(&account->write_lock);
	int err = open_locked(account, region_no, nr_spare, max_pinned);
	bool is_ours = atomic_load(&account->header->opening) == region_no + 1;
	pthread_mutex_unlock(&account->write_lock);
	if (err != -EAGAIN)
		return err;
	/* The fault thread must read an event before it can be checked, or another one, which must be closed or open
	 * before this one's turn comes. */
	err = account_finish_opening(account);
	return is_ours ? err : -EAGAIN;
}

int account_close_region(struct account *account, uint64_t region_no, int reason)
{
	if (region_no >= image_nr_regions(account->image) || reason < 0 || reason >= CLOSE_NR)
		return -ERANGE;
	pthread_mutex_lock(&account->write_lock);
	int err = close_locked(account, region_no, false, reason);
	pthread_mutex_unlock(&account->write_lock);
	return err;
}

int64_t account_close_regions(struct account *account, uint64_t first, uint64_t nr, int reason)
{
	uint64_t nr_regions = image_nr_regions(account->image);
	int patience = PATIENCE_MS;
	int64_t nr_closed = 0;

	if (first > nr_regions || nr > nr_regions - first || reason < 0 || reason >= CLOSE_NR)
		return -ERANGE;
	for (uint64_t no = first; (no = bits_next(account->opened, no, first + nr)) < first + nr;) {
		int closed = account_close_region(account, no, reason);

		if (closed == -EAGAIN) { /* an event is unread: the fault thread must read it */
			if (patience-- <= 0)
				return -EAGAIN;
			nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
			continue;
		}
		nr_closed += closed == 1;
		no++;
	}
	return nr_closed;
}

int account_close_all(struct account *account, int reason)
{
	uint64_t nr_regions = image_nr_regions(account->image);

	if (!atomic_load(&account->nr_open))
		return 0;
	for (uint64_t no = 0; (no = bits_next(account->opened, no, nr_regions)) < nr_regions; no++)
		if (close_locked(account, no, false, reason) == -EAGAIN)
			return -EAGAIN;
	return 0;
}

/* What is mapped there is the guest's own memory: it is not ours to answer for. */
static void release_page(struct account *account, uint64_t page)
{
	struct account_span piece = {page, 1, account_address(account, page)};

	if (guard_unregister(account->uffd, &piece) < 0)
		return;
	bits_set(account->unmapped, page);
	if (bits_test(account->private, page))
		account_uncharge(account, page);
}

/*
 * A missing fault where the frame is there comes from memory that the guest has put into the image's place in the
 * instant when nothing told of it. A hole in an open region would be our defect: the region is closed, so that the page
 * is loaded and never read as zeros.
 */
static int answer_missing(struct account *account, uint64_t page)
{
	uint64_t extent = page / account->image->shape.extent_pages;
	int err = guard_map_page(account->uffd, account_address(account, page));

	if (err == -EFAULT && extent_state(&account->image->states[extent]) != EXTENT_RESIDENT)
		return close_locked(account, page / OPEN_PAGES, false, CLOSE_GUEST);
	if (err == -EINVAL || err == -EFAULT)
		release_page(account, page);
	return err;
}

/* Most of these faults were read before the region was opened. If it is registered for all faults, a death left it half
 * closed, or its guest did that. */
int account_fault_in_open(struct account *account, uint64_t page, bool missing)
{
	int err = 0;

	pthread_mutex_lock(&account->write_lock);
	if (account_is_open(account, page) && !account_is_bare(account, page))
		err = close_locked(account, page / OPEN_PAGES, false, CLOSE_GUEST);
	else if (account_is_open(account, page) && missing)
		err = answer_missing(account, page);
	pthread_mutex_unlock(&account->write_lock);
	return err == -EAGAIN ? err : 0;
}

int64_t account_close_for_quota(struct account *account)
{
	uint64_t nr_regions = image_nr_regions(account->image);
	uint64_t before = atomic_load(&account->header->private_pages);
	int64_t none = 0;

	for (uint64_t i = 0; i < nr_regions && atomic_load(&account->nr_reserved) && !quota_has_room(account->quota, 1);
	     i++) {
		uint64_t no = account->close_at++ % nr_regions;

		if (bits_next(account->reserved, first_page_of(no), first_page_of(no) + OPEN_PAGES) <
		    first_page_of(no) + OPEN_PAGES)
			none = close_locked(account, no, false, CLOSE_QUOTA) == -EAGAIN ? -EAGAIN : none;
	}
	uint64_t after = atomic_load(&account->header->private_pages);
	if (before <= after)
		return none;
	account->quota_short_ns = loader_now_ns();
	return (int64_t)(before - after);
}

void account_reserve_again(struct account *account, uint64_t page)
{
	if (bits_set(account->reserved, page))
		atomic_fetch_add(&account->nr_reserved, 1);
	bits_set(account->unsettled, page);
}

int account_settle_open(struct account *account, uint64_t first, uint64_t nr)
{
	uint8_t looks[OPEN_PAGES];
	int err = account_look_closely(account, first, nr, looks);

	for (uint64_t i = 0; i < nr && !err; i++) {
		uint64_t page = first + i;

		if (!bits_test(account->unsettled, page))
			continue;
		if (looks[i] != PAGE_LOOK_PRIVATE) {
			if (!bits_test(account->reserved, page)) /* discarded, and it may be written again */
				count_add(COUNTER(account->header, uncharged_pages), 1);
			account_reserve_again(account, page);
			continue;
		}
		if (bits_clear(account->reserved, page)) {
			atomic_fetch_sub(&account->nr_reserved, 1);
			count_add(COUNTER(account->header, charged_pages), 1);
		}
		if (!bits_test(account->discarded, page))
			bits_clear(account->unsettled, page);
	}
	return err;
}

int account_shrink(struct account *account)
{
	pthread_mutex_lock(&account->write_lock);
	account_close_for_quota(account);
	pthread_mutex_unlock(&account->write_lock);
	return 0;
}

int account_open_bitmap(const struct account *account, uint64_t *words_out, uint64_t nr_words)
{
	if (nr_words != bits_bytes(image_nr_regions(account->image)) / sizeof(bits_word))
		return -ERANGE;
	for (uint64_t i = 0; i < nr_words; i++)
		words_out[i] = account->opened[i];
	return 0;
}

int account_reserved_bitmap(const struct account *account, uint64_t *words_out, uint64_t nr_words)
{
	if (nr_words != bits_bytes(account->image->shape.nr_pages) / sizeof(bits_word))
		return -ERANGE;
	for (uint64_t i = 0; i < nr_words; i++)
		words_out[i] = account->reserved[i];
	return 0;
}

int account_set_read_only(struct account *account, int on)
{
	int err, patience = PATIENCE_MS;

	for (;;) {
		pthread_mutex_lock(&account->write_lock);
		err = account_close_all(account, CLOSE_GUEST);
		if (!err && on)
			bits_set(account->flags, LEDGER_READ_ONLY);
		else if (!err)
			bits_clear(account->flags, LEDGER_READ_ONLY);
		pthread_mutex_unlock(&account->write_lock);
		if (err != -EAGAIN || patience-- <= 0)
			return err;
		nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	}
}

/* Evictions wait until accounts are adopted, so all of these extents that are resident stay so. */
void account_lend_again(struct account *account)
{
	uint64_t nr_regions = image_nr_regions(account->image);

	for (uint64_t no = 0; no < nr_regions; no++) {
		bool open = bits_test(account->opened, no), lost = bits_test(account->lost, no);

		if (open || lost)
			region_lend_anyway(account->image, no);
		if (open && lost) /* it was being closed */
			bits_clear(account->opened, no);
		atomic_fetch_add(&account->nr_open, open && !lost);
		atomic_fetch_add(&account->nr_lost, lost);
	}
}

void account_end_loans(struct account *account)
{
	uint64_t nr_regions = image_nr_regions(account->image);

	if (!atomic_load(&account->nr_open) && !atomic_load(&account->nr_lost))
		return;
	for (uint64_t no = 0; no < nr_regions; no++)
		if (bits_test(account->opened, no) || bits_test(account->lost, no)) {
			region_end_loan(account->image, no);
			if (bits_clear(account->opened, no))
				count_add(&account->image->past->closes[CLOSE_GUEST], 1);
			bits_clear(account->lost, no);
		}
}
