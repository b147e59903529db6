/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "bench/core/touch.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#define PAGE_BYTES 4096u
#define COPY_PAGES 32u /* 128 KiB: fits a second-level cache */

static uint64_t read_clock(clockid_t clock)
{
	struct timespec now;

	clock_gettime(clock, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

static uint64_t clock_ns(void)
{
	return read_clock(CLOCK_MONOTONIC);
}

/* Two calls, with sign -1 and +1, leave the difference. */
static void cost_add(struct touch_cost *cost, int sign)
{
	struct rusage usage;
	uint64_t by = (uint64_t)(int64_t)sign;

	if (sign > 0)
		cost->wall_ns += clock_ns();
	getrusage(RUSAGE_THREAD, &usage);
	cost->cpu_ns += by * read_clock(CLOCK_THREAD_CPUTIME_ID); /* rusage counts in ticks */
	cost->minor_faults += by * (uint64_t)usage.ru_minflt;
	cost->major_faults += by * (uint64_t)usage.ru_majflt;
	cost->switches_voluntary += by * (uint64_t)usage.ru_nvcsw;
	cost->switches_forced += by * (uint64_t)usage.ru_nivcsw;
	if (sign < 0)
		cost->wall_ns -= clock_ns();
}

static void pages_read(const char *base, const uint32_t *pages, uint64_t nr)
{
	for (uint64_t i = 0; i < nr; i++)
		(void)*(const volatile char *)(base + (uint64_t)pages[i] * PAGE_BYTES);
}

static void pages_write(char *base, const uint32_t *pages, uint64_t nr)
{
	for (uint64_t i = 0; i < nr; i++)
		*(volatile char *)(base + (uint64_t)pages[i] * PAGE_BYTES) = (char)i;
}

static void pages_copy(const char *base, const uint32_t *pages, uint64_t nr, char *to)
{
	for (uint64_t i = 0; i < nr; i++) {
		char *here = to + i % COPY_PAGES * PAGE_BYTES;

		memcpy(here, base + (uint64_t)pages[i] * PAGE_BYTES, PAGE_BYTES);
		__asm__ volatile("" : : "r"(here) : "memory");
	}
}

int touch_pages(char *base, const uint32_t *pages, uint64_t nr, int how, uint64_t map_bytes, int advice,
                struct touch_cost *cost_out)
{
	struct touch_cost cost = {0};
	char *to = aligned_alloc(PAGE_BYTES, COPY_PAGES * PAGE_BYTES);
	int err = 0;

	if (!to)
		return -ENOMEM;
	memset(to, 1, COPY_PAGES * PAGE_BYTES);
	cost_add(&cost, -1);
	if (advice && madvise(base, map_bytes, advice) < 0)
		err = -errno;
	if (how == TOUCH_READ)
		pages_read(base, pages, nr);
	else if (how == TOUCH_COPY)
		pages_copy(base, pages, nr, to);
	else
		pages_write(base, pages, nr);
	cost_add(&cost, 1);
	free(to);
	if (!err)
		*cost_out = cost;
	return err;
}

int touch_each(char *base, const uint32_t *pages, uint64_t nr, uint32_t *each_ns_out)
{
	uint64_t before = clock_ns();

	for (uint64_t i = 0; i < nr; i++) {
		pages_read(base, pages + i, 1);
		uint64_t now = clock_ns();

		each_ns_out[i] = (uint32_t)(now - before);
		before = now;
	}
	return 0;
}

int touch_file(int fd, uint64_t size_bytes, uint64_t chunk_bytes, struct touch_cost *cost_out)
{
	struct touch_cost cost = {0};
	char *to = aligned_alloc(PAGE_BYTES, chunk_bytes);
	int err = 0;

	if (!to)
		return -ENOMEM;
	memset(to, 1, chunk_bytes);
	cost_add(&cost, -1);
	for (uint64_t done = 0; done < size_bytes && !err;) {
		ssize_t got = pread(fd, to, chunk_bytes, (off_t)done);

		if (got > 0)
			done += (uint64_t)got;
		else
			err = got ? -errno : -ENODATA;
	}
	cost_add(&cost, 1);
	free(to);
	if (!err)
		*cost_out = cost;
	return err;
}

int touch_ping(int to_fd, int from_fd, uint64_t nr, uint32_t *each_ns_out)
{
	char byte = 1;
	uint64_t before = clock_ns();

	for (uint64_t i = 0; i < nr; i++) {
		if (write(to_fd, &byte, 1) != 1 || read(from_fd, &byte, 1) != 1)
			return -EPIPE;
		uint64_t now = clock_ns();

		each_ns_out[i] = (uint32_t)(now - before);
		before = now;
	}
	return 0;
}

int touch_pong(int from_fd, int to_fd)
{
	char byte;

	while (read(from_fd, &byte, 1) == 1)
		if (write(to_fd, &byte, 1) != 1)
			return -EPIPE;
	return 0;
}

int64_t touch_cached_pages(int fd, uint64_t size_bytes)
{
	uint64_t nr_pages = (size_bytes + PAGE_BYTES - 1) / PAGE_BYTES;
	unsigned char *seen = malloc(nr_pages);
	void *base = mmap(NULL, size_bytes, PROT_READ, MAP_SHARED, fd, 0);
	int64_t nr = -ENOMEM;

	if (seen && base != MAP_FAILED && mincore(base, size_bytes, seen) == 0) {
		nr = 0;
		for (uint64_t i = 0; i < nr_pages; i++)
			nr += seen[i] & 1;
	}
	if (base != MAP_FAILED)
		munmap(base, size_bytes);
	free(seen);
	return nr;
}

uint32_t touch_clock_ns(void)
{
	uint64_t begin = clock_ns();

	for (int i = 0; i < 999; i++)
		clock_ns();
	return (uint32_t)((clock_ns() - begin) / 1000);
}
