/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Runs of pages as a handoff sends them: packed, little-endian, each the first page (u64) and how many pages (u32).
 *
 * Private pages are often scattered, one page a run. So runs are made, checked and walked here, many at a time.
 */
#ifndef COWSHED_PAGE_RUNS_H
#define COWSHED_PAGE_RUNS_H

#include <stdint.h>

/* cdef-begin */
#define PAGE_RUN_BYTES 12

/* Makes runs of the set bits from bit `from` on, of at most max_pages pages in all; runs_out has room for max_pages
 * runs. Returns how many runs; *next_out is the bit to go on from, 64 * nr_words if no more are set. */
uint64_t page_runs_make(const uint64_t *words, uint64_t nr_words, uint64_t from, uint64_t max_pages, uint8_t *runs_out,
                        uint64_t *next_out);
/* Returns the number of pages of nr_runs runs. -EINVAL unless they ascend, none is empty, and all are within nr_pages
 * pages. */
int64_t page_runs_check(const uint8_t *runs, uint64_t nr_runs, uint64_t nr_pages);
/* cdef-end */

struct page_run {
	uint64_t first;
	uint32_t nr;
};

struct page_run page_run_at(const uint8_t *runs, uint64_t no);

#endif
