/* SPDX-License-Identifier: Apache-2.0 */
/* Cases in which a thread does not come back from where it was: cancelled, jumped out of, ended. */
#define _GNU_SOURCE
#include "mapper.h"

#include <pthread.h>
#include <sched.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

#define NR_TURNS 30

static atomic_uint nr_mapped;

static void map_and_unmap(void)
{
	void *at = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, image_fd, 0);

	/* The mappings of those that were jumped out of stay, and there may be no more of them. */
	if (at == MAP_FAILED)
		return;
	nr_mapped++;
	munmap(at, PAGE);
}

static void wait_until_it_maps(void)
{
	unsigned before = nr_mapped;

	while (nr_mapped < before + 2)
		sched_yield();
}

static void *map_until_cancelled(void *unused)
{
	(void)unused;
	for (;;) {
		map_and_unmap();
		pthread_testcancel();
	}
	return NULL;
}

static void cancelled(void)
{
	pthread_t thread;
	void *result;

	for (int turn = 0; turn < NR_TURNS; turn++) {
		CHECK(pthread_create(&thread, NULL, map_until_cancelled, NULL) == 0);
		wait_until_it_maps();
		CHECK(pthread_cancel(thread) == 0);
		CHECK(pthread_join(thread, &result) == 0 && result == PTHREAD_CANCELED);
		CHECK(is_image(map_pages(0, 2, PROT_READ, MAP_PRIVATE), 0, 2));
	}
}

static sigjmp_buf start;

static void jump(int number)
{
	siglongjmp(start, number);
}

static void jumped_out_of(void)
{
	struct sigaction action = {.sa_handler = jump};
	struct itimerval soon = {.it_value = {.tv_usec = 3000}};
	volatile int nr_jumps = 0;

	sigaction(SIGALRM, &action, NULL);
	if (sigsetjmp(start, 1) == SIGALRM)
		nr_jumps++;
	if (nr_jumps < NR_TURNS) {
		setitimer(ITIMER_REAL, &soon, NULL);
		for (;;)
			map_and_unmap();
	}
	CHECK(is_image(map_pages(0, 2, PROT_READ, MAP_PRIVATE), 0, 2));
}

static void end_thread(int number)
{
	(void)number;
	pthread_exit(NULL);
}

static void *map_for_ever(void *unused)
{
	(void)unused;
	for (;;)
		map_and_unmap();
	return NULL;
}

static void ended_in_a_handler(void)
{
	struct sigaction action = {.sa_handler = end_thread};
	pthread_t thread;

	sigaction(SIGUSR1, &action, NULL);
	for (int turn = 0; turn < NR_TURNS; turn++) {
		CHECK(pthread_create(&thread, NULL, map_for_ever, NULL) == 0);
		wait_until_it_maps();
		CHECK(pthread_kill(thread, SIGUSR1) == 0 && pthread_join(thread, NULL) == 0);
	}
	CHECK(is_image(map_pages(0, 2, PROT_READ, MAP_PRIVATE), 0, 2));
}

static void exits_while_others_map(void)
{
	pthread_t threads[3];

	for (int i = 0; i < 3; i++)
		CHECK(pthread_create(&threads[i], NULL, map_for_ever, NULL) == 0);
	for (int turn = 0; turn < 3; turn++) {
		pid_t child = fork();

		CHECK(child >= 0);
		if (child == 0) {
			map_and_unmap();
			exit(0);
		}
		wait_until_it_maps();
	}
	/* The others go on mapping while this process ends. */
	exit(0);
}

const struct test_case thread_cases[] = {
	{"cancelled", cancelled},
	{"jumped_out_of", jumped_out_of},
	{"ended_in_a_handler", ended_in_a_handler},
	{"exits_while_others_map", exits_while_others_map},
	{NULL, NULL},
};
