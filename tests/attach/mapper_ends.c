/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Cases of mappings that are longer than the image, and grow, as TDB's and LMDB's do.  Each is right for an ordinary
 * file too: the test runs them with both.
 */
#define _GNU_SOURCE
#include "mapper.h"

#include <errno.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

/* So many pages from a place near the image's end on: some are the image's, the rest are past it. */
#define NR_INSIDE ((size_t)20)
#define NR_PAST ((size_t)12)
#define FIRST (image_pages - NR_INSIDE)

static char *map_beyond(int flags)
{
	return map_pages(FIRST, NR_INSIDE + NR_PAST, flags == MAP_SHARED ? PROT_READ : PROT_READ | PROT_WRITE, flags);
}

static void check_beyond(char *at, size_t nr_past)
{
	CHECK(is_image(at, FIRST, NR_INSIDE));
	for (size_t i = 0; i < nr_past; i += 3)
		CHECK(signal_of(at + (NR_INSIDE + i) * PAGE, 0) == SIGBUS);
}

static void grows(int flags)
{
	size_t nr_bytes = (NR_INSIDE + NR_PAST) * PAGE;
	char *at = map_beyond(flags), *moved;

	moved = mremap(at, nr_bytes, 2 * nr_bytes, MREMAP_MAYMOVE);
	CHECK(moved != MAP_FAILED);
	check_beyond(moved, NR_INSIDE + 2 * NR_PAST);
	/* Again, and where there is no room. */
	at = mmap(moved + 2 * nr_bytes, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	CHECK(at == moved + 2 * nr_bytes || errno == EEXIST);
	CHECK(mremap(moved, 2 * nr_bytes, 3 * nr_bytes, 0) == MAP_FAILED && errno == ENOMEM);
	at = mremap(moved, 2 * nr_bytes, 3 * nr_bytes, MREMAP_MAYMOVE);
	CHECK(at != MAP_FAILED && at != moved && signal_of(moved, 0) == SIGSEGV);
	check_beyond(at, NR_PAST);
	CHECK(signal_of(at + 3 * nr_bytes - PAGE, 0) == SIGBUS);
	/* To within the image, and to past its end again. */
	CHECK(mremap(at, 3 * nr_bytes, 4 * PAGE, 0) == at && signal_of(at + 4 * PAGE, 0) == SIGSEGV);
	moved = mremap(at, 4 * PAGE, nr_bytes, MREMAP_MAYMOVE);
	CHECK(moved != MAP_FAILED);
	check_beyond(moved, NR_PAST);
	CHECK(munmap(moved, nr_bytes) == 0);
	CHECK(signal_of(moved, 0) == SIGSEGV && signal_of(moved + nr_bytes - PAGE, 0) == SIGSEGV);
}

static void grows_past_the_end(void)
{
	grows(MAP_SHARED);
	grows(MAP_PRIVATE);
}

static void grows_in_part(void)
{
	char *at = map_pages(2, 16, PROT_READ | PROT_WRITE, MAP_PRIVATE), *moved;

	at[PAGE] = 'p';
	CHECK(mremap(at, 4 * PAGE, 8 * PAGE, 0) == MAP_FAILED && errno == ENOMEM);
	moved = mremap(at, 4 * PAGE, 8 * PAGE, MREMAP_MAYMOVE);
	CHECK(moved != MAP_FAILED && signal_of(at, 0) == SIGSEGV && is_image(at + 4 * PAGE, 6, 12));
	CHECK(is_image(moved, 2, 1) && moved[PAGE] == 'p' && is_image(moved + 2 * PAGE, 4, 6));
}

static void moves_with_its_end(void)
{
	size_t nr_bytes = (NR_INSIDE + NR_PAST) * PAGE;
	char *at = map_beyond(MAP_PRIVATE), *target;

	target = mmap(NULL, 2 * nr_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	at[0] = 'p';
	CHECK(mremap(at, nr_bytes, nr_bytes, MREMAP_MAYMOVE | MREMAP_FIXED, target) == target);
	CHECK(target[0] == 'p' && is_image(target + PAGE, FIRST + 1, NR_INSIDE - 1));
	CHECK(signal_of(at + nr_bytes - PAGE, 0) == SIGSEGV && signal_of(target + nr_bytes - PAGE, 1) == SIGBUS);
	/* Only what is past the end. */
	at = mremap(target + (NR_INSIDE + 2) * PAGE, 4 * PAGE, 6 * PAGE, MREMAP_MAYMOVE);
	CHECK(at != MAP_FAILED && signal_of(at + 5 * PAGE, 0) == SIGBUS);
	CHECK(signal_of(target + (NR_INSIDE + 2) * PAGE, 0) == SIGSEGV);
	CHECK(signal_of(target + NR_INSIDE * PAGE, 0) == SIGBUS);
	/* Onto a mapping of it. */
	CHECK(mremap(at, 6 * PAGE, 6 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, target + PAGE) == target + PAGE);
	CHECK(target[0] == 'p' && signal_of(target + PAGE, 0) == SIGBUS && is_image(target + 7 * PAGE, FIRST + 7, 13));
}

static void maps_again(void)
{
	char *at = map_pages(3, 8, PROT_READ, MAP_SHARED), *again;

	again = mremap(at + PAGE, 0, 4 * PAGE, MREMAP_MAYMOVE);
	CHECK(again != MAP_FAILED && again != at + PAGE && is_image(again, 4, 4) && is_image(at, 3, 8));
	CHECK(munmap(at, 8 * PAGE) == 0 && is_image(again, 4, 4));
	at = map_pages(3, 8, PROT_READ, MAP_PRIVATE);
	CHECK(mremap(at, 0, 4 * PAGE, MREMAP_MAYMOVE) == MAP_FAILED && errno == EINVAL);
	CHECK(mremap(at, 4 * PAGE, 0, MREMAP_MAYMOVE) == MAP_FAILED && errno == EINVAL);
}

static void look_beyond(void *at)
{
	check_beyond(at, NR_PAST);
}

/* What is done to a part of the image's pages and of those past its end at once. */
static void across_the_end(void)
{
	char *at = map_beyond(MAP_PRIVATE), *across = at + (NR_INSIDE - 2) * PAGE;
	unsigned char there[8];

	CHECK(msync(across, 8 * PAGE, MS_SYNC) == 0 && mincore(across, 8 * PAGE, there) == 0);
	CHECK(madvise(across, 8 * PAGE, MADV_RANDOM) == 0 && madvise(across, 8 * PAGE, MADV_DONTNEED) == 0);
	CHECK(mprotect(across, 8 * PAGE, PROT_NONE) == 0 && signal_of(across + 7 * PAGE, 0) == SIGSEGV);
	CHECK(mprotect(across, 8 * PAGE, PROT_READ) == 0 && signal_of(across, 1) == SIGSEGV);
	in_child(look_beyond, at);
	look_beyond(at);
	CHECK(mlock(at, 8 * PAGE) == 0 && munlock(at, 8 * PAGE) == 0);
	CHECK(mlock(across, 8 * PAGE) < 0);
	CHECK(munlock(across, 8 * PAGE) == 0);
	CHECK(mmap(across, 4 * PAGE, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == across);
	CHECK(is_byte(across, 4 * PAGE, 0) && signal_of(across + 4 * PAGE, 0) == SIGBUS);
	CHECK(munmap(across - PAGE, 6 * PAGE) == 0 && signal_of(across + 4 * PAGE, 0) == SIGSEGV);
	CHECK(is_image(at, FIRST, NR_INSIDE - 3) && signal_of(across + 5 * PAGE, 0) == SIGBUS);
	CHECK(mremap(at, NR_INSIDE * PAGE, 40 * PAGE, MREMAP_MAYMOVE) == MAP_FAILED && errno == EFAULT);
}

static void begins_past_the_end(void)
{
	char *at = map_pages(image_pages + 4, 4, PROT_READ, MAP_PRIVATE);

	CHECK(signal_of(at, 0) == SIGBUS);
	at = mremap(at, 4 * PAGE, 8 * PAGE, MREMAP_MAYMOVE);
	CHECK(at != MAP_FAILED && signal_of(at + 7 * PAGE, 0) == SIGBUS && munmap(at, 8 * PAGE) == 0);
}

const struct test_case end_cases[] = {
	{"grows_past_the_end", grows_past_the_end},
	{"grows_in_part", grows_in_part},
	{"moves_with_its_end", moves_with_its_end},
	{"maps_again", maps_again},
	{"across_the_end", across_the_end},
	{"begins_past_the_end", begins_past_the_end},
	{NULL, NULL},
};
