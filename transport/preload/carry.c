/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Copies private pages from one mapping to another, without a backend, since they are this process's own memory.  The
 * page tables say which pages are private: those present or in swap, and of no file.  An entry that is not present may
 * also be a marker, left where a protected page was punched, or of a poisoned page.  /proc/self/mem tells them apart:
 * it ignores protections, never asks a backend, and fails on a marker (EIO).
 *
 * During the copy no page may change or become private.  A page that is open for writing is written without a fault, so
 * carry_freeze first protects all pages that are mapped and not protected; by then no backend serves them, and open
 * regions are guarded for all faults again.  It leaves unmapped pages alone, for protecting them would leave a marker
 * in each.
 */
#define _GNU_SOURCE
#include "transport/preload/carry.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

#include "cache/core/abi.h"
#include "transport/core/guest/guard.h"
#include "transport/preload/real.h"

#define NR_SCANNED 512
#define COPIED_BYTES (256u << 10)

/* The kernel's list of mappings, a line at a time. */
struct maps {
	int fd;
	size_t length, at; /* of text */
	char text[8192];
};

struct map {
	uintptr_t start, end;
	uint64_t offset_bytes;
	struct frames frames;
	int prot;
};

static struct maps maps; /* threads may have small stacks */

static int maps_open(void)
{
	maps = (struct maps){.fd = (int)real_openat(AT_FDCWD, "/proc/self/maps", O_RDONLY | O_CLOEXEC, 0)};
	return maps.fd < 0 ? -errno : 0;
}

/* Returns the next line, good until the next call; NULL at the end. */
static const char *maps_line(void)
{
	char *line, *end;
	ssize_t got;

	while (!(end = memchr(maps.text + maps.at, '\n', maps.length - maps.at))) {
		memmove(maps.text, maps.text + maps.at, maps.length - maps.at);
		maps.length -= maps.at;
		maps.at = 0;
		got = read(maps.fd, maps.text + maps.length, sizeof(maps.text) - maps.length);
		if (got < 0 && errno == EINTR)
			continue;
		if (got <= 0)
			return NULL;
		maps.length += (size_t)got;
	}
	line = maps.text + maps.at;
	*end = '\0';
	maps.at = (size_t)(end + 1 - maps.text);
	return line;
}

static bool maps_next(struct map *map_out)
{
	unsigned long start, end, offset_bytes, inode;
	unsigned major_no, minor_no;
	const char *line;
	char may[5];

	while ((line = maps_line())) {
		if (sscanf(line, "%lx-%lx %4s %lx %x:%x %lu", &start, &end, may, &offset_bytes, &major_no, &minor_no,
		           &inode) != 7)
			continue;
		*map_out = (struct map){
			.start = start,
			.end = end,
			.offset_bytes = offset_bytes,
			.frames = {makedev(major_no, minor_no), inode},
			.prot = (may[0] == 'r' ? PROT_READ : 0) | (may[1] == 'w' ? PROT_WRITE : 0) |
			        (may[2] == 'x' ? PROT_EXEC : 0),
		};
		return true;
	}
	return false;
}

static bool is_of(const struct map *map, struct frames frames)
{
	return map->frames.device == frames.device && map->frames.inode == frames.inode;
}

int carry_areas(const struct range *range, struct area areas_out[static CARRY_MAX_AREAS])
{
	int nr = 0, err = maps_open();
	struct map map;

	if (err < 0)
		return err;
	while (nr >= 0 && maps_next(&map)) {
		struct area area = {
			.start = map.start > range->start ? map.start : range->start,
			.end = map.end < range->end ? map.end : range->end,
			.prot = map.prot,
		};

		if (area.start >= area.end || !is_of(&map, range->frames) ||
		    map.offset_bytes + (area.start - map.start) != range->offset_bytes + (area.start - range->start))
			continue;
		if (nr == CARRY_MAX_AREAS)
			nr = -E2BIG;
		else
			areas_out[nr++] = area;
	}
	real_close(maps.fd);
	return nr;
}

bool carry_is_any(uintptr_t start, uintptr_t end, struct frames frames)
{
	bool is_any = false;
	struct map map;

	if (maps_open() < 0)
		return false;
	while (!is_any && maps_next(&map))
		is_any = map.start < end && map.end > start && is_of(&map, frames);
	real_close(maps.fd);
	return is_any;
}

static struct page_region scanned[NR_SCANNED];

/* Fills scanned with the next runs of pages of the wanted categories; returns how many, and where the scan ended. */
static int scan(int pagemap_fd, uintptr_t start, uintptr_t end, uint64_t inverted, uint64_t wanted, uintptr_t *end_out)
{
	struct pm_scan_arg order = {
		.size = sizeof(order),
		.start = start,
		.end = end,
		.vec = (uintptr_t)scanned,
		.vec_len = NR_SCANNED,
		.category_inverted = inverted,
		.category_mask = wanted,
		.category_anyof_mask = PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
		.return_mask = PAGE_IS_PRESENT,
	};
	int nr = ioctl(pagemap_fd, PAGEMAP_SCAN, &order);

	if (nr < 0)
		return -errno;
	*end_out = order.walk_end > start ? order.walk_end : end;
	return nr;
}

static int open_self(const char *path)
{
	int fd = (int)real_openat(AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);

	return fd < 0 ? -errno : fd;
}

int carry_check(void)
{
	int pagemap_fd = open_self("/proc/self/pagemap"), mem_fd = open_self("/proc/self/mem");

	if (pagemap_fd >= 0)
		real_close(pagemap_fd);
	if (mem_fd >= 0)
		real_close(mem_fd);
	return pagemap_fd < 0 ? pagemap_fd : mem_fd < 0 ? mem_fd : 0;
}

/* The kernel refuses this (EAGAIN) until the event of a call that the program is in has been read. */
static int protect(int uffd, const struct page_region *run)
{
	struct uffdio_writeprotect order = {
		.range = {.start = run->start, .len = run->end - run->start},
		.mode = UFFDIO_WRITEPROTECT_MODE_WP,
	};
	struct uffd_msg messages[16];

	while (ioctl(uffd, UFFDIO_WRITEPROTECT, &order) < 0) {
		if (errno != EAGAIN)
			return -errno;
		if (read(uffd, messages, sizeof(messages)) < 0 && errno == EAGAIN)
			nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
	}
	return 0;
}

int carry_freeze(int uffd, const struct area *area)
{
	int pagemap_fd = open_self("/proc/self/pagemap");
	int err = pagemap_fd < 0 ? pagemap_fd : 0;

	/* The backend may have left regions open, where the kernel makes pages private by itself. */
	if (err == 0)
		err = guard_range(uffd, (void *)area->start, area->end - area->start);
	for (uintptr_t at = area->start; err == 0 && at < area->end;) {
		int nr = scan(pagemap_fd, at, area->end, 0, PAGE_IS_WRITTEN, &at);

		err = nr < 0 ? nr : 0;
		for (int i = 0; err == 0 && i < nr; i++)
			err = protect(uffd, &scanned[i]);
	}
	if (pagemap_fd >= 0)
		real_close(pagemap_fd);
	return err;
}

static int copy_to(int to_uffd, uintptr_t to, const char *from, uint64_t nr_bytes)
{
	struct uffdio_copy order = {.dst = to, .src = (uintptr_t)from, .len = nr_bytes};

	while (order.len > 0 && ioctl(to_uffd, UFFDIO_COPY, &order) < 0) {
		if (order.copy <= 0)
			return -errno;
		order.dst += (uint64_t)order.copy;
		order.src += (uint64_t)order.copy;
		order.len -= (uint64_t)order.copy;
	}
	return 0;
}

/* Pages that are not present may be markers, so those are read one at a time. */
static int copy_run(int mem_fd, const struct page_region *run, int to_uffd, uintptr_t to)
{
	static char copied[COPIED_BYTES] __attribute__((aligned(PAGE_BYTES)));
	bool is_present = run->categories & PAGE_IS_PRESENT;
	uint64_t most = is_present ? sizeof(copied) : PAGE_BYTES;
	int err = 0;

	for (uint64_t at = run->start; err == 0 && at < run->end; at += most) {
		uint64_t nr_bytes = run->end - at < most ? run->end - at : most;
		ssize_t got = pread(mem_fd, copied, nr_bytes, (off_t)at);

		if (got < 0 && errno == EIO && !is_present)
			continue;
		if (got != (ssize_t)nr_bytes)
			err = got < 0 ? -errno : -EIO;
		else
			err = copy_to(to_uffd, to + (at - run->start), copied, nr_bytes);
	}
	return err;
}

int carry_private(const struct area *area, int to_uffd, uintptr_t to)
{
	int pagemap_fd = open_self("/proc/self/pagemap"), mem_fd = open_self("/proc/self/mem");
	int err = pagemap_fd < 0 ? pagemap_fd : mem_fd < 0 ? mem_fd : 0;

	for (uintptr_t at = area->start; err == 0 && at < area->end;) {
		int nr = scan(pagemap_fd, at, area->end, PAGE_IS_FILE, PAGE_IS_FILE, &at);

		err = nr < 0 ? nr : 0;
		for (int i = 0; err == 0 && i < nr; i++)
			err = copy_run(mem_fd, &scanned[i], to_uffd, to + (scanned[i].start - area->start));
	}
	if (pagemap_fd >= 0)
		real_close(pagemap_fd);
	if (mem_fd >= 0)
		real_close(mem_fd);
	return err;
}

/* Moves the inherited areas away.  No other thread runs, and nothing guards the areas, so this raises no event. */
static int put_aside(const struct range *range, uintptr_t aside, const struct area *areas, int nr)
{
	for (int i = 0; i < nr; i++) {
		size_t nr_bytes = areas[i].end - areas[i].start;

		if (real_mremap((void *)areas[i].start, nr_bytes, nr_bytes, MREMAP_MAYMOVE | MREMAP_FIXED,
		                (void *)(aside + (areas[i].start - range->start))) == MAP_FAILED)
			return -errno;
	}
	return 0;
}

static int fill_place(const struct leave *leave, const struct range *range, uintptr_t aside, const struct area *areas,
                      int nr)
{
	size_t nr_bytes = range->end - range->start;
	void *place = (void *)range->start;
	int err = 0;

	if (real_mmap(place, nr_bytes, PROT_NONE, MAP_PRIVATE | MAP_NORESERVE | MAP_FIXED, leave->memfd,
	              (off_t)range->offset_bytes) == MAP_FAILED ||
	    real_madvise(place, nr_bytes, MADV_DONTFORK) < 0)
		return -errno;
	err = guard_range(leave->uffd, place, nr_bytes);
	for (int i = 0; err == 0 && i < nr; i++) {
		uintptr_t from = aside + (areas[i].start - range->start);
		struct area moved = {from, from + (areas[i].end - areas[i].start), areas[i].prot};

		err = carry_private(&moved, leave->uffd, areas[i].start);
	}
	for (int i = 0; err == 0 && i < nr; i++)
		if (real_mprotect((void *)areas[i].start, areas[i].end - areas[i].start, areas[i].prot) < 0)
			err = -errno;
	return err;
}

int carry_inherited(const struct leave *leave, struct range *range)
{
	static struct area areas[CARRY_MAX_AREAS];
	size_t nr_bytes = range->end - range->start;
	int nr = carry_areas(range, areas), err;
	void *aside;

	if (nr < 0)
		return nr;
	aside = real_mmap(NULL, nr_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (aside == MAP_FAILED)
		return -errno;
	err = put_aside(range, (uintptr_t)aside, areas, nr);
	if (err == 0)
		err = fill_place(leave, range, (uintptr_t)aside, areas, nr);
	real_munmap(aside, nr_bytes);
	range->frames = leave->frames;
	return err;
}
