/* SPDX-License-Identifier: Apache-2.0 */
/* An overlay's pages: made in memory, read, written, trimmed and discarded, under their stripes' locks and the quota.
 */
#define _GNU_SOURCE
#include "accounting/core/overlay/overlay.h"

#include "accounting/core/overlay/files.h"
#include "accounting/core/overlay/missing.h"
#include "cache/core/abi.h"
#include "cache/core/points.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define GROUP_PAGES 64u
#define GROUP_BYTES ((uint64_t)GROUP_PAGES << PAGE_SHIFT)

static const uint8_t zeros[GROUP_PAGES << PAGE_SHIFT];

int overlay_init(struct account *account, int data_fd, struct overlay **overlay_out)
{
	struct overlay *overlay = calloc(1, sizeof *overlay);

	if (!overlay)
		return -ENOMEM;
	overlay->account = account;
	overlay->image = account->image;
	overlay->data_fd = data_fd;
	for (int i = 0; i < OVERLAY_STRIPES; i++)
		pthread_rwlock_init(&overlay->stripes[i], NULL);
	pthread_mutex_init(&overlay->thaw_lock, NULL);
	pthread_mutex_init(&overlay->quota_lock, NULL);
	*overlay_out = overlay;
	return 0;
}

void overlay_deinit(struct overlay *overlay)
{
	for (int i = 0; i < OVERLAY_STRIPES; i++)
		pthread_rwlock_destroy(&overlay->stripes[i]);
	pthread_mutex_destroy(&overlay->thaw_lock);
	overlay_missing_deinit(overlay);
	free(overlay->dirty);
	pthread_mutex_destroy(&overlay->quota_lock);
	free(overlay);
}

int overlay_open(struct account *account, struct overlay **overlay_out)
{
	int fd = memfd_create("cowshed-overlay", MFD_CLOEXEC);

	if (fd < 0)
		return -errno;
	int err = fchmod(fd, 0) < 0 || ftruncate(fd, (off_t)account->image->shape.map_bytes) < 0 ? -errno : 0;
	if (!err)
		err = overlay_init(account, fd, overlay_out);
	if (err)
		close(fd);
	return err;
}

int overlay_close(struct overlay *overlay)
{
	int err = overlay->disk ? disk_close(overlay) : 0;

	close(overlay->data_fd);
	overlay_deinit(overlay);
	return err;
}

pthread_rwlock_t *overlay_stripe(struct overlay *overlay, uint64_t page)
{
	return &overlay->stripes[page / GROUP_PAGES % OVERLAY_STRIPES];
}

static uint64_t group_end(uint64_t offset)
{
	return (offset / GROUP_BYTES + 1) * GROUP_BYTES;
}

/* ---- quota ---- */

/* No lock is held from taking pages to charging them, as quota.h requires of mappings: they are in hand meanwhile. */
static int take_pages(struct overlay *overlay, uint64_t nr)
{
	pthread_mutex_lock(&overlay->quota_lock);
	bool taken = quota_take(overlay->account->quota, nr, nr) == nr;
	if (taken)
		overlay->in_hand_pages += nr;
	pthread_mutex_unlock(&overlay->quota_lock);
	if (taken)
		return 0;
	count_add(COUNTER(overlay->account->header, write_refused), 1);
	return -ENOSPC;
}

void overlay_give(struct overlay *overlay, uint64_t nr)
{
	pthread_mutex_lock(&overlay->quota_lock);
	overlay->in_hand_pages -= nr;
	quota_give(overlay->account->quota, nr);
	pthread_mutex_unlock(&overlay->quota_lock);
}

void overlay_take_anyway(struct overlay *overlay, uint64_t nr)
{
	pthread_mutex_lock(&overlay->quota_lock);
	overlay->in_hand_pages += nr;
	quota_take_anyway(overlay->account->quota, nr);
	pthread_mutex_unlock(&overlay->quota_lock);
}

int overlay_take(struct overlay *overlay, uint64_t first, uint64_t nr, uint64_t *reserved)
{
	uint64_t nr_new = nr - bits_count(overlay->account->private, first, first + nr);
	int err = nr_new ? take_pages(overlay, nr_new) : 0;

	if (!err)
		*reserved += nr_new;
	point_reach(POINT_OVERLAY_TAKEN);
	return err;
}

/* Under the stripe's lock: makes sure that *reserved pays for the nr_new pages of a run that are not private yet. */
static int pay(struct overlay *overlay, uint64_t nr_new, uint64_t *reserved)
{
	if (nr_new <= *reserved)
		return 0;
	int err = take_pages(overlay, nr_new - *reserved);
	if (!err)
		*reserved = nr_new;
	return err;
}

/* Under the stripe's lock, before the pages of a run change: pays for those not private yet and marks all dirty. */
static int begin_change(struct overlay *overlay, uint64_t first, uint64_t nr, uint64_t nr_new, uint64_t *reserved)
{
	if (account_is_frozen(overlay->account))
		return -EBUSY;
	int err = pay(overlay, nr_new, reserved);
	if (!err)
		overlay_mark_dirty(overlay, first, nr);
	return err;
}

/* Under the stripe's lock: makes pages private, after their bytes were stored. */
static void make_private(struct overlay *overlay, uint64_t first, uint64_t nr, uint64_t nr_new, uint64_t *reserved)
{
	struct account *account = overlay->account;

	overlay_come(overlay, first, nr);
	if (!nr_new)
		return;
	*reserved -= nr_new;
	pthread_mutex_lock(&overlay->quota_lock);
	overlay->in_hand_pages -= nr_new;
	pthread_mutex_unlock(&overlay->quota_lock);
	count_add(&account->header->private_pages, nr_new);
	count_add(COUNTER(account->header, charged_pages), nr_new);
	count_add(COUNTER(account->header, write_copied), nr_new);
	uint64_t mask = (nr == 64 ? ~(uint64_t)0 : ((uint64_t)1 << nr) - 1) << first % 64;
	atomic_fetch_or_explicit(&account->private[first / 64], mask, memory_order_acq_rel);
	if (overlay->disk)
		disk_changed(overlay->disk, first);
}

/* ---- bytes ---- */

int overlay_punch(struct overlay *overlay, uint64_t first, uint64_t nr)
{
	int mode = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE;

	return fallocate(overlay->data_fd, mode, (off_t)(first << PAGE_SHIFT), (off_t)(nr << PAGE_SHIFT)) < 0 ? -errno
	                                                                                                      : 0;
}

static int data_write(struct overlay *overlay, uint64_t offset, uint64_t length, const uint8_t *bytes)
{
	for (uint64_t done = 0; done < length;) {
		ssize_t put = pwrite(overlay->data_fd, bytes + done, length - done, (off_t)(offset + done));

		if (put < 0 && errno != EINTR)
			return -errno;
		if (put == 0)
			return -EIO;
		done += put > 0 ? (uint64_t)put : 0;
	}
	return 0;
}

int overlay_put(struct overlay *overlay, uint64_t first, uint64_t nr, const uint8_t *bytes)
{
	return data_write(overlay, first << PAGE_SHIFT, nr << PAGE_SHIFT, bytes);
}

/* Drops what a failed write left in pages that are not private: such pages must hold no bytes. */
static void data_clean(struct overlay *overlay, uint64_t first, uint64_t nr)
{
	for (uint64_t page = first; page < first + nr; page++)
		if (!bits_test(overlay->account->private, page))
			overlay_punch(overlay, page, 1);
}

static uint64_t nr_pages_of(uint64_t length)
{
	return (length + PAGE_BYTES - 1) >> PAGE_SHIFT;
}

int overlay_write(struct overlay *overlay, uint64_t offset, uint64_t length, const uint8_t *bytes, uint64_t *reserved)
{
	int err = 0;

	assert(offset % PAGE_BYTES == 0);
	while (length && !err) {
		uint64_t here = group_end(offset) - offset, first = offset >> PAGE_SHIFT;

		here = here < length ? here : length;
		uint64_t nr = nr_pages_of(here);
		pthread_rwlock_wrlock(overlay_stripe(overlay, first));
		uint64_t nr_new = nr - bits_count(overlay->account->private, first, first + nr);
		err = begin_change(overlay, first, nr, nr_new, reserved);
		if (!err) {
			err = data_write(overlay, offset, here, bytes);
			if (!err)
				err = point_reach(POINT_OVERLAY_WRITTEN);
			if (err)
				data_clean(overlay, first, nr);
			else
				make_private(overlay, first, nr, nr_new, reserved);
		}
		pthread_rwlock_unlock(overlay_stripe(overlay, first));
		offset += here;
		length -= here;
		bytes += here;
	}
	return err;
}

int overlay_zero(struct overlay *overlay, uint64_t offset, uint64_t length, bool allocated, uint64_t *reserved)
{
	int err = 0;

	if (allocated) {
		while (length && !err) {
			uint64_t here = group_end(offset) - offset;

			here = here < length ? here : length;
			err = overlay_write(overlay, offset, here, zeros, reserved);
			offset += here;
			length -= here;
		}
		return err;
	}
	while (length && !err) {
		uint64_t here = group_end(offset) - offset, first = offset >> PAGE_SHIFT;

		here = here < length ? here : length;
		uint64_t nr = nr_pages_of(here);
		pthread_rwlock_wrlock(overlay_stripe(overlay, first));
		uint64_t nr_new = nr - bits_count(overlay->account->private, first, first + nr);
		err = begin_change(overlay, first, nr, nr_new, reserved);
		if (!err && (nr_new < nr || overlay->disk)) /* else there are no bytes to drop */
			err = overlay_punch(overlay, first, nr);
		if (err == -EOPNOTSUPP) /* a file system without holes */
			err = data_write(overlay, offset, here, zeros);
		point_reach(POINT_OVERLAY_ZEROED);
		if (!err)
			make_private(overlay, first, nr, nr_new, reserved);
		pthread_rwlock_unlock(overlay_stripe(overlay, first));
		offset += here;
		length -= here;
	}
	return err;
}

int overlay_patch(struct overlay *overlay, uint64_t offset, uint32_t length, const uint8_t *bytes, const uint8_t *frame,
                  uint64_t *reserved)
{
	uint64_t page = offset >> PAGE_SHIFT;
	uint32_t in_page = offset % PAGE_BYTES;
	uint8_t whole[PAGE_BYTES];
	int err = -EAGAIN;

	assert(in_page + length <= PAGE_BYTES);
	bytes = bytes ? bytes : zeros;
	pthread_rwlock_wrlock(overlay_stripe(overlay, page));
	if (overlay_is_missing(overlay, page)) {
		err = overlay_look_missing(overlay, page, 1);
	} else if (bits_test(overlay->account->private, page)) {
		err = begin_change(overlay, page, 1, 0, reserved);
		if (!err)
			err = data_write(overlay, offset, length, bytes);
	} else if (frame) {
		memcpy(whole, frame, PAGE_BYTES);
		memcpy(whole + in_page, bytes, length);
		err = begin_change(overlay, page, 1, 1, reserved);
		if (!err)
			err = data_write(overlay, page << PAGE_SHIFT, PAGE_BYTES, whole);
		if (!err)
			err = point_reach(POINT_OVERLAY_WRITTEN);
		if (err)
			data_clean(overlay, page, 1);
		else
			make_private(overlay, page, 1, 1, reserved);
	}
	pthread_rwlock_unlock(overlay_stripe(overlay, page));
	return err;
}

int overlay_trim(struct overlay *overlay, uint64_t first, uint64_t nr)
{
	struct account *account = overlay->account;
	uint64_t end = first + nr;
	int err = 0;

	for (uint64_t page = first; (page = bits_next(account->private, page, end)) < end && !err;) {
		uint64_t stop = (page / GROUP_PAGES + 1) * GROUP_PAGES;
		uint64_t nr_gone = 0;

		stop = stop < end ? stop : end;
		pthread_rwlock_wrlock(overlay_stripe(overlay, page));
		if (account_is_frozen(account))
			err = -EBUSY;
		while (!err && (page = bits_next(account->private, page, stop)) < stop) {
			uint64_t run_end = bits_next_clear(account->private, page, stop);

			for (uint64_t i = page; i < run_end; i++)
				bits_clear(account->private, i);
			overlay_mark_dirty(overlay, page, run_end - page);
			overlay_come(overlay, page, run_end - page);
			nr_gone += run_end - page;
			point_reach(POINT_OVERLAY_TRIMMED);
			if (overlay->disk)
				disk_trimmed(overlay->disk, page, run_end - page);
			else
				err = overlay_punch(overlay, page, run_end - page);
			page = run_end;
		}
		atomic_fetch_sub(&account->header->private_pages, nr_gone);
		quota_give(account->quota, nr_gone);
		pthread_rwlock_unlock(overlay_stripe(overlay, stop - 1));
		count_add(COUNTER(account->header, discarded_pages), nr_gone);
	}
	return err;
}

int overlay_discard(struct overlay *overlay)
{
	return overlay_trim(overlay, 0, overlay->image->shape.nr_pages);
}

/* ---- reading ---- */

/* The end of the run of pages that are private (or shared) like the one at offset, within one group. */
static uint64_t run_end(const struct overlay *overlay, uint64_t offset, uint64_t length, bool private)
{
	const bits_word *bits = overlay->account->private;
	uint64_t end = offset + length < group_end(offset) ? offset + length : group_end(offset);
	uint64_t page = offset >> PAGE_SHIFT, stop = nr_pages_of(end);
	uint64_t found = private ? bits_next_clear(bits, page, stop) : bits_next(bits, page, stop);

	if (private && overlay_has_missing(overlay))
		found = bits_next(overlay->account->preloaded, page, found);
	return found << PAGE_SHIFT < end ? found << PAGE_SHIFT : end;
}

int64_t overlay_read_run(struct overlay *overlay, uint64_t offset, uint64_t length, void *to, bool *private_out)
{
	uint64_t page = offset >> PAGE_SHIFT;
	uint64_t end = offset;

	if (bits_test(overlay->account->private, page)) {
		pthread_rwlock_rdlock(overlay_stripe(overlay, page));
		if (overlay_is_missing(overlay, page)) {
			pthread_rwlock_unlock(overlay_stripe(overlay, page));
			return -EIO; /* the caller must wait first: see overlay_await */
		}
		if (bits_test(overlay->account->private, page)) {
			end = run_end(overlay, offset, length, true);
			for (uint64_t at = offset; at < end;) {
				ssize_t got = pread(overlay->data_fd, (char *)to + (at - offset), end - at, (off_t)at);

				if (got <= 0 && !(got < 0 && errno == EINTR)) {
					pthread_rwlock_unlock(overlay_stripe(overlay, page));
					return got < 0 ? -errno : -EIO;
				}
				at += got > 0 ? (uint64_t)got : 0;
			}
		}
		pthread_rwlock_unlock(overlay_stripe(overlay, page));
		if (end > offset) {
			*private_out = true;
			return (int64_t)(end - offset);
		}
	}
	*private_out = false;
	/* Shared at that moment; a page that becomes private meanwhile ends the run sooner. */
	uint64_t next = (page + 1) << PAGE_SHIFT;
	if (next >= offset + length)
		return (int64_t)length;
	if (next < group_end(offset))
		next = run_end(overlay, next, offset + length - next, false);
	return (int64_t)(next - offset);
}

uint64_t overlay_status_run(struct overlay *overlay, uint64_t offset, uint64_t length, bool want_zero,
                            bool *private_out, bool *zero_out)
{
	const bits_word *bits = overlay->account->private;
	uint64_t page = offset >> PAGE_SHIFT, stop = nr_pages_of(offset + length);
	bool private = bits_test(bits, page);
	uint64_t found = private ? bits_next_clear(bits, page, stop) : bits_next(bits, page, stop);
	uint64_t end = found << PAGE_SHIFT < offset + length ? found << PAGE_SHIFT : offset + length;

	if (end <= offset) /* the page changed meanwhile: report it as it was */
		end = (page + 1) << PAGE_SHIFT < offset + length ? (page + 1) << PAGE_SHIFT : offset + length;
	*private_out = private;
	*zero_out = false;
	if (!private || !want_zero)
		return end - offset;
	if (overlay_has_missing(overlay)) { /* they may be zeros or not */
		const bits_word *missing = overlay->account->preloaded;
		bool is_missing = bits_test(missing, page);
		uint64_t next = is_missing ? bits_next_clear(missing, page, nr_pages_of(end))
		                           : bits_next(missing, page, nr_pages_of(end));

		if (next > page && next << PAGE_SHIFT < end)
			end = next << PAGE_SHIFT;
		if (is_missing)
			return end - offset;
	}
	off_t data = lseek(overlay->data_fd, (off_t)(page << PAGE_SHIFT), SEEK_DATA);
	if (data < 0 || (uint64_t)data >= end) {
		*zero_out = data >= 0 || errno == ENXIO;
	} else if ((uint64_t)data >> PAGE_SHIFT > page) {
		*zero_out = true;
		end = (uint64_t)data >> PAGE_SHIFT << PAGE_SHIFT;
	} else {
		off_t hole = lseek(overlay->data_fd, (off_t)(page << PAGE_SHIFT), SEEK_HOLE);
		uint64_t hole_page = hole < 0 ? end : nr_pages_of((uint64_t)hole) << PAGE_SHIFT;

		if (hole_page > offset && hole_page < end)
			end = hole_page;
	}
	return end - offset;
}

int overlay_stored(struct overlay *overlay, uint64_t *words_out, uint64_t nr_words)
{
	uint64_t map_bytes = overlay->image->shape.map_bytes;

	if (nr_words != bits_bytes(overlay->image->shape.nr_pages) / 8)
		return -ERANGE;
	memset(words_out, 0, nr_words * 8);
	for (off_t at = 0; (at = lseek(overlay->data_fd, at, SEEK_DATA)) >= 0 && (uint64_t)at < map_bytes;) {
		off_t end = lseek(overlay->data_fd, at, SEEK_HOLE);

		if (end < 0)
			return -errno;
		for (uint64_t page = (uint64_t)at >> PAGE_SHIFT; page < nr_pages_of((uint64_t)end); page++)
			if (!overlay->disk || !disk_is_dropped(overlay->disk, page))
				words_out[page / 64] |= (uint64_t)1 << page % 64;
		at = end;
	}
	return 0;
}

int overlay_flush(struct overlay *overlay, struct overlay_sync *sync)
{
	if (!overlay->disk)
		return 1;
	disk_flush(overlay->disk, sync);
	return 0;
}
