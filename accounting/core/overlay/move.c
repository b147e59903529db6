/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "accounting/core/overlay/move.h"

#include "accounting/core/overlay/files.h"
#include "accounting/core/overlay/missing.h"
#include "cache/core/abi.h"

#include <errno.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static int check_range(const struct overlay *overlay, uint64_t first, uint64_t nr)
{
	uint64_t nr_pages = overlay->image->shape.nr_pages;

	return first > nr_pages || nr > nr_pages - first ? -EINVAL : 0;
}

int overlay_load(struct overlay *overlay, uint64_t first, uint64_t nr, uint8_t *to)
{
	int err = check_range(overlay, first, nr);

	for (uint64_t page = first; page < first + nr && !err; page++, to += PAGE_BYTES) {
		size_t got = 0;

		pthread_rwlock_rdlock(overlay_stripe(overlay, page));
		if (overlay_is_missing(overlay, page))
			err = -EIO;
		while (!err && got < PAGE_BYTES && bits_test(overlay->account->private, page)) {
			off_t at = (off_t)((page << PAGE_SHIFT) + got);
			ssize_t now = pread(overlay->data_fd, to + got, PAGE_BYTES - got, at);

			if (now < 0 && errno != EINTR)
				err = -errno;
			if (now == 0 || err)
				break;
			got += now > 0 ? (size_t)now : 0;
		}
		pthread_rwlock_unlock(overlay_stripe(overlay, page));
		memset(to + got, 0, PAGE_BYTES - got);
	}
	return err;
}

int overlay_store(struct overlay *overlay, uint64_t first, uint64_t nr, const uint8_t *bytes)
{
	int err = check_range(overlay, first, nr);
	uint64_t offset = first << PAGE_SHIFT, reserved;

	if (err)
		return err;
	/* Pays for all pages, and gives back what was not needed: which pages are private may change meanwhile. */
	reserved = nr;
	overlay_take_anyway(overlay, nr);
	err = overlay_write(overlay, offset, nr << PAGE_SHIFT, bytes, &reserved);
	overlay_give(overlay, reserved);
	return err;
}

int overlay_drop(struct overlay *overlay, uint64_t first, uint64_t nr)
{
	int err = check_range(overlay, first, nr);

	return err ? err : overlay_trim(overlay, first, nr);
}
