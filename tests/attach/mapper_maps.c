/* SPDX-License-Identifier: Apache-2.0 */
/* Cases of one process: mmap with its flags, munmap, mremap, mprotect, madvise, open, close. */
#define _GNU_SOURCE
#include "mapper.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#ifndef MAP_GROWSDOWN
#define MAP_GROWSDOWN 0x100
#endif

static char *reserve(size_t nr_pages)
{
	char *at = mmap(NULL, nr_pages * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(at != MAP_FAILED);
	return at;
}

static void whole(void)
{
	char *at = map_pages(0, image_pages, PROT_READ, MAP_PRIVATE);

	CHECK(is_image(at, 0, image_pages));
	CHECK(munmap(at, image_bytes) == 0); /* the end is rounded up */
	CHECK(signal_of(at, 0) == SIGSEGV);
}

static void parts(void)
{
	char *third = map_pages(3, 20, PROT_READ, MAP_PRIVATE);
	char *last = map_pages(image_pages - 1, 1, PROT_READ, MAP_PRIVATE);
	char *again = map_pages(3, 20, PROT_READ | PROT_WRITE, MAP_PRIVATE);

	CHECK(is_image(third, 3, 20) && is_image(last, image_pages - 1, 1) && is_image(again, 3, 20));
	/* Two mappings of the same pages have copies of their own. */
	memset(again, 'x', PAGE);
	CHECK(is_image(third, 3, 20) && is_byte(again, PAGE, 'x') && is_image(again + PAGE, 4, 19));
	CHECK(munmap(third, 20 * PAGE) == 0);
	CHECK(is_byte(again, PAGE, 'x') && is_image(again + PAGE, 4, 19));
}

static void past_the_end(void)
{
	char *at = map_pages(image_pages - 2, 5, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	char *beyond = map_pages(image_pages + 4, 1, PROT_READ, MAP_PRIVATE);

	CHECK(is_image(at, image_pages - 2, 2));
	CHECK(signal_of(at + 2 * PAGE, 0) == SIGBUS && signal_of(at + 4 * PAGE, 1) == SIGBUS);
	CHECK(signal_of(beyond, 0) == SIGBUS);
	CHECK(munmap(at, 5 * PAGE) == 0 && signal_of(at + 2 * PAGE, 0) == SIGSEGV);
}

static void fixed(void)
{
	char *at = reserve(64);

	CHECK(mmap(at + 8 * PAGE, 16 * PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, image_fd, 0) == at + 8 * PAGE);
	CHECK(is_image(at + 8 * PAGE, 0, 16));
	CHECK(signal_of(at + 7 * PAGE, 0) == SIGSEGV && signal_of(at + 24 * PAGE, 0) == SIGSEGV);
	CHECK(mmap(at, PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED_NOREPLACE, image_fd, 0) == MAP_FAILED &&
	      errno == EEXIST);
	CHECK(munmap(at, PAGE) == 0);
	CHECK(mmap(at, PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED_NOREPLACE, image_fd, 0) == at);
	CHECK(is_image(at, 0, 1));
}

static void fixed_over_guest(void)
{
	char *at = map_pages(0, 32, PROT_READ | PROT_WRITE, MAP_PRIVATE);

	at[0] = at[31 * PAGE] = at[9 * PAGE] = 'p';
	/* Ordinary memory in the middle, then other pages of the image over some of both. */
	CHECK(mmap(at + 8 * PAGE, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS, -1, 0) ==
	      at + 8 * PAGE);
	CHECK(is_byte(at + 8 * PAGE, 8 * PAGE, 0));
	CHECK(at[0] == 'p' && is_image(at + PAGE, 1, 7) && is_image(at + 16 * PAGE, 16, 15));
	CHECK(mmap(at + 12 * PAGE, 8 * PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED, image_fd, (off_t)(40 * PAGE)) ==
	      at + 12 * PAGE);
	CHECK(is_image(at + 12 * PAGE, 40, 8) && is_byte(at + 8 * PAGE, 4 * PAGE, 0));
	CHECK(is_image(at + 20 * PAGE, 20, 11) && at[31 * PAGE] == 'p');
	/* Over all of it. */
	CHECK(mmap(at, 32 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED, image_fd, 0) == at);
	CHECK(is_image(at, 0, 32));
	CHECK(mmap(at, 32 * PAGE, PROT_READ, MAP_PRIVATE | MAP_FIXED | MAP_ANONYMOUS, -1, 0) == at);
	CHECK(is_byte(at, 32 * PAGE, 0));
}

static void shared(void)
{
	char *at = map_pages(0, 8, PROT_READ, MAP_SHARED);

	CHECK(is_image(at, 0, 8));
	CHECK(mprotect(at, PAGE, PROT_READ | PROT_WRITE) < 0 && errno == EACCES);
	CHECK(mprotect(at, PAGE, PROT_READ) == 0 && is_image(at, 0, 8));
	CHECK(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, image_fd, 0) == MAP_FAILED && errno == EACCES);
}

static void wrong_flags(void)
{
	const int wrong[] = {MAP_PRIVATE | MAP_HUGETLB, MAP_SHARED_VALIDATE | MAP_SYNC, MAP_PRIVATE | MAP_GROWSDOWN};

	for (size_t i = 0; i < 3; i++)
		CHECK(mmap(NULL, PAGE, PROT_READ, wrong[i], image_fd, 0) == MAP_FAILED && errno == EOPNOTSUPP);
	CHECK(mmap(NULL, PAGE, PROT_READ, 0, image_fd, 0) == MAP_FAILED && errno == EINVAL);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, image_fd, 5) == MAP_FAILED && errno == EINVAL);
	CHECK(mmap(NULL, 0, PROT_READ, MAP_PRIVATE, image_fd, 0) == MAP_FAILED && errno == EINVAL);
	CHECK(mmap(NULL, SIZE_MAX - PAGE, PROT_READ, MAP_PRIVATE, image_fd, 0) == MAP_FAILED);
	CHECK(is_image(map_pages(0, 8, PROT_READ, MAP_PRIVATE), 0, 8));
}

static void populated(void)
{
	char *at = map_pages(0, 32, PROT_READ, MAP_PRIVATE | MAP_POPULATE);
	unsigned char there[32];

	CHECK(mincore(at, 32 * PAGE, there) == 0 && is_image(at, 0, 32));
	at = map_pages(0, 4, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_LOCKED);
	CHECK(is_image(at, 0, 4));
}

static void locked_in_advance(void)
{
	char *at;

	CHECK(mlockall(MCL_CURRENT | MCL_FUTURE) == 0);
	at = map_pages(0, 64, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	CHECK(is_image(at, 0, 64));
	at[5] = 'p';
	CHECK(at[5] == 'p' && is_image(at + PAGE, 1, 63));
}

static void unmap_parts(void)
{
	char *at = map_pages(0, 32, PROT_READ | PROT_WRITE, MAP_PRIVATE);

	at[0] = at[20 * PAGE] = at[31 * PAGE] = 'p';
	CHECK(munmap(at + 8 * PAGE, 8 * PAGE) == 0);
	CHECK(signal_of(at + 8 * PAGE, 0) == SIGSEGV && signal_of(at + 15 * PAGE, 0) == SIGSEGV);
	CHECK(is_image(at + PAGE, 1, 7) && is_image(at + 16 * PAGE, 16, 4) && at[20 * PAGE] == 'p');
	/* From before the first part to the middle of the second. */
	CHECK(munmap(at, 20 * PAGE) == 0);
	CHECK(at[20 * PAGE] == 'p' && is_image(at + 21 * PAGE, 21, 10));
	CHECK(munmap(at + 20 * PAGE, 12 * PAGE) == 0);
	CHECK(signal_of(at + 31 * PAGE, 0) == SIGSEGV);
	at = map_pages(0, 32, PROT_READ, MAP_PRIVATE);
	CHECK(is_image(at, 0, 32));
}

static void move(void)
{
	char *at = map_pages(2, 16, PROT_READ | PROT_WRITE, MAP_PRIVATE), *target = reserve(64), *moved;

	at[3 * PAGE] = 'p';
	moved = mremap(at, 16 * PAGE, 16 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target);
	CHECK(moved == target && signal_of(at, 0) == SIGSEGV);
	CHECK(is_image(moved, 2, 3) && moved[3 * PAGE] == 'p' && is_image(moved + 4 * PAGE, 6, 12));
	moved[5 * PAGE] = 'q';
	CHECK(moved[5 * PAGE] == 'q' && is_image(moved + 6 * PAGE, 8, 10));
	/* A part, out of the middle. */
	CHECK(mremap(moved + 4 * PAGE, 4 * PAGE, 4 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target + 40 * PAGE) ==
	      target + 40 * PAGE);
	CHECK(is_image(target + 40 * PAGE, 6, 1) && target[41 * PAGE] == 'q');
	CHECK(is_image(target + 42 * PAGE, 8, 2) && signal_of(moved + 4 * PAGE, 0) == SIGSEGV);
	CHECK(moved[3 * PAGE] == 'p' && is_image(moved + 8 * PAGE, 10, 8));
	CHECK(munmap(target, 64 * PAGE) == 0);
}

static void grow(void)
{
	char *space = reserve(200), *at = space + 16 * PAGE, *moved;

	CHECK(munmap(at, 100 * PAGE) == 0);
	at = mmap(at, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_FIXED_NOREPLACE, image_fd, (off_t)(4 * PAGE));
	CHECK(at == space + 16 * PAGE);
	at[PAGE] = 'p';
	CHECK(mremap(at, 8 * PAGE, 24 * PAGE, 0) == at); /* there is room */
	CHECK(is_image(at, 4, 1) && at[PAGE] == 'p' && is_image(at + 2 * PAGE, 6, 22));
	CHECK(mremap(at, 24 * PAGE, 20 * PAGE, 0) == at);
	CHECK(is_image(at + 8 * PAGE, 12, 12) && signal_of(at + 20 * PAGE, 0) == SIGSEGV);
	/* What grew moves as one, and only what is one. */
	at[9 * PAGE] = 'q';
	moved = mremap(at, 20 * PAGE, 20 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at + 50 * PAGE);
	CHECK(moved == at + 50 * PAGE && signal_of(at, 0) == SIGSEGV && signal_of(at + 19 * PAGE, 0) == SIGSEGV);
	CHECK(is_image(moved, 4, 1) && moved[PAGE] == 'p' && is_image(moved + 2 * PAGE, 6, 7));
	CHECK(moved[9 * PAGE] == 'q' && is_image(moved + 10 * PAGE, 14, 10));
	CHECK(munmap(moved + 3 * PAGE, PAGE) == 0);
	CHECK(mremap(moved, 20 * PAGE, 20 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, at) == MAP_FAILED && errno == EFAULT);
	at = map_pages(4, 8, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	CHECK(mmap(at + 8 * PAGE, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0) ==
	              at + 8 * PAGE ||
	      errno == EEXIST);
	at[PAGE] = 'p';
	CHECK(mremap(at, 8 * PAGE, 16 * PAGE, 0) == MAP_FAILED && errno == ENOMEM);
	moved = mremap(at, 8 * PAGE, 16 * PAGE, MREMAP_MAYMOVE);
	CHECK(moved != MAP_FAILED && moved != at && signal_of(at, 0) == SIGSEGV);
	CHECK(is_image(moved, 4, 1) && moved[PAGE] == 'p' && is_image(moved + 2 * PAGE, 6, 14));
	/* Past the end of the image. */
	at = map_pages(image_pages - 2, 2, PROT_READ, MAP_PRIVATE);
	moved = mremap(at, 2 * PAGE, 6 * PAGE, MREMAP_MAYMOVE);
	CHECK(moved != MAP_FAILED && is_image(moved, image_pages - 2, 2));
	CHECK(signal_of(moved + 2 * PAGE, 0) == SIGBUS);
}

static void advise(void)
{
	char *at = map_pages(0, 16, PROT_READ | PROT_WRITE, MAP_PRIVATE);

	at[0] = at[PAGE] = 'p';
	CHECK(madvise(at, PAGE, MADV_DONTNEED) == 0 && is_image(at, 0, 1) && at[PAGE] == 'p');
	CHECK(madvise(at, 16 * PAGE, MADV_HUGEPAGE) == 0 && madvise(at, 16 * PAGE, MADV_RANDOM) == 0);
	CHECK(madvise(at, 16 * PAGE, MADV_WIPEONFORK) < 0);
	CHECK(mprotect(at, 16 * PAGE, PROT_NONE) == 0 && signal_of(at, 0) == SIGSEGV);
	CHECK(mprotect(at, 16 * PAGE, PROT_READ) == 0 && at[PAGE] == 'p' && is_image(at + 2 * PAGE, 2, 14));
	CHECK(signal_of(at, 1) == SIGSEGV);
}

static void many(void)
{
	char *at[300];
	size_t nr = 0;

	for (; nr < 300; nr++) {
		at[nr] = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, image_fd, (off_t)(nr % image_pages * PAGE));
		if (at[nr] == MAP_FAILED)
			break;
	}
	CHECK(nr == 256 && errno == ENOMEM);
	for (size_t i = 0; i < nr; i++) {
		CHECK(is_image(at[i], i % image_pages, 1));
		CHECK(munmap(at[i], PAGE) == 0);
	}
	CHECK(is_image(map_pages(0, 4, PROT_READ, MAP_PRIVATE), 0, 4));
}

static void writers(void)
{
	int fd = open(image_path, O_RDWR | O_CREAT, 0600);
	FILE *file;

	CHECK(fd >= 0 && pwrite(fd, "x", 1, 0) < 0 && errno == EBADF);
	CHECK(is_image(mmap(NULL, 8 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0), 0, 8));
	CHECK(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0) == MAP_FAILED && errno == EACCES);
	CHECK(open(image_path, O_WRONLY) < 0 && errno == EROFS);
	CHECK(openat(AT_FDCWD, image_path, O_RDWR | O_TRUNC) < 0 && errno == EROFS);
	CHECK(creat(image_path, 0600) < 0 && errno == EROFS);
	CHECK(fopen(image_path, "w") == NULL && errno == EROFS);
	file = fopen(image_path, "r+");
	CHECK(file && fputc('x', file) == EOF && errno == EBADF);
}

static void close_all(void)
{
	char *at = map_pages(0, image_pages, PROT_READ | PROT_WRITE, MAP_PRIVATE);

	at[0] = 'p';
	for (int fd = 3; fd < 4096; fd++)
		close(fd);
	CHECK(is_image(at + PAGE, 1, 20));
	CHECK(close_range(3, ~0U, 0) == 0);
	closefrom(3);
	CHECK(is_image(at + 21 * PAGE, 21, 20));
	for (int fd = 3; fd < 1020; fd++)
		CHECK(dup2(2, fd) == fd);
	CHECK(at[0] == 'p' && is_image(at + PAGE, 1, image_pages - 1));
	for (int fd = 3; fd < 1020; fd++)
		CHECK(close(fd) == 0);
	CHECK(munmap(at, image_bytes) == 0);
}

const struct test_case map_cases[] = {
	{"whole", whole},
	{"parts", parts},
	{"past_the_end", past_the_end},
	{"fixed", fixed},
	{"fixed_over_guest", fixed_over_guest},
	{"shared", shared},
	{"wrong_flags", wrong_flags},
	{"populated", populated},
	{"locked_in_advance", locked_in_advance},
	{"unmap_parts", unmap_parts},
	{"move", move},
	{"grow", grow},
	{"advise", advise},
	{"many", many},
	{"writers", writers},
	{"close_all", close_all},
	{NULL, NULL},
};
