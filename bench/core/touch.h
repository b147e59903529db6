/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The timed loops of the benchmarks: over mapped pages, over a file and over a pipe.  They are in C so that no
 * interpreter's loop is measured, and the same code runs for guests and peers.
 */
#ifndef COWSHED_BENCH_TOUCH_H
#define COWSHED_BENCH_TOUCH_H

#include <stdint.h>

/* cdef-begin */
#define TOUCH_READ 0  /* one byte of a page */
#define TOUCH_COPY 1  /* the whole page, into a buffer that stays in the CPU's cache */
#define TOUCH_WRITE 2 /* one byte of a page */

struct touch_cost {
	uint64_t wall_ns;
	uint64_t cpu_ns; /* this and the following: of the calling thread */
	uint64_t minor_faults, major_faults;
	uint64_t switches_voluntary, switches_forced;
};

/* Touches nr pages of 4096 bytes, numbered from base, in the given order.  Before that, and inside the timed part, it
 * passes advice, unless 0, to madvise for the first map_bytes.  -errno if that fails. */
int touch_pages(char *base, const uint32_t *pages, uint64_t nr, int how, uint64_t map_bytes, int advice,
                struct touch_cost *cost_out);
/* Reads one byte of each page and times each alone; includes one clock_gettime. */
int touch_each(char *base, const uint32_t *pages, uint64_t nr, uint32_t *each_ns_out);
/* Reads a file front to back by pread into a buffer of chunk_bytes, aligned for O_DIRECT. */
int touch_file(int fd, uint64_t size_bytes, uint64_t chunk_bytes, struct touch_cost *cost_out);
/* Sends a byte and waits for it to come back, nr times, each timed as in touch_each. */
int touch_ping(int to_fd, int from_fd, uint64_t nr, uint32_t *each_ns_out);
/* The other end: sends back each byte until the peer closes. */
int touch_pong(int from_fd, int to_fd);
/* Returns how many pages of a file are in the page cache. */
int64_t touch_cached_pages(int fd, uint64_t size_bytes);
/* Returns the cost of one reading of the clock. */
uint32_t touch_clock_ns(void);
/* cdef-end */

#endif
