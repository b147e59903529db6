/* SPDX-License-Identifier: Apache-2.0 */
/* Bitmaps shared between threads: single bits change atomically, runs are read word by word. */
#ifndef COWSHED_BITS_H
#define COWSHED_BITS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef _Atomic uint64_t bits_word;

static inline size_t bits_bytes(uint64_t nr_bits)
{
	return (size_t)((nr_bits + 63) / 64 * 8);
}

static inline bool bits_test(const bits_word *bits, uint64_t no)
{
	return atomic_load_explicit(&bits[no / 64], memory_order_acquire) >> (no % 64) & 1;
}

/* Sets a bit; returns whether it was clear. */
static inline bool bits_set(bits_word *bits, uint64_t no)
{
	uint64_t mask = (uint64_t)1 << (no % 64);

	return !(atomic_fetch_or_explicit(&bits[no / 64], mask, memory_order_acq_rel) & mask);
}

/* Clears a bit; returns whether it was set. */
static inline bool bits_clear(bits_word *bits, uint64_t no)
{
	uint64_t mask = (uint64_t)1 << (no % 64);

	return atomic_fetch_and_explicit(&bits[no / 64], ~mask, memory_order_acq_rel) & mask;
}

/* The first set bit in [from, to), or to. */
static inline uint64_t bits_next(const bits_word *bits, uint64_t from, uint64_t to)
{
	while (from < to) {
		uint64_t word = atomic_load_explicit(&bits[from / 64], memory_order_acquire) >> (from % 64);

		if (word) {
			uint64_t found = from + (uint64_t)__builtin_ctzll(word);

			return found < to ? found : to;
		}
		from = (from / 64 + 1) * 64;
	}
	return to;
}

/* The first clear bit in [from, to), or to. */
static inline uint64_t bits_next_clear(const bits_word *bits, uint64_t from, uint64_t to)
{
	while (from < to) {
		uint64_t word = ~atomic_load_explicit(&bits[from / 64], memory_order_acquire) >> (from % 64);

		if (word) {
			uint64_t found = from + (uint64_t)__builtin_ctzll(word);

			return found < to ? found : to;
		}
		from = (from / 64 + 1) * 64;
	}
	return to;
}

/* How many bits are set in [from, to). */
static inline uint64_t bits_count(const bits_word *bits, uint64_t from, uint64_t to)
{
	uint64_t nr = 0;

	while (from < to) {
		uint64_t word = atomic_load_explicit(&bits[from / 64], memory_order_acquire) >> (from % 64);
		uint64_t nr_here = 64 - from % 64;

		if (nr_here > to - from) {
			nr_here = to - from;
			word &= ((uint64_t)1 << nr_here) - 1;
		}
		nr += (uint64_t)__builtin_popcountll(word);
		from += nr_here;
	}
	return nr;
}

#endif
