/* SPDX-License-Identifier: Apache-2.0 */
/* mapper CASE IMAGE COPY: does what a case says to IMAGE and compares with COPY, which is no image. */
#define _GNU_SOURCE
#include "mapper.h"

#include <errno.h>
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

const char *image_path;
int image_fd;
size_t image_bytes, image_pages;
static const char *copy;
static sigjmp_buf caught_at;

void fail(const char *file, int line, const char *what)
{
	fprintf(stderr, "%s:%d: not so: %s (errno %d, %s)\n", file, line, what, errno, strerror(errno));
	_exit(99);
}

char *map_pages(size_t page_no, size_t nr_pages, int prot, int flags)
{
	char *at = mmap(NULL, nr_pages * PAGE, prot, flags, image_fd, (off_t)(page_no * PAGE));

	CHECK(at != MAP_FAILED);
	return at;
}

int is_image(const char *at, size_t page_no, size_t nr_pages)
{
	return memcmp(at, copy + page_no * PAGE, nr_pages * PAGE) == 0;
}

int is_byte(const char *at, size_t nr_bytes, char byte)
{
	for (size_t i = 0; i < nr_bytes; i++)
		if (at[i] != byte)
			return 0;
	return 1;
}

static void jump(int number)
{
	siglongjmp(caught_at, number);
}

int signal_of(volatile char *at, int writes)
{
	struct sigaction action = {.sa_handler = jump, .sa_flags = SA_NODEFER};
	int number = sigsetjmp(caught_at, 1);

	if (number == 0) {
		sigaction(SIGSEGV, &action, NULL);
		sigaction(SIGBUS, &action, NULL);
		if (writes)
			*at = 1;
		else
			(void)*at;
	}
	action.sa_handler = SIG_DFL;
	sigaction(SIGSEGV, &action, NULL);
	sigaction(SIGBUS, &action, NULL);
	return number;
}

void in_child(void (*what)(void *), void *argument)
{
	int status;
	pid_t child = fork();

	CHECK(child >= 0);
	if (child == 0) {
		what(argument);
		_exit(0);
	}
	CHECK(waitpid(child, &status, 0) == child);
	CHECK(status == 0);
}

static void read_copy(const char *path)
{
	int fd = open(path, O_RDONLY);
	struct stat status;

	CHECK(fd >= 0 && fstat(fd, &status) == 0);
	image_bytes = (size_t)status.st_size;
	image_pages = (image_bytes + PAGE - 1) / PAGE;
	/* The rest of the last page is zeros, as in any mapping of a file. */
	copy = mmap(NULL, image_pages * PAGE, PROT_READ, MAP_PRIVATE, fd, 0);
	CHECK(copy != MAP_FAILED);
	close(fd);
}

int main(int nr_words, char **words)
{
	const struct test_case *const tables[] = {map_cases,    fork_cases,  thread_cases,
	                                          stream_cases, clone_cases, end_cases};

	CHECK(nr_words == 4);
	image_path = words[2];
	read_copy(words[3]);
	image_fd = open(image_path, O_RDONLY);
	CHECK(image_fd >= 0);
	for (size_t i = 0; i < sizeof(tables) / sizeof(tables[0]); i++)
		for (const struct test_case *test = tables[i]; test->name; test++)
			if (strcmp(test->name, words[1]) == 0) {
				test->run();
				return 0;
			}
	fprintf(stderr, "no case %s\n", words[1]);
	return 98;
}
