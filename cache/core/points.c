/* SPDX-License-Identifier: Apache-2.0 */
#include "cache/core/points.h"

#include <pthread.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

_Atomic int point_actions[POINT_NR];

static pthread_mutex_t points_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t points_changed = PTHREAD_COND_INITIALIZER;

static struct {
	int arg;
	uint32_t nr_left; /* 0: no bound */
	uint32_t nr_reached;
	uint64_t generation; /* a stopped thread goes on once this has changed */
} points[POINT_NR];

static int point_set(int point, int action, int arg, uint32_t nr_times)
{
	if (point < 0 || point >= POINT_NR)
		return -EINVAL;
	pthread_mutex_lock(&points_lock);
	points[point].arg = arg;
	points[point].nr_left = nr_times;
	if (action != POINT_OFF)
		points[point].nr_reached = 0;
	points[point].generation++;
	atomic_store(&point_actions[point], action);
	pthread_cond_broadcast(&points_changed);
	pthread_mutex_unlock(&points_lock);
	return 0;
}

int point_arm(int point, int action, int arg, uint32_t nr_times)
{
	if (action < POINT_OFF || action > POINT_KILL)
		return -EINVAL;
	return point_set(point, action, arg, nr_times);
}

int point_release(int point)
{
	return point_set(point, POINT_OFF, 0, 0);
}

int point_wait(int point, uint32_t nr_threads, int timeout_ms)
{
	struct timespec deadline;
	int err = 0;

	if (point < 0 || point >= POINT_NR)
		return -EINVAL;
	clock_gettime(CLOCK_REALTIME, &deadline);
	deadline.tv_sec += timeout_ms / 1000;
	deadline.tv_nsec += (long)(timeout_ms % 1000) * 1000000;
	if (deadline.tv_nsec >= 1000000000) {
		deadline.tv_sec++;
		deadline.tv_nsec -= 1000000000;
	}
	pthread_mutex_lock(&points_lock);
	while (points[point].nr_reached < nr_threads && !err)
		err = pthread_cond_timedwait(&points_changed, &points_lock, &deadline);
	if (points[point].nr_reached >= nr_threads)
		err = 0;
	pthread_mutex_unlock(&points_lock);
	return -err;
}

int point_reach_armed(int point)
{
	int result = 0;

	pthread_mutex_lock(&points_lock);
	int action = atomic_load(&point_actions[point]);
	if (action != POINT_OFF) {
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
	}
	pthread_mutex_unlock(&points_lock);
	return result;
}
