/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest that never rests: it touches one page after the other at a steady pace, and notes how long it was kept from
 * going on.  What it notes lies in memory shared with who measures, who names spans of time by numbers, so that neither
 * has to speak to the other while something is measured.
 */
#ifndef COWSHED_BENCH_STEADY_H
#define COWSHED_BENCH_STEADY_H

#include <stdint.h>

/* cdef-begin */
#define STEADY_SPANS 256

/* Written by who measures, but for nr_ready. */
struct steady_order {
	uint32_t stop;
	uint32_t span; /* the number of the span that it is now, below STEADY_SPANS */
	uint32_t nr_ready;
	uint32_t unused;
};

/* Written by one guest alone.  A stall is the time between two accesses, less the pace; one that lasts over several
 * spans counts in each. */
struct steady_guest {
	uint64_t nr_made;
	uint64_t nr_failed; /* SIGBUS, an error, or a wrong byte */
	uint64_t nr_in[STEADY_SPANS];
	uint64_t longest_ns[STEADY_SPANS];
};

/* Notes an access that was done, and gives the time from which the next one counts. */
uint64_t steady_note(const struct steady_order *order, struct steady_guest *guest, uint32_t *span, uint64_t before_ns,
                     uint64_t pace_ns, uint32_t failed);
/* Touches pages in the order given, each page beginning with its number, until stop: a read, which looks at the number,
 * or, write_every accesses (0: never), a first write, which puts its complement there.  At their end all are given back
 * to the image and it begins anew.  With hot_pages, writes go round the first so many pages of the order instead, and
 * nothing is given back.  The first kept_pages, no fewer than hot_pages, are not read. */
int steady_run(char *base, const uint32_t *pages, uint64_t nr, uint64_t pace_ns, uint32_t write_every,
               uint32_t hot_pages, uint32_t kept_pages, uint64_t map_bytes, const struct steady_order *order,
               struct steady_guest *guest);
/* Counts one guest more as ready. */
void steady_ready(struct steady_order *order);
/* Has this process killed when the thread that forked it ends. */
int steady_die_with_parent(void);
/* cdef-end */

#endif
