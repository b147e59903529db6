/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Freezing a guest: none of its private bytes changes until the thaw.
 *
 * Three things change private bytes: a write to an open page, an answer that opens one, and a discard. The account's
 * part (accounting/core/track.c) protects open pages and refuses answers, under the lock under which they are made. A
 * discard is different: its guest goes on with it as soon as its event has been *read*. So the thread first pauses: it
 * handles what it has read, and after that reads only faults, no events.
 *
 * The kernel returns faults before events, and reports in fdinfo how many faults wait; so the thread reads one message
 * when at least one fault waits. (If a signal withdraws that fault in the same instant, while an event waits, the event
 * is read after all: its pages then count as dirty and private no more, for a caller that looks again.) While an event
 * waits, the kernel refuses to map anything in its guest, so a fault on an unmapped page waits too.
 */
#define _GNU_SOURCE
#include "faults/core/freeze.h"

#include "accounting/core/track.h"
#include "cache/core/abi.h"
#include "cache/core/points.h"
#include "cache/core/store.h"
#include "faults/core/answer.h"
#include "faults/core/guest.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

#define FREEZE_WITHIN_NS 1000000000u
#define LOOK_SECONDS 2           /* a lost kick costs at most that much */
#define EVENTS_LOOK_NS 10000000u /* for faults, while an event keeps the descriptor readable */

bool pause_turn(struct guest *guest)
{
	struct guest_pause *pause = &guest->pause;
	bool wanted = atomic_load_explicit(&pause->wanted, memory_order_acquire);

	if (wanted == pause->on) /* only this thread writes it */
		return wanted;
	pthread_mutex_lock(&pause->lock);
	pause->on = wanted;
	pause->events_wait = false;
	pthread_cond_broadcast(&pause->changed);
	pthread_mutex_unlock(&pause->lock);
	return wanted;
}

/* How many faults wait to be read; 0 if that is not known. */
static unsigned long nr_faults_waiting(const struct guest *guest)
{
	char path[48], text[512];

	snprintf(path, sizeof path, "/proc/self/fdinfo/%d", guest->uffd);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return 0;
	ssize_t nr = read(fd, text, sizeof text - 1);
	close(fd);
	text[nr > 0 ? nr : 0] = '\0';
	const char *at = strstr(text, "pending:");
	return at ? strtoul(at + strlen("pending:"), NULL, 10) : 0;
}

ssize_t pause_read(struct guest *guest, struct uffd_msg *message)
{
	return nr_faults_waiting(guest) ? read_messages(guest, message, 1) : -EAGAIN;
}

void pause_sleep(struct guest *guest)
{
	struct guest_pause *pause = &guest->pause;
	bool broken = atomic_load(&guest->account->header->broken);
	struct pollfd fds[2] = {
		{.fd = broken || pause->events_wait ? -1 : guest->uffd, .events = POLLIN},
		{.fd = guest->kick_fd, .events = POLLIN},
	};
	bool timed = pause->events_wait || guest->retry_at_ns;
	struct timespec room =
		timed ? (struct timespec){.tv_nsec = EVENTS_LOOK_NS} : (struct timespec){.tv_sec = LOOK_SECONDS};
	uint64_t kicks;

	pause->events_wait = false;
	int nr = ppoll(fds, 2, &room, NULL);
	if (nr < 0)
		return;
	if (fds[0].revents & (POLLERR | POLLNVAL))
		answer_failed(guest, -EBADFD);
	else if (fds[0].revents)
		pause->events_wait = !nr_faults_waiting(guest);
	bool kicked = fds[1].revents && read(guest->kick_fd, &kicks, sizeof kicks) > 0;
	bool wake = (kicked || !nr) && atomic_exchange(&guest->wake_wanted, false);
	if (wake || (!nr && guest->retry_at_ns))
		ask_again(guest);
}

static void ask_thread(struct guest *guest, bool pause)
{
	atomic_store_explicit(&guest->pause.wanted, pause, memory_order_release);
	store_raise_at(POINT_WAKE_GUEST, guest->kick_fd);
}

/* Waits until the thread has paused; -ETIMEDOUT. */
static int wait_held(struct guest *guest, const struct timespec *until)
{
	int err = 0;

	pthread_mutex_lock(&guest->pause.lock);
	while (!guest->pause.on && !err)
		err = pthread_cond_clockwait(&guest->pause.changed, &guest->pause.lock, CLOCK_MONOTONIC, until);
	bool on = guest->pause.on;
	pthread_mutex_unlock(&guest->pause.lock);
	return on ? 0 : -err;
}

int guest_freeze(struct guest *guest)
{
	uint64_t until_ns = clock_now_ns() + FREEZE_WITHIN_NS;
	struct timespec until = {(time_t)(until_ns / 1000000000u), (long)(until_ns % 1000000000u)};
	int err = guest->account->populated ? -EOPNOTSUPP : -EAGAIN;

	while (err == -EAGAIN && clock_now_ns() < until_ns) {
		ask_thread(guest, true);
		err = wait_held(guest, &until);
		if (!err)
			err = account_freeze(guest->account);
		if (err == -EAGAIN) { /* an event came before the pause: the thread must read it */
			ask_thread(guest, false);
			nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
		}
	}
	if (err)
		guest_thaw(guest);
	return err == -EAGAIN ? -ETIMEDOUT : err;
}

void guest_thaw(struct guest *guest)
{
	account_thaw(guest->account);
	ask_thread(guest, false);
	guest_resume(guest);
}
