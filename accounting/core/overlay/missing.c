/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "accounting/core/overlay/missing.h"

#include "accounting/core/overlay/files.h"
#include "cache/core/abi.h"
#include "cache/core/points.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

static size_t by_page(const struct overlay *overlay)
{
	return bits_bytes(overlay->image->shape.nr_pages);
}

int overlay_missing_init(struct overlay *overlay)
{
	if (overlay->missing || !overlay_has_missing(overlay))
		return 0;
	struct overlay_missing *missing = calloc(1, sizeof *missing);
	if (!missing)
		return -ENOMEM;
	missing->wanted = calloc(1, by_page(overlay));
	missing->lost = calloc(1, by_page(overlay));
	missing->event_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	int err = !missing->wanted || !missing->lost ? -ENOMEM : missing->event_fd < 0 ? -errno : 0;
	if (err) {
		if (missing->event_fd >= 0)
			close(missing->event_fd);
		free(missing->wanted);
		free(missing->lost);
		free(missing);
		return err;
	}
	pthread_mutex_init(&missing->lock, NULL);
	overlay->missing = missing;
	return 0;
}

void overlay_missing_deinit(struct overlay *overlay)
{
	struct overlay_missing *missing = overlay->missing;

	if (!missing)
		return;
	assert(!missing->waits);
	close(missing->event_fd);
	pthread_mutex_destroy(&missing->lock);
	free(missing->wanted);
	free(missing->lost);
	free(missing);
	overlay->missing = NULL;
}

static int check_range(const struct overlay *overlay, uint64_t first, uint64_t nr)
{
	uint64_t nr_pages = overlay->image->shape.nr_pages;

	return first > nr_pages || nr > nr_pages - first ? -EINVAL : 0;
}

int overlay_expect(struct overlay *overlay, uint64_t first, uint64_t nr)
{
	struct account *account = overlay->account;
	int err = check_range(overlay, first, nr);

	if (!err && bits_count(account->private, first, first + nr))
		err = -EEXIST;
	if (!err && overlay->disk)
		err = disk_missing_begin(overlay->disk);
	if (err || !nr)
		return err;
	overlay_take_anyway(overlay, nr);
	for (uint64_t page = first; page < first + nr; page++) {
		pthread_rwlock_t *stripe = overlay_stripe(overlay, page);

		pthread_rwlock_wrlock(stripe);
		/* Private first: the missing bit of a page that is not private does not count. */
		bits_set(account->private, page);
		bits_set(account->preloaded, page);
		if (overlay->disk)
			disk_missing_changed(overlay->disk, page);
		pthread_rwlock_unlock(stripe);
	}
	pthread_mutex_lock(&overlay->quota_lock);
	overlay->in_hand_pages -= nr;
	count_add(&account->header->private_pages, nr);
	count_add(COUNTER(account->header, charged_pages), nr);
	pthread_mutex_unlock(&overlay->quota_lock);
	count_add(&account->header->preloaded_pages, nr);
	return overlay_missing_init(overlay);
}

/* ---- waiting ---- */

/* Under missing->lock; without it the result is a hint. */
static int state_of(struct overlay *overlay, uint64_t first, uint64_t end)
{
	int state = 0;

	if (!overlay_has_missing(overlay))
		return 0;
	for (uint64_t page = first; (page = bits_next(overlay->account->preloaded, page, end)) < end; page++) {
		if (bits_test(overlay->missing->lost, page))
			return -EIO;
		state = -EINPROGRESS;
	}
	return state;
}

int overlay_look_missing(struct overlay *overlay, uint64_t first, uint64_t nr)
{
	return state_of(overlay, first, first + nr);
}

int overlay_await(struct overlay *overlay, struct overlay_wait *wait)
{
	struct overlay_missing *missing = overlay->missing;
	bool is_new = false;

	if (!missing)
		return 0;
	pthread_mutex_lock(&missing->lock);
	int state = state_of(overlay, wait->first, wait->end);
	if (state == -EINPROGRESS) {
		const bits_word *bits = overlay->account->preloaded;

		for (uint64_t page = wait->first; (page = bits_next(bits, page, wait->end)) < wait->end; page++)
			is_new |= bits_set(missing->wanted, page);
		wait->next = missing->waits;
		missing->waits = wait;
	}
	pthread_mutex_unlock(&missing->lock);
	if (is_new)
		eventfd_write(missing->event_fd, 1);
	return state;
}

/* Under missing->lock: ends the waits on pages of a range that have nothing left to wait for. */
static void wake(struct overlay *overlay, uint64_t first, uint64_t end)
{
	for (struct overlay_wait **at = &overlay->missing->waits, *wait; (wait = *at);) {
		int state = -EINPROGRESS;

		if (wait->first < end && first < wait->end)
			state = state_of(overlay, wait->first, wait->end);
		if (state == -EINPROGRESS) {
			at = &wait->next;
			continue;
		}
		*at = wait->next;
		wait->go(wait, state);
	}
}

void overlay_cancel_waits(struct overlay *overlay, const void *owner)
{
	struct overlay_missing *missing = overlay->missing;

	if (!missing)
		return;
	pthread_mutex_lock(&missing->lock);
	for (struct overlay_wait **at = &missing->waits, *wait; (wait = *at);) {
		if (wait->owner != owner) {
			at = &wait->next;
			continue;
		}
		*at = wait->next;
		wait->go(wait, -ESHUTDOWN);
	}
	pthread_mutex_unlock(&missing->lock);
}

void overlay_come(struct overlay *overlay, uint64_t first, uint64_t nr)
{
	struct account *account = overlay->account;
	uint64_t nr_come = 0;

	if (!overlay_has_missing(overlay))
		return;
	for (uint64_t page = first; page < first + nr; page++)
		nr_come += bits_clear(account->preloaded, page);
	if (!nr_come)
		return;
	if (atomic_fetch_sub(&account->header->preloaded_pages, nr_come) == nr_come)
		eventfd_write(overlay->missing->event_fd, 1);
	if (overlay->disk)
		disk_missing_changed(overlay->disk, first);
	pthread_mutex_lock(&overlay->missing->lock);
	for (uint64_t page = first; page < first + nr; page++)
		bits_clear(overlay->missing->lost, page);
	wake(overlay, first, first + nr);
	pthread_mutex_unlock(&overlay->missing->lock);
}

/* ---- arriving ---- */

int64_t overlay_arrive(struct overlay *overlay, uint64_t first, uint64_t nr, const uint8_t *bytes)
{
	int err = check_range(overlay, first, nr);
	const bits_word *missing = overlay->account->preloaded;
	int64_t nr_come = 0;

	for (uint64_t page = first, end = first + nr; !err && (page = bits_next(missing, page, end)) < end;) {
		uint64_t group_end = (page / 64 + 1) * 64, stop = group_end < end ? group_end : end;
		pthread_rwlock_t *stripe = overlay_stripe(overlay, page);

		pthread_rwlock_wrlock(stripe);
		for (uint64_t at = page; !err && (at = bits_next(missing, at, stop)) < stop;) {
			uint64_t run_end = bits_next_clear(missing, at, stop);

			err = overlay_put(overlay, at, run_end - at, bytes + ((at - first) << PAGE_SHIFT));
			if (!err)
				err = point_reach(POINT_OVERLAY_WRITTEN);
			if (!err) {
				overlay_come(overlay, at, run_end - at);
				nr_come += (int64_t)(run_end - at);
			}
			at = run_end;
		}
		pthread_rwlock_unlock(stripe);
		page = stop;
	}
	return err ? err : nr_come;
}

int64_t overlay_missing(struct overlay *overlay, uint64_t *words_out, uint64_t nr_words)
{
	int64_t nr = 0;

	if (nr_words != by_page(overlay) / 8)
		return -ERANGE;
	for (uint64_t i = 0; i < nr_words; i++) {
		words_out[i] = atomic_load(&overlay->account->preloaded[i]);
		nr += __builtin_popcountll(words_out[i]);
	}
	return nr;
}

int64_t overlay_take_wanted(struct overlay *overlay, uint64_t *words_out, uint64_t nr_words)
{
	int64_t nr = 0;
	eventfd_t count;

	if (nr_words != by_page(overlay) / 8)
		return -ERANGE;
	if (overlay->missing)
		eventfd_read(overlay->missing->event_fd, &count);
	for (uint64_t i = 0; i < nr_words; i++) {
		words_out[i] = overlay->missing ? atomic_exchange(&overlay->missing->wanted[i], 0) : 0;
		words_out[i] &= atomic_load(&overlay->account->preloaded[i]);
		nr += __builtin_popcountll(words_out[i]);
	}
	return nr;
}

int overlay_missing_fd(const struct overlay *overlay)
{
	return overlay->missing ? overlay->missing->event_fd : -ENOENT;
}

int64_t overlay_lose(struct overlay *overlay, uint64_t first, uint64_t nr)
{
	int err = check_range(overlay, first, nr);
	int64_t nr_lost = 0;

	if (err || !overlay->missing)
		return err;
	pthread_mutex_lock(&overlay->missing->lock);
	for (uint64_t page = first; (page = bits_next(overlay->account->preloaded, page, first + nr)) < first + nr;
	     page++)
		nr_lost += bits_set(overlay->missing->lost, page);
	wake(overlay, first, first + nr);
	pthread_mutex_unlock(&overlay->missing->lock);
	return nr_lost;
}

int64_t overlay_nr_lost(struct overlay *overlay)
{
	uint64_t nr_words = by_page(overlay) / 8;
	int64_t nr = 0;

	for (uint64_t i = 0; overlay->missing && i < nr_words; i++)
		nr += __builtin_popcountll(atomic_load(&overlay->missing->lost[i]) &
		                           atomic_load(&overlay->account->preloaded[i]));
	return nr;
}

void overlay_find(struct overlay *overlay)
{
	if (!overlay->missing)
		return;
	pthread_mutex_lock(&overlay->missing->lock);
	for (uint64_t i = 0; i < by_page(overlay) / 8; i++)
		atomic_store(&overlay->missing->lost[i], 0);
	pthread_mutex_unlock(&overlay->missing->lock);
}

/* ---- durable ---- */

struct flush_now {
	struct overlay_sync sync;
	pthread_mutex_t lock;
	pthread_cond_t done;
	int status; /* 1: not yet */
};

static void flush_done(struct overlay_sync *sync, int status)
{
	struct flush_now *now = (struct flush_now *)sync;

	pthread_mutex_lock(&now->lock);
	now->status = status;
	pthread_cond_signal(&now->done);
	pthread_mutex_unlock(&now->lock);
}

int overlay_flush_now(struct overlay *overlay)
{
	struct flush_now now = {
		.sync = {.done = flush_done},
		.lock = PTHREAD_MUTEX_INITIALIZER,
		.done = PTHREAD_COND_INITIALIZER,
		.status = 1,
	};

	if (overlay_flush(overlay, &now.sync))
		return 0;
	pthread_mutex_lock(&now.lock);
	while (now.status == 1)
		pthread_cond_wait(&now.done, &now.lock);
	pthread_mutex_unlock(&now.lock);
	pthread_mutex_destroy(&now.lock);
	pthread_cond_destroy(&now.done);
	return now.status;
}
