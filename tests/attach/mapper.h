/* SPDX-License-Identifier: Apache-2.0 */
/* What the cases of mapper.c share: the image to map, a copy to compare with, and checks that say where. */
#ifndef COWSHED_TESTS_MAPPER_H
#define COWSHED_TESTS_MAPPER_H

#include <stddef.h>
#include <stdint.h>

#define PAGE ((size_t)4096)

extern const char *image_path;
extern int image_fd;
extern size_t image_bytes, image_pages; /* pages: the last one is partial if the size is odd */

#define CHECK(what)                                      \
	do {                                             \
		if (!(what))                             \
			fail(__FILE__, __LINE__, #what); \
	} while (0)

void fail(const char *file, int line, const char *what) __attribute__((noreturn));

/* Maps these pages; fails the case if that fails. */
char *map_pages(size_t page_no, size_t nr_pages, int prot, int flags);
/* Whether pages at an address are the image's from page_no on. */
int is_image(const char *at, size_t page_no, size_t nr_pages);
int is_byte(const char *at, size_t nr_bytes, char byte);
/* The signal that reading a byte there raises, 0 if none; with writes, writing it. */
int signal_of(volatile char *at, int writes);
/* Runs in a forked child, whose exit status must be 0. */
void in_child(void (*what)(void *), void *argument);

struct test_case {
	const char *name;
	void (*run)(void);
};
extern const struct test_case map_cases[], fork_cases[], thread_cases[], stream_cases[], clone_cases[], end_cases[];

#endif
