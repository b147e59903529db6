/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "accounting/core/track.h"

#include "accounting/core/open_regions.h"
#include "accounting/core/settle.h"
#include "cache/core/points.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>

#define BATCH_WORDS 64 /* protected at once: 4096 pages, some 200 us at most */
#define PATIENCE_MS 1000

static uint64_t nr_words_of(const struct account *account)
{
	return bits_bytes(account->image->shape.nr_pages) / sizeof(bits_word);
}

/* Skips pages of the run that are no longer ours (unmapped, unregistered). */
static int protect_run(struct account *account, uint64_t first, uint64_t nr, bool on)
{
	int err = account_protect(account, first, nr, on);

	for (uint64_t page = first; err == -ENOENT && nr > 1 && page < first + nr; page++) {
		int page_err = account_protect(account, page, 1, on);

		if (page_err && page_err != -ENOENT)
			return page_err;
	}
	return err == -ENOENT ? 0 : err;
}

/* Protects (or opens) the pages whose bits are set in nr words, whose first bit is page first. */
static int protect_bits(struct account *account, const bits_word *words, uint64_t nr, uint64_t first, bool on)
{
	int err = 0;

	for (uint64_t at = 0; !err && (at = bits_next(words, at, nr * 64)) < nr * 64;) {
		uint64_t run_end = bits_next_clear(words, at, nr * 64);

		err = protect_run(account, first + at, run_end - at, on);
		at = run_end;
	}
	return err;
}

static void nap(void)
{
	nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
}

/* Under write_lock. */
static int begin(struct account *account)
{
	uint64_t nr_words = nr_words_of(account);

	if (account->populated)
		return -EOPNOTSUPP;
	if (account->dirty)
		return 0;
	/* An open page is written unseen. */
	int err = account_close_all(account, CLOSE_FREEZE);
	if (err)
		return err;
	bits_word *dirty = calloc(nr_words, sizeof *dirty);
	if (!dirty)
		return -ENOMEM;
	for (uint64_t i = 0; i < nr_words; i++)
		dirty[i] = account->private[i];
	account->dirty = dirty;
	atomic_store(&account->header->protected, 1);
	return 0;
}

/* Opens the private pages, a batch at a time, and then drops the dirty bits. */
static int end(struct account *account)
{
	uint64_t nr_words = nr_words_of(account);
	int patience = PATIENCE_MS, err = 0;

	for (uint64_t at = 0; at < nr_words;) {
		uint64_t nr = nr_words - at < BATCH_WORDS ? nr_words - at : BATCH_WORDS;

		pthread_mutex_lock(&account->write_lock);
		err = protect_bits(account, account->private + at, nr, at * 64, false);
		pthread_mutex_unlock(&account->write_lock);
		if (err == -EAGAIN && patience-- > 0) {
			nap();
			continue;
		}
		if (err)
			break;
		at += nr;
	}
	pthread_mutex_lock(&account->write_lock);
	if (!err)
		atomic_store(&account->header->protected, 0);
	free(account->dirty);
	account->dirty = NULL;
	pthread_mutex_unlock(&account->write_lock);
	return err;
}

int account_track(struct account *account, int on)
{
	int err = 0;

	if (on) /* most of them without holding up its faults */
		account_close_regions(account, 0, image_nr_regions(account->image), CLOSE_FREEZE);
	pthread_mutex_lock(&account->write_lock);
	bool frozen = account_is_frozen(account);
	if (on) {
		account->thaw_ends_tracking = false;
		err = begin(account);
	}
	bool ends = !on && atomic_load(&account->header->protected);
	if (ends && frozen) /* no page may be opened before */
		account->thaw_ends_tracking = true;
	pthread_mutex_unlock(&account->write_lock);
	return ends && !frozen ? end(account) : err;
}

/* Under write_lock: see the order in track.h. */
static int take_batch(struct account *account, uint64_t *words_out, uint64_t first_word, uint64_t nr)
{
	bits_word taken[BATCH_WORDS];
	int err = 0;

	for (uint64_t i = 0; i < nr; i++)
		taken[i] = atomic_exchange(&account->dirty[first_word + i], 0);
	point_reach(POINT_TRACK_CLEARED);
	for (uint64_t i = 0; i < nr; i++)
		words_out[first_word + i] = taken[i];
	/* A frozen page is protected already. */
	if (!account_is_frozen(account))
		err = protect_bits(account, taken, nr, first_word * 64, true);
	for (uint64_t i = 0; i < nr && err; i++)
		atomic_fetch_or(&account->dirty[first_word + i], taken[i]);
	return err;
}

static void give_back(struct account *account, const uint64_t *words, uint64_t nr)
{
	pthread_mutex_lock(&account->write_lock);
	for (uint64_t i = 0; i < nr && account->dirty; i++)
		atomic_fetch_or(&account->dirty[i], words[i]);
	pthread_mutex_unlock(&account->write_lock);
}

int64_t account_take_dirty(struct account *account, uint64_t *words_out, uint64_t nr_words)
{
	int patience = PATIENCE_MS;
	int64_t nr_taken = 0;

	if (nr_words != nr_words_of(account))
		return -ERANGE;
	for (uint64_t at = 0; at < nr_words;) {
		uint64_t nr = nr_words - at < BATCH_WORDS ? nr_words - at : BATCH_WORDS;

		pthread_mutex_lock(&account->write_lock);
		int err = account->dirty ? take_batch(account, words_out, at, nr) : -EINVAL;
		pthread_mutex_unlock(&account->write_lock);
		if (err == -EAGAIN && patience-- > 0) { /* an event is unread: the fault thread must read it */
			nap();
			continue;
		}
		if (err) {
			give_back(account, words_out, at);
			return err;
		}
		for (uint64_t i = 0; i < nr; i++)
			nr_taken += __builtin_popcountll(words_out[at + i]);
		at += nr;
	}
	return nr_taken;
}

/* Under write_lock, held throughout: no page is opened meanwhile. */
static int freeze(struct account *account)
{
	bool followed = account->dirty || atomic_load(&account->header->protected);

	if (account_is_frozen(account))
		return 0;
	int err = begin(account);
	if (err)
		return err;
	account->thaw_ends_tracking |= !followed;
	err = protect_bits(account, account->dirty, nr_words_of(account), 0, true);
	if (err)
		return err;
	/* A page opened and never written is not private: while frozen, the private bitmap must be exact. */
	int64_t settled = account_settle_range(account, 0, account->image->shape.nr_pages);
	if (settled < 0)
		return (int)settled;
	atomic_store(&account->header->frozen, 1);
	return 0;
}

int account_freeze(struct account *account)
{
	account_close_regions(account, 0, image_nr_regions(account->image), CLOSE_FREEZE);
	pthread_mutex_lock(&account->write_lock);
	int err = freeze(account);
	pthread_mutex_unlock(&account->write_lock);
	return err;
}

void account_thaw(struct account *account)
{
	pthread_mutex_lock(&account->write_lock);
	atomic_store(&account->header->frozen, 0);
	bool ends = account->thaw_ends_tracking;
	account->thaw_ends_tracking = false;
	pthread_mutex_unlock(&account->write_lock);
	/* If it fails, pages are opened as they are written. */
	if (ends)
		end(account);
}
