/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Write faults.
 *
 * Charge first, open afterwards, and open exactly what was charged: a write to an un-protected page causes no further
 * fault. The kernel makes the copy when the guest's write is tried again. At the quota, charges that never became
 * copies are given back; if there are none, the writer stays blocked (stop) or gets SIGBUS (kill).
 */
#define _GNU_SOURCE
#include "faults/core/write.h"

#include "accounting/core/open_regions.h"
#include "accounting/core/settle.h"
#include "cache/core/abi.h"
#include "cache/core/points.h"
#include "cache/core/store.h"
#include "faults/core/answer.h"
#include "faults/core/guest.h"
#include "faults/core/uffd.h"

#include <errno.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

int64_t account_take_pages(struct account *account, uint64_t nr_wanted)
{
	uint64_t nr = quota_take(account->quota, 1, nr_wanted);
	int64_t back = 0;

	while (nr == 0 && (back = account_give_back(account)) > 0)
		nr = quota_take(account->quota, 1, nr_wanted);
	return nr ? (int64_t)nr : back ? back : -EDQUOT;
}

int quota_settle_others(struct account *account)
{
	if (atomic_load(&account->quota->nr_accounts) <= 1)
		return -EDQUOT;
	int64_t back = account_settle_quota(account);

	return back > 0 ? 0 : back ? -EAGAIN : -EDQUOT;
}

static void quota_stop(struct guest *guest)
{
	if (atomic_load(&guest->account->header->stopped_since_ns))
		return;
	account_begin_stop(guest->account);
	store_raise_at(POINT_WAKE_SERVICE, guest->image->store->notice_fd);
}

/*
 * A page that is mapped, shared and protected cannot be poisoned for one guest alone, so SIGBUS goes to the process
 * as a signal.  If it cannot be sent, or is blocked, the writer just stays stopped: the quota holds either way.
 */
void quota_refuse(struct guest *guest)
{
	count_add(COUNTER(guest->account->header, write_refused), 1);
	if (quota_policy_of(guest->account->quota) == QUOTA_KILL && guest->pidfd >= 0)
		syscall(SYS_pidfd_send_signal, guest->pidfd, SIGBUS, NULL, 0);
	quota_stop(guest);
}

/* Under write_lock: charges the pages of [first, first + nr) that are not private yet; the caller has taken them from
 * the quota. */
static void charge_range(struct account *account, uint64_t first, uint64_t nr)
{
	point_reach(POINT_WRITE_TAKEN);
	for (uint64_t page = first; (page = bits_next_clear(account->private, page, first + nr)) < first + nr; page++)
		account_charge(account, page);
}

static int open_pages(struct account *account, int uffd, uint64_t page, uint64_t nr)
{
	point_reach(POINT_WRITE_CHARGED);
	account_mark_dirty(account, page, nr);
	return uffd_open(uffd, account_address(account, page), nr << PAGE_SHIFT);
}

/* Cuts a window down to the region of page. */
static void clip_to_region(const struct account *account, uint64_t page, uint64_t *first, uint64_t *nr)
{
	struct account_region region;
	uint64_t end = *first + *nr;

	if (!account_region_of(account, page, &region))
		return;
	*first = *first > region.first_page ? *first : region.first_page;
	end = end < region.first_page + region.nr_pages ? end : region.first_page + region.nr_pages;
	*nr = end - *first;
}

static void write_window(struct guest *guest, uint64_t page, uint64_t *first_out, uint64_t *nr_out)
{
	struct window_shape shape = {
		.nr_pages = guest->image->shape.nr_pages,
		.fixed_pages = atomic_load_explicit(&guest->write_window_pages, memory_order_relaxed),
	};

	window_plan_write(&guest->windows, &shape, (const uint64_t *)guest->account->private, page, first_out, nr_out);
	clip_to_region(guest->account, page, first_out, nr_out);
}

/* Cuts a window down to the granted extents round page: unmapped pages cannot be opened. */
static void clip_to_granted(const struct guest *guest, uint64_t page, uint64_t *first, uint64_t *nr)
{
	uint64_t extent_pages = guest->image->shape.extent_pages;
	uint64_t low = page / extent_pages, high = low + 1;
	uint64_t end = *first + *nr;

	while (low * extent_pages > *first && bits_test(guest->account->granted, low - 1))
		low--;
	while (high * extent_pages < end && bits_test(guest->account->granted, high))
		high++;
	*first = *first > low * extent_pages ? *first : low * extent_pages;
	end = end < high * extent_pages ? end : high * extent_pages;
	*nr = end - *first;
}

/* Cuts a window down to the closed regions round page: the kernel answers writes in open ones. */
static void clip_to_closed(const struct account *account, uint64_t page, uint64_t *first, uint64_t *nr)
{
	uint64_t region_first = page / OPEN_PAGES * OPEN_PAGES, end = *first + *nr;

	if (*first < region_first && account_is_open(account, region_first - 1))
		*first = region_first;
	if (end > region_first + OPEN_PAGES && account_is_open(account, region_first + OPEN_PAGES))
		end = region_first + OPEN_PAGES;
	*nr = end - *first;
}

/*
 * Under write_lock. A charged page that still faults was charged by an earlier report of the same fault, or with a
 * window when it was not mapped yet, or was protected by settling: only it and the charged pages behind it have to be
 * opened.
 */
static int answer_write_locked(struct guest *guest, uint64_t page)
{
	struct account *account = guest->account;
	uint64_t first = page, nr = 1;

	if (account_is_frozen(account)) /* the thaw wakes the fault */
		return -EBUSY;
	if (account_is_open(account, page)) /* opened since the fault was read */
		return answer_wake(guest, page, 1), 0;
	if (bits_test(account->private, page)) {
		nr = WINDOW_WRITE_MAX_PAGES;
		clip_to_region(account, page, &first, &nr);
		clip_to_closed(account, page, &first, &nr);
		nr = bits_next_clear(account->unsettled, page + 1, page + nr) - page;
	} else {
		write_window(guest, page, &first, &nr);
		clip_to_granted(guest, page, &first, &nr);
		clip_to_closed(account, page, &first, &nr);
		uint64_t nr_new = nr - bits_count(account->private, first, first + nr);

		if (!quota_take(account->quota, nr_new, nr_new)) { /* then what is left, from page on */
			int64_t taken =
				account_take_pages(account, bits_next(account->private, page, first + nr) - page);

			if (taken < 0)
				return (int)taken;
			first = page;
			nr = (uint64_t)taken;
		}
		charge_range(account, first, nr);
	}
	guest->windows.write_next_page = first + nr; /* where a run of writes faults next, if all of it is opened */
	int err = open_pages(account, guest->uffd, first, nr);
	if (err == -ENOENT && nr > 1) /* the guest unregistered a part of it: settling returns the other charges */
		err = open_pages(account, guest->uffd, page, 1);
	return err;
}

int answer_open(struct guest *guest, uint64_t page)
{
	struct account *account = guest->account;
	int err;

	do { /* twice at most: others are not settled again so soon */
		pthread_mutex_lock(&account->write_lock);
		err = answer_write_locked(guest, page);
		pthread_mutex_unlock(&account->write_lock);
	} while (err == -EDQUOT && (err = quota_settle_others(account)) == 0);
	if (err == -EDQUOT)
		quota_refuse(guest);
	answer_failed(guest, err);
	return err;
}

void answer_write(struct guest *guest, uint64_t page, uint64_t read_ns)
{
	struct account *account = guest->account;

	image_touch(guest->image, page / guest->image->shape.extent_pages);
	account_note_fault(account, page);
	if (answer_open(guest, page) == 0) {
		count_add(COUNTER(account->header, write_copied), 1);
		account_note_latency(account, LATENCY_WRITE, clock_now_ns() - read_ns);
	}
}

/* Under write_lock, after the page was taken from the quota: one UFFDIO_COPY from the frame, whose extent the caller
 * holds. */
static int copy_page(struct guest *guest, uint64_t page)
{
	char frame[PAGE_BYTES] __attribute__((aligned(64)));
	struct account *account = guest->account;

	if (pread(guest->image->frames_fd, frame, sizeof frame, (off_t)(page << PAGE_SHIFT)) != sizeof frame) {
		quota_give(account->quota, 1);
		return -EFAULT;
	}
	point_reach(POINT_WRITE_TAKEN);
	account_charge(account, page);
	int err = uffd_copy_page(guest->uffd, account_address(account, page), frame);
	if (err) {
		account_uncharge(account, page);
		count_add(COUNTER(account->header, uncharged_pages), 1);
	}
	return err;
}

/* Under write_lock. */
static int write_first_locked(struct guest *guest, uint64_t page)
{
	struct window_state before = guest->windows;
	uint64_t first, nr;

	write_window(guest, page, &first, &nr);
	/* While frozen, the page is mapped as for a read, and the write faults again. */
	if (bits_test(guest->account->private, page) || nr > 1 || account_is_frozen(guest->account) ||
	    account_is_open(guest->account, page)) {
		guest->windows = before; /* answer_open plans the same window again */
		return -ENOTSUP;
	}
	int64_t taken = account_take_pages(guest->account, 1);

	return taken < 0 ? (int)taken : copy_page(guest, page);
}

/* The page is not mapped yet, so it can be poisoned for this guest alone. */
static void refuse_first(struct guest *guest, uint64_t page)
{
	struct account *account = guest->account;
	int err = -EPERM;

	if (quota_policy_of(account->quota) == QUOTA_KILL) {
		pthread_mutex_lock(&account->write_lock);
		err = answer_poison(guest, page);
		pthread_mutex_unlock(&account->write_lock);
	}
	if (err < 0)
		quota_refuse(guest);
	else
		count_add(COUNTER(account->header, write_refused), 1);
}

/*
 * Copying a single page here saves a second fault. A run of writes is answered by mapping the window and opening the
 * run, so that one event serves all of it and the kernel does the copying.
 */
int write_first(struct guest *guest, uint64_t page)
{
	struct account *account = guest->account;
	int err;

	do {
		pthread_mutex_lock(&account->write_lock);
		err = write_first_locked(guest, page);
		pthread_mutex_unlock(&account->write_lock);
	} while (err == -EDQUOT && (err = quota_settle_others(account)) == 0);
	if (err == -EDQUOT)
		refuse_first(guest, page);
	return err;
}

void answer_discard(struct guest *guest, uint64_t first, uint64_t nr, bool unmapped)
{
	struct account *account = guest->account;
	struct ledger_header *header = account->header;
	uint64_t end = first + nr;

	pthread_mutex_lock(&account->write_lock);
	for (uint64_t page = first; page < end; page++) {
		bool reserved = bits_test(account->reserved, page);

		bits_set(account->discarded, page);
		if (unmapped)
			bits_set(account->unmapped, page);
		if (bits_test(account->private, page)) {
			if (!unmapped && account_is_open(account, page))
				account_reserve_again(account, page);
			else
				account_uncharge(account, page);
			count_add(COUNTER(header, discarded_pages), !reserved);
		}
		if (bits_clear(account->poisoned, page))
			atomic_fetch_sub(&guest->image->nr_poisoned, 1);
	}
	pthread_mutex_unlock(&account->write_lock);
	if (atomic_load(&header->stopped_since_ns))
		guest_resume(guest);
}
