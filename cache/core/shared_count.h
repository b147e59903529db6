/* SPDX-License-Identifier: Apache-2.0 */
/* Counters in memory that Python shares with another backend: its successor, or the one it takes over from. */
#ifndef COWSHED_SHARED_COUNT_H
#define COWSHED_SHARED_COUNT_H

#include <stdint.h>

/* cdef-begin */
/* Adds nr to words[no] atomically; other threads, and other processes that map it, may add at the same time. */
void shared_count_add(uint64_t *words, uint64_t no, uint64_t nr);
/* cdef-end */

#endif
