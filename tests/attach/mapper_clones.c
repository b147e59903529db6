/* SPDX-License-Identifier: Apache-2.0 */
/* Cases of children that share memory or descriptors with their parent, and of copies that nobody was told of. */
#define _GNU_SOURCE
#include "mapper.h"

#include <errno.h>
#include <fcntl.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define NR_PAGES ((size_t)200)
/* Where the library keeps its descriptors, and where it moves them to. */
#define FIRST_FD 880
#define LAST_FD 940

static char *at;

static void map_some(void)
{
	at = map_pages(0, NR_PAGES, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	at[0] = 'p';
}

/* Not as many in a child, so that a table it had changed would name numbers that the parent takes. */
#define LAST_FD_OF_CHILD 910

static void take_numbers(int last_fd)
{
	for (int fd = FIRST_FD; fd < last_fd; fd++)
		CHECK(dup2(2, fd) == fd);
}

/* The parent's mapping is served on, and its end closes none of the program's descriptors. */
static void check_parent(void)
{
	CHECK(at[0] == 'p' && is_image(at + PAGE, 1, 5));
	take_numbers(LAST_FD);
	CHECK(is_image(at + 100 * PAGE, 100, 50));
	CHECK(munmap(at, NR_PAGES * PAGE) == 0 && signal_of(at, 0) == SIGSEGV);
	for (int fd = FIRST_FD; fd < LAST_FD; fd++)
		CHECK(fcntl(fd, F_GETFD) >= 0);
	CHECK(is_image(map_pages(0, 4, PROT_READ, MAP_PRIVATE), 0, 4));
}

static void wait_for(pid_t child)
{
	int status;

	CHECK(child > 0 && waitpid(child, &status, __WALL) == child);
	CHECK(status == 0);
}

static void vfork_moves_descriptors(void)
{
	pid_t child;

	map_some();
	child = vfork();
	if (child == 0) {
		take_numbers(LAST_FD_OF_CHILD);
		closefrom(3);
		_exit(0);
	}
	wait_for(child);
	check_parent();
}

static void vfork_maps(void)
{
	pid_t child;

	map_some();
	child = vfork();
	if (child == 0) {
		/* Its parent's are refused; a new one is of the file, which has the same bytes. */
		CHECK(munmap(at, PAGE) < 0 && errno == EPERM);
		CHECK(mprotect(at, PAGE, PROT_NONE) < 0 && errno == EPERM);
		CHECK(madvise(at, PAGE, MADV_DONTNEED) < 0 && errno == EPERM);
		CHECK(mremap(at, PAGE, 2 * PAGE, MREMAP_MAYMOVE) == MAP_FAILED && errno == EPERM);
		CHECK(mmap(at, PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == MAP_FAILED);
		CHECK(is_image(map_pages(0, 4, PROT_READ, MAP_PRIVATE), 0, 4));
		_exit(0);
	}
	wait_for(child);
	check_parent();
}

static void spawn_moves_descriptors(void)
{
	char *words[] = {"true", NULL};
	posix_spawn_file_actions_t actions;
	pid_t child;

	map_some();
	CHECK(posix_spawn_file_actions_init(&actions) == 0);
	for (int fd = FIRST_FD; fd < LAST_FD; fd++)
		CHECK(posix_spawn_file_actions_adddup2(&actions, 2, fd) == 0);
	CHECK(posix_spawn_file_actions_addclosefrom_np(&actions, 3) == 0);
	CHECK(posix_spawn(&child, "/bin/true", &actions, NULL, words, NULL) == 0);
	wait_for(child);
	check_parent();
}

static int child_takes_numbers(void *unused)
{
	(void)unused;
	take_numbers(LAST_FD_OF_CHILD);
	return 0;
}

static pid_t clone_with(int (*run)(void *), int flags)
{
	char *stack = mmap(NULL, 64 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	CHECK(stack != MAP_FAILED);
	return clone(run, stack + 64 * PAGE, flags | SIGCHLD, NULL);
}

static void clone_with_memory(void)
{
	map_some();
	wait_for(clone_with(child_takes_numbers, CLONE_VM));
	check_parent();
}

static int child_takes_numbers_and_maps(void *unused)
{
	(void)unused;
	take_numbers(LAST_FD_OF_CHILD);
	CHECK(is_image(map_pages(0, 4, PROT_READ, MAP_PRIVATE), 0, 4));
	CHECK(at[0] == 'p' && is_image(at + PAGE, 1, 5));
	return 0;
}

/* As good as a thread: the numbers move for both. */
static void clone_with_memory_and_descriptors(void)
{
	map_some();
	wait_for(clone_with(child_takes_numbers_and_maps, CLONE_VM | CLONE_FILES));
	check_parent();
}

static int child_with_descriptors(void *unused)
{
	int nr_refused = 0;

	(void)unused;
	for (int fd = FIRST_FD; fd < LAST_FD; fd++)
		if (dup2(2, fd) != fd) {
			CHECK(errno == EBUSY);
			nr_refused++;
		}
	CHECK(nr_refused == 2);
	closefrom(3);
	image_fd = open(image_path, O_RDONLY);
	CHECK(is_image(map_pages(0, 4, PROT_READ, MAP_PRIVATE), 0, 4));
	CHECK(signal_of(at, 0) == SIGSEGV && munmap(at, NR_PAGES * PAGE) == 0);
	return 0;
}

static void clone_with_descriptors(void)
{
	map_some();
	wait_for(clone_with(child_with_descriptors, CLONE_FILES));
	image_fd = open(image_path, O_RDONLY);
	check_parent();
}

/* Nobody tells the library of a bare clone; the copy begins with nothing, and takes nothing from its parent. */
static void bare_clone_begins_anew(void)
{
	pid_t child;

	map_some();
	child = (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, 0);
	if (child == 0) {
		CHECK(munmap(at, NR_PAGES * PAGE) == 0);
		at = map_pages(2, 4, PROT_READ | PROT_WRITE, MAP_PRIVATE);
		at[0] = 'c';
		CHECK(is_image(at + PAGE, 3, 3));
		child = fork();
		if (child == 0)
			_exit(at[0] != 'c' || !is_image(at + PAGE, 3, 3));
		wait_for(child);
		_exit(0);
	}
	wait_for(child);
	check_parent();
}

const struct test_case clone_cases[] = {
	{"vfork_moves_descriptors", vfork_moves_descriptors},
	{"vfork_maps", vfork_maps},
	{"spawn_moves_descriptors", spawn_moves_descriptors},
	{"clone_with_memory", clone_with_memory},
	{"clone_with_memory_and_descriptors", clone_with_memory_and_descriptors},
	{"clone_with_descriptors", clone_with_descriptors},
	{"bare_clone_begins_anew", bare_clone_begins_anew},
	{NULL, NULL},
};
