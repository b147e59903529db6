/* SPDX-License-Identifier: Apache-2.0 */
#include "cache/core/points.h"

#include <pthread.h>
#include <signal.h>
#include <stdbool.h>
#include <time.h>
#include <unistd.h>

_Atomic int point_actions[POINT_NR];

static pthread_mutex_t points_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t points_changed = PTHREAD_COND_INITIALIZER;

static struct {
	int arg;
	uint32_t nr_left; /* 0: no bound */
	uint32_t nr_reached;
	uint32_t permille;   /* of the threads that reach it */
	uint64_t state;      /* of its random numbers */
	uint64_t generation; /* a stopped thread goes on once this has changed */
} points[POINT_NR];

#define ALL 1000u

static int point_set(int point, int action, int arg, uint32_t nr_times, uint32_t permille, uint64_t seed)
{
	if (point < 0 || point >= POINT_NR)
		return -EINVAL;
	pthread_mutex_lock(&points_lock);
	points[point].arg = arg;
	points[point].nr_left = nr_times;
	points[point].permille = permille;
	points[point].state = seed;
	if (action != POINT_OFF)
		points[point].nr_reached = 0;
	points[point].generation++;
	atomic_store(&point_actions[point], action);
	pthread_cond_broadcast(&points_changed);
	pthread_mutex_unlock(&points_lock);
	return 0;
}

int point_arm_some(int point, int action, int arg, uint32_t nr_times, uint32_t permille, uint64_t seed)
{
	if (action < POINT_OFF || action > POINT_DELAY || permille > ALL || (action == POINT_DELAY && arg < 0))
		return -EINVAL;
	return point_set(point, action, arg, nr_times, permille, seed);
}

int point_arm(int point, int action, int arg, uint32_t nr_times)
{
	return point_arm_some(point, action, arg, nr_times, ALL, 0);
}

int point_release(int point)
{
	return point_set(point, POINT_OFF, 0, 0, ALL, 0);
}

static struct timespec deadline_in(int timeout_ms)
{
	struct timespec deadline;

	clock_gettime(CLOCK_REALTIME, &deadline);
	deadline.tv_sec += timeout_ms / 1000;
	deadline.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
	if (deadline.tv_nsec >= 1000000000) {
		deadline.tv_sec++;
		deadline.tv_nsec -= 1000000000;
	}
	return deadline;
}

int point_wait(int point, uint32_t nr_threads, int timeout_ms)
{
	struct timespec deadline = deadline_in(timeout_ms);
	int err = 0;

	if (point < 0 || point >= POINT_NR)
		return -EINVAL;
	pthread_mutex_lock(&points_lock);
	while (points[point].nr_reached < nr_threads && !err)
		err = pthread_cond_timedwait(&points_changed, &points_lock, &deadline);
	if (points[point].nr_reached >= nr_threads)
		err = 0;
	pthread_mutex_unlock(&points_lock);
	return -err;
}

/* Whether chance picks this thread (splitmix64, Steele et al. 2014: any seed will do). */
static bool is_picked(int point)
{
	uint64_t z = points[point].state += 0x9e3779b97f4a7c15u;

	z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
	z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
	return (z ^ (z >> 31)) % ALL < points[point].permille;
}

int point_reach_armed(int point)
{
	struct timespec due;
	int result = 0;

	pthread_mutex_lock(&points_lock);
	int action = atomic_load(&point_actions[point]);
	if (action != POINT_OFF && is_picked(point)) {
		uint64_t generation = points[point].generation;

		points[point].nr_reached++;
		if (points[point].nr_left && --points[point].nr_left == 0)
			atomic_store(&point_actions[point], POINT_OFF);
		pthread_cond_broadcast(&points_changed);
		if (action == POINT_KILL)
			kill(getpid(), SIGKILL);
		if (action == POINT_FAIL)
			result = -points[point].arg;
		while (action == POINT_STOP && points[point].generation == generation)
			pthread_cond_wait(&points_changed, &points_lock);
		if (action == POINT_DELAY)
			due = deadline_in(points[point].arg);
		while (action == POINT_DELAY && points[point].generation == generation)
			if (pthread_cond_timedwait(&points_changed, &points_lock, &due))
				break;
	}
	pthread_mutex_unlock(&points_lock);
	return result;
}
