/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One extent's state: a word that holds the state and a count of holds.
 *
 *     ABSENT -> LOADING -> RESIDENT -> EVICTING -> ABSENT          (a failed load: LOADING -> ABSENT)
 *
 * A hold is taken only on a RESIDENT extent and keeps it so: the frames are there until it is released.
 * Fault threads take one around every mapping ioctl, without a lock.  The step to EVICTING is a
 * compare-and-swap from "RESIDENT, no holds", which is all that keeps mapping and punching apart.
 * Every other step is made under the store's lock.
 */
#ifndef COWSHED_EXTENT_H
#define COWSHED_EXTENT_H

#include <assert.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* cdef-begin */
enum extent_state { EXTENT_ABSENT, EXTENT_LOADING, EXTENT_RESIDENT, EXTENT_EVICTING };
/* cdef-end */

typedef _Atomic uint32_t extent_word;

#define EXTENT_STATE_MASK 0xffu
#define EXTENT_HOLD_ONE 0x100u

static inline enum extent_state extent_state(const extent_word *word)
{
	return atomic_load_explicit(word, memory_order_acquire) & EXTENT_STATE_MASK;
}

static inline bool extent_hold(extent_word *word)
{
	uint32_t seen = atomic_load_explicit(word, memory_order_relaxed);

	while ((seen & EXTENT_STATE_MASK) == EXTENT_RESIDENT)
		if (atomic_compare_exchange_weak_explicit(word, &seen, seen + EXTENT_HOLD_ONE, memory_order_acquire,
		                                          memory_order_relaxed))
			return true;
	return false;
}

static inline void extent_release(extent_word *word)
{
	uint32_t before = atomic_fetch_sub_explicit(word, EXTENT_HOLD_ONE, memory_order_release);

	assert(before >= EXTENT_HOLD_ONE && (before & EXTENT_STATE_MASK) == EXTENT_RESIDENT);
	(void)before;
}

static inline bool extent_begin_evict(extent_word *word)
{
	uint32_t idle = EXTENT_RESIDENT;

	return atomic_compare_exchange_strong_explicit(word, &idle, EXTENT_EVICTING, memory_order_acq_rel,
	                                               memory_order_relaxed);
}

/* The steps made under the store's lock; nr_holds: the holds that the extent starts with. */
static inline void extent_step(extent_word *word, enum extent_state from, enum extent_state to, uint32_t nr_holds)
{
	uint32_t before =
		atomic_exchange_explicit(word, (uint32_t)to + nr_holds * EXTENT_HOLD_ONE, memory_order_acq_rel);

	assert(before == (uint32_t)from);
	(void)before;
	(void)from;
}

#endif
