/* SPDX-License-Identifier: Apache-2.0 */
/* Cases of several processes and threads. */
#define _GNU_SOURCE
#include "mapper.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdatomic.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#define NR_PAGES ((size_t)64)

static char *at;

static void grandchild(void *argument)
{
	(void)argument;
	CHECK(at[0] == 'c' && at[PAGE] == 'p' && at[2 * PAGE] == 'c' && is_image(at + 3 * PAGE, 3, NR_PAGES - 3));
	at[4 * PAGE] = 'g';
	CHECK(at[4 * PAGE] == 'g');
}

static void child(void *argument)
{
	(void)argument;
	CHECK(at[0] == 'p' && at[PAGE] == 'p' && is_image(at + 2 * PAGE, 2, NR_PAGES - 2));
	at[0] = at[2 * PAGE] = 'c';
	CHECK(at[0] == 'c' && at[2 * PAGE] == 'c' && at[PAGE] == 'p');
	in_child(grandchild, NULL);
	CHECK(is_image(at + 3 * PAGE, 3, NR_PAGES - 3));
	/* A mapping of its own, and the inherited one's end. */
	CHECK(is_image(map_pages(7, 9, PROT_READ, MAP_PRIVATE), 7, 9));
	CHECK(munmap(at, NR_PAGES * PAGE) == 0 && signal_of(at, 0) == SIGSEGV);
}

static void inherits(void)
{
	at = map_pages(0, NR_PAGES, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	CHECK(is_image(at, 0, 16));
	at[0] = at[PAGE] = 'p';
	in_child(child, NULL);
	CHECK(at[0] == 'p' && at[PAGE] == 'p' && is_image(at + 2 * PAGE, 2, NR_PAGES - 2));
	at[0] = 'q';
	CHECK(munmap(at + 8 * PAGE, 8 * PAGE) == 0);
}

static void look_at_pieces(void *argument)
{
	(void)argument;
	CHECK(is_image(at + PAGE, 1, 7) && at[0] == 'p' && at[20 * PAGE] == 'p');
	CHECK(signal_of(at + 8 * PAGE, 0) == SIGSEGV && is_image(at + 16 * PAGE, 16, 4));
	CHECK(signal_of(at + 40 * PAGE, 1) == SIGSEGV && is_image(at + 40 * PAGE, 40, 8));
}

static void inherits_pieces(void)
{
	at = map_pages(0, NR_PAGES, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	at[0] = at[20 * PAGE] = 'p';
	CHECK(munmap(at + 8 * PAGE, 8 * PAGE) == 0);
	CHECK(mprotect(at + 40 * PAGE, 8 * PAGE, PROT_READ) == 0);
	in_child(look_at_pieces, NULL);
	look_at_pieces(NULL);
}

static void not_there(void *argument)
{
	(void)argument;
	CHECK(signal_of(at, 0) == SIGSEGV);
}

static void nothing_unwanted(void)
{
	pid_t child_pid;
	int status;

	at = map_pages(0, NR_PAGES, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	child_pid = (pid_t)syscall(SYS_clone, SIGCHLD, NULL, NULL, NULL, 0);
	if (child_pid == 0)
		_exit(*at == 0);
	CHECK(waitpid(child_pid, &status, 0) == child_pid && WIFSIGNALED(status));
	CHECK(WTERMSIG(status) == SIGSEGV);
	CHECK(madvise(at, NR_PAGES * PAGE, MADV_DONTFORK) == 0);
	in_child(not_there, NULL);
	CHECK(madvise(at, NR_PAGES * PAGE, MADV_DOFORK) == 0);
	at[0] = at[1 * PAGE] = 'p';
	child_pid = fork();
	if (child_pid == 0)
		_exit(at[0] != 'p' || !is_image(at + 2 * PAGE, 2, 60));
	CHECK(waitpid(child_pid, &status, 0) == child_pid && status == 0);
}

static void spawns(void)
{
	char *words[] = {"sh", "-c", "exit 7", NULL};
	pid_t pid;
	int status;

	at = map_pages(0, NR_PAGES, PROT_READ, MAP_PRIVATE);
	CHECK(posix_spawn(&pid, "/bin/sh", NULL, NULL, words, NULL) == 0);
	CHECK(waitpid(pid, &status, 0) == pid && WEXITSTATUS(status) == 7);
	pid = vfork();
	if (pid == 0)
		_exit(at[0] == 0);
	CHECK(waitpid(pid, &status, 0) == pid && status == 0);
	CHECK(is_image(at, 0, NR_PAGES));
}

static atomic_int stopping;

/* Each has pages of its own to write; all read, map and unmap. */
static void *busy(void *argument)
{
	size_t mine = (size_t)argument;

	for (unsigned turn = 0; !stopping; turn++) {
		char *extra = map_pages(mine, 4, PROT_READ | PROT_WRITE, MAP_PRIVATE);

		CHECK(is_image(extra, mine, 4));
		extra[PAGE] = 'e';
		at[(mine * 4) * PAGE] = (char)turn;
		CHECK(is_image(at + (mine * 4 + 1) * PAGE, mine * 4 + 1, 3));
		CHECK(extra[PAGE] == 'e' && is_image(extra + 2 * PAGE, mine + 2, 2));
		CHECK(munmap(extra, 4 * PAGE) == 0);
	}
	return NULL;
}

static void look_at_all(void *argument)
{
	(void)argument;
	for (size_t mine = 0; mine < 4; mine++)
		CHECK(is_image(at + (mine * 4 + 1) * PAGE, mine * 4 + 1, 3));
	CHECK(at[20 * PAGE] == 'p' && is_image(at + 21 * PAGE, 21, NR_PAGES - 21));
}

static void busy_threads(void)
{
	pthread_t threads[4];

	at = map_pages(0, NR_PAGES, PROT_READ | PROT_WRITE, MAP_PRIVATE);
	at[20 * PAGE] = 'p';
	for (size_t i = 0; i < 4; i++)
		CHECK(pthread_create(&threads[i], NULL, busy, (void *)i) == 0);
	for (int turn = 0; turn < 10; turn++)
		in_child(look_at_all, NULL);
	stopping = 1;
	for (size_t i = 0; i < 4; i++)
		CHECK(pthread_join(threads[i], NULL) == 0);
	look_at_all(NULL);
}

const struct test_case fork_cases[] = {
	{"inherits", inherits}, {"inherits_pieces", inherits_pieces}, {"nothing_unwanted", nothing_unwanted},
	{"spawns", spawns},     {"busy_threads", busy_threads},       {NULL, NULL},
};
