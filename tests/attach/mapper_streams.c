/* SPDX-License-Identifier: Apache-2.0 */
/* Cases of descriptors: what the library says goes to no file of the program's, what it keeps is in nobody's way. */
#define _GNU_SOURCE
#include "mapper.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <unistd.h>

/* Has the library say a line. */
static void be_refused(void)
{
	CHECK(mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, image_fd, 0) == MAP_FAILED && errno == EACCES);
}

static void own_file_is_stderr(void)
{
	int file;

	close(2);
	file = open("/tmp", O_TMPFILE | O_RDWR, 0600);
	CHECK(file == 2 && write(file, "mine", 4) == 4);
	be_refused();
	CHECK(lseek(file, 0, SEEK_END) == 4);
	/* Nor to what has taken its place by dup2, or stands behind it now. */
	file = memfd_create("own", 0);
	CHECK(dup2(file, 2) == 2);
	be_refused();
	CHECK(lseek(file, 0, SEEK_END) == 0);
}

static void streams_are_closed(void)
{
	char *at;

	for (int fd = 0; fd < 3; fd++)
		close(fd);
	at = map_pages(0, 8, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	at[0] = 'p';
	be_refused();
	for (int fd = 0; fd < 3; fd++)
		CHECK(fcntl(fd, F_GETFD) < 0);
	CHECK(open("/dev/null", O_RDONLY) == 0 && open("/dev/null", O_WRONLY) == 1);
	CHECK(at[0] == 'p' && is_image(at + PAGE, 1, 7));
	CHECK(munmap(at, 8 * PAGE) == 0);
}

static void few_descriptors(void)
{
	struct rlimit limit;
	char *at;

	CHECK(getrlimit(RLIMIT_NOFILE, &limit) == 0);
	for (rlim_t few = 40; few >= 12; few -= 7) {
		limit.rlim_cur = few;
		CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
		close(0);
		at = map_pages(0, 8, PROT_READ, MAP_PRIVATE);
		CHECK(fcntl(0, F_GETFD) < 0 && open("/dev/null", O_RDONLY) == 0);
		/* All numbers that there are, but for the library's two. */
		for (int fd = 3, nr_refused = 0; fd < (int)few; fd++) {
			if (fd == image_fd)
				continue;
			nr_refused += dup2(2, fd) != fd;
			CHECK(nr_refused <= 2);
		}
		CHECK(is_image(at, 0, 8));
		closefrom(image_fd + 1);
		CHECK(munmap(at, 8 * PAGE) == 0);
	}
	/* Where the library would put its own is none left. */
	limit.rlim_cur = 16;
	CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
	for (int fd = 12; fd < 16; fd++)
		CHECK(dup2(2, fd) == fd);
	close(0);
	at = map_pages(0, 8, PROT_READ, MAP_PRIVATE);
	CHECK(fcntl(0, F_GETFD) < 0 && is_image(at, 0, 8) && munmap(at, 8 * PAGE) == 0);
	/* Too few for a mapping: as if there were no more of anything. */
	limit.rlim_cur = (rlim_t)image_fd + 2;
	CHECK(setrlimit(RLIMIT_NOFILE, &limit) == 0);
	CHECK(mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, image_fd, 0) == MAP_FAILED && errno == EMFILE);
}

static void says_and_goes_on(void)
{
	be_refused();
	CHECK(is_image(map_pages(0, 8, PROT_READ, MAP_PRIVATE), 0, 8));
}

const struct test_case stream_cases[] = {
	{"own_file_is_stderr", own_file_is_stderr},
	{"streams_are_closed", streams_are_closed},
	{"few_descriptors", few_descriptors},
	{"says_and_goes_on", says_and_goes_on},
	{NULL, NULL},
};
