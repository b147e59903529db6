/* SPDX-License-Identifier: Apache-2.0 */
#include "accounting/core/page_runs.h"

#include <endian.h>
#include <errno.h>
#include <string.h>

struct page_run page_run_at(const uint8_t *runs, uint64_t no)
{
	uint64_t first;
	uint32_t nr;

	memcpy(&first, runs + no * PAGE_RUN_BYTES, sizeof first);
	memcpy(&nr, runs + no * PAGE_RUN_BYTES + sizeof first, sizeof nr);
	return (struct page_run){le64toh(first), le32toh(nr)};
}

static void put_run(uint8_t *runs, uint64_t no, uint64_t first, uint64_t nr)
{
	uint64_t le_first = htole64(first);
	uint32_t le_nr = htole32((uint32_t)nr);

	memcpy(runs + no * PAGE_RUN_BYTES, &le_first, sizeof le_first);
	memcpy(runs + no * PAGE_RUN_BYTES + sizeof le_first, &le_nr, sizeof le_nr);
}

/* The first bit in [from, end) that is set (flip 0) or clear (flip ~0), or end. */
static uint64_t find(const uint64_t *words, uint64_t from, uint64_t end, uint64_t flip)
{
	while (from < end) {
		uint64_t word = (words[from / 64] ^ flip) >> from % 64;

		if (word) {
			uint64_t found = from + (uint64_t)__builtin_ctzll(word);

			return found < end ? found : end;
		}
		from = (from / 64 + 1) * 64;
	}
	return end;
}

uint64_t page_runs_make(const uint64_t *words, uint64_t nr_words, uint64_t from, uint64_t max_pages, uint8_t *runs_out,
                        uint64_t *next_out)
{
	uint64_t end = 64 * nr_words, nr_runs = 0;

	while (max_pages && (from = find(words, from, end, 0)) < end) {
		uint64_t stop = end - from > max_pages ? from + max_pages : end;
		uint64_t run_end = find(words, from, stop, ~(uint64_t)0);

		put_run(runs_out, nr_runs++, from, run_end - from);
		max_pages -= run_end - from;
		from = run_end;
	}
	*next_out = find(words, from, end, 0);
	return nr_runs;
}

int64_t page_runs_check(const uint8_t *runs, uint64_t nr_runs, uint64_t nr_pages)
{
	uint64_t end = 0, total = 0;

	for (uint64_t no = 0; no < nr_runs; no++) {
		struct page_run run = page_run_at(runs, no);

		if (!run.nr || run.first < end || run.first >= nr_pages || run.nr > nr_pages - run.first)
			return -EINVAL;
		end = run.first + run.nr;
		total += run.nr;
	}
	return (int64_t)total;
}
