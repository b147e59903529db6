/* SPDX-License-Identifier: Apache-2.0 */
/* Installs pages of populated guests: charges them first, and gives back the charges of those not installed. */
#define _GNU_SOURCE
#include "accounting/core/settle.h"
#include "cache/core/abi.h"
#include "cache/core/points.h"
#include "faults/core/guest.h"
#include "faults/core/populate/populate.h"
#include "faults/core/uffd.h"
#include "faults/core/write.h"

#include <unistd.h>

uint64_t populate_address(const struct populate_region *region, uint64_t page)
{
	return region->address + ((page - region->first_page) << PAGE_SHIFT);
}

bool populate_is_zero(const struct guest *guest, uint64_t page)
{
	return guest->populate->zero_discarded && bits_test(guest->account->discarded, page);
}

int frames_read(const struct image *image, uint64_t first, uint64_t nr, char *to)
{
	ssize_t length = (ssize_t)(nr << PAGE_SHIFT);
	int err = point_reach(POINT_FRAMES_READ);

	if (err)
		return err;
	return pread(image->frames_fd, to, (size_t)length, (off_t)(first << PAGE_SHIFT)) == length ? 0 : -EFAULT;
}

int populate_poison(struct guest *guest, const struct populate_region *region, uint64_t page)
{
	struct account *account = guest->account;
	uint64_t first = page - (page - region->first_page) % (region->page_bytes / PAGE_BYTES);
	uint64_t end = first + region->page_bytes / PAGE_BYTES;
	int err = uffd_poison_range(guest->uffd, populate_address(region, first), region->page_bytes);

	end = end < guest->image->shape.nr_pages ? end : guest->image->shape.nr_pages;
	for (page = first; page < end && !err; page++)
		if (bits_set(account->poisoned, page)) {
			atomic_fetch_add(&guest->image->nr_poisoned, 1);
			count_add(COUNTER(account->header, poisoned_pages), 1);
		}
	return err;
}

void populate_refuse(struct guest *guest, const struct populate_region *region, uint64_t page)
{
	struct account *account = guest->account;
	int err = -EPERM;

	guest->wanted_pages = region->page_bytes / PAGE_BYTES;
	if (quota_policy_of(account->quota) == QUOTA_KILL) {
		pthread_mutex_lock(&account->write_lock);
		err = populate_poison(guest, region, page);
		pthread_mutex_unlock(&account->write_lock);
	}
	if (err < 0)
		quota_refuse(guest);
	else
		count_add(COUNTER(account->header, write_refused), 1);
}

/* Under write_lock: as account_take_pages; of a huge page, all or none. */
static int64_t take_pages(struct account *account, const struct populate_region *region, uint64_t nr)
{
	int64_t nr_taken = account_take_pages(account, nr);

	if (region->page_bytes > PAGE_BYTES && nr_taken > 0 && (uint64_t)nr_taken < nr) {
		quota_give(account->quota, (uint64_t)nr_taken);
		return -EDQUOT;
	}
	return nr_taken;
}

int64_t populate_install(struct guest *guest, const struct populate_region *region, uint64_t first, uint64_t nr,
                         const char *from)
{
	struct account *account = guest->account;
	uint64_t done_bytes = 0;
	int64_t taken;
	int err;

	pthread_mutex_lock(&account->write_lock);
	while ((taken = take_pages(account, region, nr)) < 0) {
		pthread_mutex_unlock(&account->write_lock);
		err = taken == -EDQUOT ? quota_settle_others(account) : (int)taken;
		if (err)
			return err;
		pthread_mutex_lock(&account->write_lock);
	}
	uint64_t nr_charged = (uint64_t)taken;
	for (uint64_t i = 0; i < nr_charged; i++)
		account_charge(account, first + i);
	point_reach(POINT_WRITE_CHARGED);
	/* The last huge page of an image may reach past its end. */
	uint64_t length = (nr_charged << PAGE_SHIFT) + region->page_bytes - 1;
	length -= length % region->page_bytes;
	err = uffd_install(guest->uffd, populate_address(region, first), from, length, region->page_bytes, &done_bytes);
	uint64_t nr_done = done_bytes >> PAGE_SHIFT < nr_charged ? done_bytes >> PAGE_SHIFT : nr_charged;
	for (uint64_t i = nr_done; i < nr_charged; i++) {
		account_uncharge(account, first + i);
		count_add(COUNTER(account->header, uncharged_pages), 1);
	}
	for (uint64_t page = first; (page = bits_next(account->poisoned, page, first + nr_done)) < first + nr_done;
	     page++)
		if (bits_clear(account->poisoned, page)) {
			atomic_fetch_sub(&guest->image->nr_poisoned, 1);
			count_add(COUNTER(account->header, repaired_pages), 1);
		}
	pthread_mutex_unlock(&account->write_lock);
	count_add(COUNTER(account->header, mapped_pages), nr_done);
	return nr_done ? (int64_t)nr_done : err;
}

/* The report of the fault is old, or a late zap took the page. */
int populate_again(struct guest *guest, const struct populate_region *region, uint64_t first, const char *from)
{
	uint64_t done_bytes;

	return uffd_install(guest->uffd, populate_address(region, first), from, region->page_bytes, region->page_bytes,
	                    &done_bytes);
}
