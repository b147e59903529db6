/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest that never rests: it touches one page after the other at a steady pace, and records its stalls.  The records
 * are in memory shared with the measuring process, which numbers spans of time there, so that the two exchange no
 * messages during a measurement.
 */
#ifndef COWSHED_BENCH_STEADY_H
#define COWSHED_BENCH_STEADY_H

#include <stdint.h>

/* cdef-begin */
#define STEADY_SPANS 256

/* The measuring process writes it, but for nr_ready. */
struct steady_order {
	uint32_t stop;
	uint32_t span; /* the number of the current span, below STEADY_SPANS */
	uint32_t nr_ready;
	uint32_t unused;
};

/* One guest alone writes it.  A stall is the time between two accesses, less the pace; a stall over several spans
 * counts in each. */
struct steady_guest {
	uint64_t nr_made;
	uint64_t nr_failed; /* SIGBUS, an error, or a wrong byte */
	uint64_t nr_in[STEADY_SPANS];
	uint64_t longest_ns[STEADY_SPANS];
};

/* Records an access that was done, and returns the time from which the next one counts. */
uint64_t steady_note(const struct steady_order *order, struct steady_guest *guest, uint32_t *span, uint64_t before_ns,
                     uint64_t pace_ns, uint32_t failed);
/* Touches pages in the given order until stop; each page begins with its number.  An access is a read, which checks the
 * number, or, one in write_every (0: none), a first write, which puts the number's complement there.  After the last
 * page all are discarded and it begins anew.  With hot_pages, writes cycle over that many first pages of the order
 * instead, and nothing is discarded.  The first kept_pages, no fewer than hot_pages, are not read. */
int steady_run(char *base, const uint32_t *pages, uint64_t nr, uint64_t pace_ns, uint32_t write_every,
               uint32_t hot_pages, uint32_t kept_pages, uint64_t map_bytes, const struct steady_order *order,
               struct steady_guest *guest);
/* Adds one to the number of ready guests. */
void steady_ready(struct steady_order *order);
/* Makes the kernel kill this process when the thread that forked it ends. */
int steady_die_with_parent(void);
/* cdef-end */

#endif
