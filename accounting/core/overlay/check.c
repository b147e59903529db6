/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Checks an overlay against itself, for an audit, while its guest writes.
 *
 * The sums are read with every stripe's lock held for reading, and then the quota's: no page becomes private or shared
 * meanwhile, and none is taken or given back. Writes wait that long, microseconds for each GiB of the image; reads do
 * not. The map of stored bytes is read without locks, since that takes longer the more holes there are. Each page that
 * looks wrong then is looked at again under its stripe's lock.
 */
#define _GNU_SOURCE
#include "accounting/core/overlay/overlay.h"

#include "accounting/core/overlay/files.h"
#include "cache/core/abi.h"

#include <errno.h>
#include <string.h>
#include <sys/statvfs.h>
#include <unistd.h>

static void all_lock(struct overlay *overlay)
{
	for (int i = 0; i < OVERLAY_STRIPES; i++)
		pthread_rwlock_rdlock(&overlay->stripes[i]);
	pthread_mutex_lock(&overlay->quota_lock);
}

static void all_unlock(struct overlay *overlay)
{
	pthread_mutex_unlock(&overlay->quota_lock);
	for (int i = OVERLAY_STRIPES - 1; i >= 0; i--)
		pthread_rwlock_unlock(&overlay->stripes[i]);
}

void overlay_sums(struct overlay *overlay, struct overlay_sums *sums_out)
{
	struct account *account = overlay->account;
	struct quota_status quota;

	all_lock(overlay);
	quota_read(account->quota, &quota);
	*sums_out = (struct overlay_sums){
		.counted_pages = bits_count(account->private, 0, overlay->image->shape.nr_pages),
		.private_pages = atomic_load(&account->header->private_pages),
		.used_pages = quota.used_pages,
		.in_hand_pages = overlay->in_hand_pages,
	};
	all_unlock(overlay);
}

/* Under the stripe's lock: whether a page has bytes and should have none. */
static bool is_stray(const struct overlay *overlay, uint64_t page)
{
	off_t at = (off_t)(page << PAGE_SHIFT);

	return !bits_test(overlay->account->private, page) &&
	       !(overlay->disk && disk_is_dropped(overlay->disk, page)) && lseek(overlay->data_fd, at, SEEK_DATA) == at;
}

int overlay_strays(struct overlay *overlay, uint64_t *words_out, uint64_t nr_words)
{
	struct statvfs fs;

	if (fstatvfs(overlay->data_fd, &fs) < 0)
		return -errno;
	int err = overlay_stored(overlay, words_out, nr_words);
	if (!err && fs.f_bsize > PAGE_BYTES)
		memset(words_out, 0, nr_words * 8);
	for (uint64_t i = 0; i < nr_words && !err; i++) {
		uint64_t seen = words_out[i] & ~atomic_load(&overlay->account->private[i]);

		words_out[i] = 0;
		if (!seen)
			continue;
		pthread_rwlock_t *stripe = overlay_stripe(overlay, i * 64);
		pthread_rwlock_rdlock(stripe);
		for (uint64_t bit = 0; bit < 64; bit++)
			if (seen >> bit & 1 && is_stray(overlay, i * 64 + bit))
				words_out[i] |= (uint64_t)1 << bit;
		pthread_rwlock_unlock(stripe);
	}
	return err;
}
