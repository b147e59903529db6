/* SPDX-License-Identifier: Apache-2.0 */
/*
 * One thread watches all links for the end of their backend.  It never waits for the lock, whose holder may wait for
 * this thread: a munmap waits until its event is read.  So the thread has a list of its own.  For a move it takes the
 * lock if that is free.
 *
 * Once a move has left the old backend, and until the target has taken the ranges on, only this thread reads a link's
 * events, so that calls go on.  The kernel raises faults that are read here again once something is mapped there.
 *
 * Programs close descriptors that are not theirs, and use the numbers again.  So a descriptor is used only while its
 * inode is the one that was noted.
 *
 * A program whose main thread has ended by pthread_exit lives as long as it has threads: ours ends when it is the last.
 */
#define _GNU_SOURCE
#include "transport/preload/orphans.h"

#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "cache/core/abi.h"
#include "transport/core/guest/orphan.h"
#include "transport/core/guest/packets.h"
#include "transport/preload/moves.h"
#include "transport/preload/real.h"
#include "transport/preload/report.h"
#include "transport/preload/table.h"

#define STACK_BYTES (128u << 10)
#define LOOK_MS 1000
#define LOOK_MOVED_MS 20    /* while a move waits for the lock, or for its target */
#define NR_LOOKS_BETWEEN 10 /* after a try that failed */
#define HIDING_FD 900

struct watched {
	int connection_fd, uffd; /* -1: nothing */
	ino_t connection_ino, uffd_ino;
	bool is_asked;  /* a caller reads the connection */
	bool is_orphan; /* uffd is the thread's own duplicate; the connection has ended */
	bool is_moved;  /* its ranges must follow the guest */
	bool is_left;   /* and no backend serves them any more; only the thread sets it */
};

/* Held for short, with the library's lock or without it. */
static pthread_mutex_t list_lock = PTHREAD_MUTEX_INITIALIZER;
/* By link number; behind them the orphans. */
static struct watched list[2 * TABLE_MAX_LINKS];
static bool is_running;
static bool is_ours; /* the table is this process's, so its links are watched here */
/* Whether the next orphans are to be reported: once for all links of a backend. */
static atomic_bool has_news;

/* State of moves; the thread's alone. */
static unsigned nr_looks_left;
static bool is_reported;

static ino_t inode_of(int fd)
{
	struct stat status;

	return fd >= 0 && fstat(fd, &status) == 0 ? status.st_ino : 0;
}

static bool is_alone(void)
{
	char text[512];
	int fd = (int)real_openat(AT_FDCWD, "/proc/self/stat", O_RDONLY | O_CLOEXEC, 0);
	ssize_t length = fd < 0 ? -1 : read(fd, text, sizeof(text) - 1);
	char *field;

	if (fd >= 0)
		real_close(fd);
	if (length <= 0)
		return false;
	text[length] = '\0';
	/* Field 2, the name, ends there; field 3 is the state, field 20 the number of threads. */
	field = strrchr(text, ')');
	if (!field || strncmp(field, ") Z", 3) != 0)
		return false;
	for (int no = 2; field && no < 20; no++)
		field = strchr(field + 1, ' ');
	return field && atoi(field) == 2; /* this thread, and the main one, which waits for it */
}

/* The caller must hold list_lock. */
static void add_orphan(const struct watched *lost)
{
	for (unsigned i = TABLE_MAX_LINKS; i < 2 * TABLE_MAX_LINKS; i++) {
		if (list[i].is_orphan)
			continue;
		list[i] = *lost;
		list[i].uffd = fcntl(lost->uffd, F_DUPFD_CLOEXEC, HIDING_FD);
		if (list[i].uffd < 0)
			list[i].uffd = fcntl(lost->uffd, F_DUPFD_CLOEXEC, 0);
		list[i].connection_fd = -1;
		list[i].is_orphan = list[i].uffd >= 0;
		return;
	}
}

/* Makes orphans of the links whose connection has ended, and reports it. */
static void find_orphans(void)
{
	unsigned nr_found = 0;
	bool is_news;

	pthread_mutex_lock(&list_lock);
	for (unsigned i = 0; i < TABLE_MAX_LINKS; i++) {
		struct watched *one = &list[i];

		if (one->connection_ino == 0 || one->is_moved || !orphan_is(one->connection_fd) ||
		    inode_of(one->connection_fd) != one->connection_ino || inode_of(one->uffd) != one->uffd_ino)
			continue;
		add_orphan(one);
		one->connection_ino = 0;
		nr_found++;
	}
	pthread_mutex_unlock(&list_lock);
	if (nr_found == 0)
		return;
	is_news = atomic_exchange(&has_news, false);
	for (unsigned i = TABLE_MAX_LINKS; i < 2 * TABLE_MAX_LINKS; i++)
		if (list[i].is_orphan)
			orphan_wake(list[i].uffd);
	if (!is_news)
		return;
	report("this program lost its backend, and none comes after it: touching pages that are not in memory is "
	       "SIGBUS from now on; see the backend's log, and start this program again");
}

static void answer_orphans(void)
{
	for (unsigned i = TABLE_MAX_LINKS; i < 2 * TABLE_MAX_LINKS; i++)
		if (list[i].is_orphan &&
		    (inode_of(list[i].uffd) != list[i].uffd_ino || orphan_answer(list[i].uffd) < 0))
			list[i].is_orphan = false;
}

/* Reads the events that backends send.  To end a link over its connection, a caller must call orphans_let_go first. */
static void hear_events(void)
{
	static char text[4096];
	struct packet packet;

	pthread_mutex_lock(&list_lock);
	for (unsigned i = 0; i < TABLE_MAX_LINKS; i++) {
		struct watched *one = &list[i];
		struct pollfd ready = {.fd = one->connection_fd, .events = POLLIN};

		while (one->connection_ino != 0 && !one->is_moved && !one->is_asked && poll(&ready, 1, 0) == 1 &&
		       (ready.revents & POLLIN) && inode_of(one->connection_fd) == one->connection_ino &&
		       packet_receive(one->connection_fd, text, sizeof(text), &packet) == 0) {
			while (packet.nr_fds > 0)
				real_close(packet.fds[--packet.nr_fds]);
			one->is_moved = packet.tag == 0 && moves_hear(packet.json);
			if (one->is_moved)
				nr_looks_left = 0;
		}
	}
	pthread_mutex_unlock(&list_lock);
}

static void read_left(void)
{
	struct uffd_msg messages[16];

	for (unsigned i = 0; i < TABLE_MAX_LINKS; i++)
		while (list[i].is_left && read(list[i].uffd, messages, sizeof(messages)) > 0)
			;
}

static bool is_any_moved(void)
{
	bool is_any = false;

	pthread_mutex_lock(&list_lock);
	for (unsigned i = 0; i < TABLE_MAX_LINKS; i++)
		is_any |= list[i].is_moved;
	pthread_mutex_unlock(&list_lock);
	return is_any;
}

/* Tries once to move each link, or the rest of it, that must follow its guest; 0, or the last error. */
static int take_moved(void)
{
	int err = 0;

	for (unsigned i = 0; i < TABLE_MAX_LINKS; i++) {
		struct watched *one = &list[i];
		int taken;

		/* The program may have closed our descriptors. */
		if (inode_of(one->uffd) != one->uffd_ino || (one->connection_ino == 0 && !one->is_left))
			one->is_moved = false;
		if (!one->is_moved)
			continue;
		taken = moves_take(i, one->is_left);
		err = taken < 0 ? taken : err;
	}
	return err;
}

static void try_moves(void)
{
	char why[300];
	sigset_t signals;
	int err;

	if (!is_any_moved() || (nr_looks_left > 0 && nr_looks_left-- > 0) || !lock_try(&signals))
		return;
	report_keep(true);
	err = take_moved();
	report_keep(false);
	snprintf(why, sizeof(why), "%s", report_kept());
	lock_release(&signals);
	nr_looks_left = err < 0 ? NR_LOOKS_BETWEEN : 0;
	if (err < 0 && !is_reported)
		report("this program's guest moved to %s, where it cannot follow yet, and tries again: %s",
		       moves_target(), why);
	is_reported = err < 0;
}

/* Waits for events; false if none came for a while. */
static bool await(void)
{
	struct pollfd fds[2 * TABLE_MAX_LINKS];
	bool is_any_moved = false;
	nfds_t nr = 0;

	pthread_mutex_lock(&list_lock);
	for (unsigned i = 0; i < 2 * TABLE_MAX_LINKS; i++) {
		is_any_moved |= list[i].is_moved;
		if (list[i].is_orphan || list[i].is_left)
			fds[nr++] = (struct pollfd){.fd = list[i].uffd, .events = POLLIN};
		else if (list[i].connection_ino != 0 && !list[i].is_moved && !list[i].is_asked)
			fds[nr++] = (struct pollfd){.fd = list[i].connection_fd, .events = POLLIN};
	}
	pthread_mutex_unlock(&list_lock);
	return poll(fds, nr, is_any_moved ? LOOK_MOVED_MS : LOOK_MS) != 0;
}

static void forget_closed(void)
{
	pthread_mutex_lock(&list_lock);
	for (unsigned i = 0; i < TABLE_MAX_LINKS; i++)
		if (list[i].connection_ino != 0 && inode_of(list[i].connection_fd) != list[i].connection_ino)
			list[i].connection_ino = 0;
	pthread_mutex_unlock(&list_lock);
}

static void *run(void *unused)
{
	(void)unused;
	while (await() || !is_alone()) {
		hear_events();
		find_orphans();
		answer_orphans();
		read_left();
		forget_closed();
		try_moves();
	}
	pthread_mutex_lock(&list_lock);
	is_running = false;
	pthread_mutex_unlock(&list_lock);
	return NULL;
}

static void start(void)
{
	pthread_attr_t attributes;
	sigset_t all, before;
	pthread_t thread;

	/* The program's signals are for the program's threads. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK_BYTES);
	pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
	is_running = pthread_create(&thread, &attributes, run, NULL) == 0;
	pthread_attr_destroy(&attributes);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
}

void orphans_look(void)
{
	bool is_any = false;

	pthread_mutex_lock(&list_lock);
	for (unsigned i = 0; i < TABLE_MAX_LINKS; i++) {
		const struct link *link = &table_links[i];
		struct watched *one = &list[i];

		if (link->nr_ranges == 0) {
			*one = (struct watched){.connection_fd = -1, .uffd = -1};
		} else if (one->connection_fd != link->connection_fd || one->uffd != link->uffd) {
			atomic_store(&has_news, true);
			*one = (struct watched){
				.connection_fd = link->connection_fd,
				.uffd = link->uffd,
				.connection_ino = inode_of(link->connection_fd),
				.uffd_ino = inode_of(link->uffd),
			};
		}
		is_any |= one->connection_ino != 0;
	}
	if (is_any && is_ours && !is_running)
		start();
	pthread_mutex_unlock(&list_lock);
}

void orphans_let_go(unsigned link_no)
{
	pthread_mutex_lock(&list_lock);
	list[link_no] = (struct watched){.connection_fd = -1, .uffd = -1};
	pthread_mutex_unlock(&list_lock);
}

void orphans_ask(unsigned link_no, bool on)
{
	pthread_mutex_lock(&list_lock);
	list[link_no].is_asked = on;
	pthread_mutex_unlock(&list_lock);
}

void orphans_hear(unsigned link_no, struct json event)
{
	pthread_mutex_lock(&list_lock);
	list[link_no].is_moved |= moves_hear(event);
	pthread_mutex_unlock(&list_lock);
}

void orphans_leave(unsigned link_no)
{
	pthread_mutex_lock(&list_lock);
	list[link_no].is_moved = list[link_no].is_left = true;
	pthread_mutex_unlock(&list_lock);
}

void orphans_take_on(unsigned link_no)
{
	pthread_mutex_lock(&list_lock);
	list[link_no].is_moved = list[link_no].is_left = false;
	pthread_mutex_unlock(&list_lock);
}

void orphans_begin(void)
{
	is_ours = true;
}

void orphans_forget(void)
{
	/* The thread may have held it when the copy was made.  Its descriptors stay open: others may share them. */
	pthread_mutex_init(&list_lock, NULL);
	for (unsigned i = 0; i < 2 * TABLE_MAX_LINKS; i++)
		list[i] = (struct watched){.connection_fd = -1, .uffd = -1};
	is_running = is_ours = false;
}
