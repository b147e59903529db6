/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Tracking writes to an overlay, and freezing it.
 *
 * A page is marked dirty and written under its stripe's lock, and its bit is taken under the same lock: so a write
 * marked before is in the bytes that are read afterwards, and a later write marks the page again. A freeze is a flag
 * that writers check under the same lock: once the freezer has held every stripe's lock, each write is done or held
 * back.
 */
#include "accounting/core/overlay/overlay.h"

#include <errno.h>
#include <stdlib.h>

static uint64_t nr_words_of(const struct overlay *overlay)
{
	return bits_bytes(overlay->image->shape.nr_pages) / sizeof(bits_word);
}

/* Waits until every change that began before has ended. */
static void pass_stripes(struct overlay *overlay)
{
	for (int i = 0; i < OVERLAY_STRIPES; i++) {
		pthread_rwlock_wrlock(&overlay->stripes[i]);
		pthread_rwlock_unlock(&overlay->stripes[i]);
	}
}

int overlay_fd(const struct overlay *overlay)
{
	return overlay->data_fd;
}

int overlay_track(struct overlay *overlay, int on)
{
	bits_word *dirty = atomic_load(&overlay->dirty);

	if (!on) {
		atomic_store(&overlay->dirty, NULL);
		pass_stripes(overlay);
		free(dirty);
		return 0;
	}
	if (dirty)
		return 0;
	dirty = calloc(nr_words_of(overlay), sizeof *dirty);
	if (!dirty)
		return -ENOMEM;
	atomic_store(&overlay->dirty, dirty);
	pass_stripes(overlay);
	/* From here on every change marks its page. */
	for (uint64_t i = 0; i < nr_words_of(overlay); i++)
		atomic_fetch_or(&dirty[i], overlay->account->private[i]);
	return 0;
}

int64_t overlay_take_dirty(struct overlay *overlay, uint64_t *words_out, uint64_t nr_words)
{
	int64_t nr = 0;

	if (nr_words != nr_words_of(overlay))
		return -ERANGE;
	bits_word *dirty = atomic_load(&overlay->dirty);
	if (!dirty)
		return -EINVAL;
	for (uint64_t i = 0; i < nr_words; i++) {
		pthread_rwlock_t *stripe = &overlay->stripes[i % OVERLAY_STRIPES];

		words_out[i] = 0;
		if (!atomic_load(&dirty[i]))
			continue;
		pthread_rwlock_wrlock(stripe);
		words_out[i] = atomic_exchange(&dirty[i], 0);
		pthread_rwlock_unlock(stripe);
		nr += __builtin_popcountll(words_out[i]);
	}
	return nr;
}

void overlay_freeze(struct overlay *overlay)
{
	atomic_store(&overlay->account->header->frozen, 1);
	pass_stripes(overlay);
}

void overlay_thaw(struct overlay *overlay)
{
	pthread_mutex_lock(&overlay->thaw_lock);
	atomic_store(&overlay->account->header->frozen, 0);
	for (struct overlay_thaw_wait *wait; (wait = overlay->thaw_waits);) {
		overlay->thaw_waits = wait->next;
		wait->queued = false;
		wait->go(wait);
	}
	pthread_mutex_unlock(&overlay->thaw_lock);
}

bool overlay_await_thaw(struct overlay *overlay, struct overlay_thaw_wait *wait)
{
	pthread_mutex_lock(&overlay->thaw_lock);
	bool frozen = account_is_frozen(overlay->account);
	if (frozen && !wait->queued) {
		wait->queued = true;
		wait->next = overlay->thaw_waits;
		overlay->thaw_waits = wait;
	}
	pthread_mutex_unlock(&overlay->thaw_lock);
	return frozen;
}

void overlay_cancel_thaw_wait(struct overlay *overlay, struct overlay_thaw_wait *wait)
{
	pthread_mutex_lock(&overlay->thaw_lock);
	for (struct overlay_thaw_wait **at = &overlay->thaw_waits; wait->queued; at = &(*at)->next)
		if (*at == wait) {
			*at = wait->next;
			wait->queued = false;
			break;
		}
	pthread_mutex_unlock(&overlay->thaw_lock);
}
