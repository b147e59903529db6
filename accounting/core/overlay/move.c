/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "accounting/core/overlay/move.h"

#include "accounting/core/overlay/files.h"
#include "accounting/core/overlay/missing.h"
#include "accounting/core/page_runs.h"
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

int overlay_load_runs(struct overlay *overlay, const uint8_t *runs, uint64_t nr_runs, uint8_t *to)
{
	int err = 0;

	for (uint64_t no = 0; no < nr_runs && !err; no++) {
		struct page_run run = page_run_at(runs, no);

		err = overlay_load(overlay, run.first, run.nr, to);
		to += (uint64_t)run.nr << PAGE_SHIFT;
	}
	return err;
}

int overlay_store(struct overlay *overlay, uint64_t first, uint64_t nr, const uint8_t *bytes)
{
	int err = check_range(overlay, first, nr);
	uint64_t reserved = nr;

	if (err)
		return err;
	/* Pays for all pages, and gives back what was not needed: which pages are private may change meanwhile. */
	overlay_take_anyway(overlay, nr);
	err = overlay_write(overlay, first << PAGE_SHIFT, nr << PAGE_SHIFT, bytes, &reserved);
	overlay_give(overlay, reserved);
	return err;
}

int overlay_store_runs(struct overlay *overlay, const uint8_t *runs, uint64_t nr_runs, const uint8_t *bytes)
{
	int64_t nr_pages = page_runs_check(runs, nr_runs, overlay->image->shape.nr_pages);
	int err = 0;

	if (nr_pages < 0)
		return (int)nr_pages;
	uint64_t reserved = (uint64_t)nr_pages;
	overlay_take_anyway(overlay, reserved); /* as in overlay_store */
	for (uint64_t no = 0; no < nr_runs && !err; no++) {
		struct page_run run = page_run_at(runs, no);
		uint64_t length = (uint64_t)run.nr << PAGE_SHIFT;

		err = overlay_write(overlay, run.first << PAGE_SHIFT, length, bytes, &reserved);
		bytes += length;
	}
	overlay_give(overlay, reserved);
	return err;
}

int overlay_drop(struct overlay *overlay, uint64_t first, uint64_t nr)
{
	int err = check_range(overlay, first, nr);

	return err ? err : overlay_trim(overlay, first, nr);
}
