/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The guest's half of a move.  It is in C and has a thread of its own: the program's thread that waits for a withheld
 * write may hold the interpreter's lock, and waits until the move is done.
 *
 *   receive {"event": "moved", "uri", "token"}
 *   connect there; hello; open with the token, which returns its frames; map these elsewhere, guarded
 *   send close to the old backend: once it has answered, or is gone, nobody answers the old mapping's faults
 *   put the new mapping in the place of the old (replace.c); send region; faults are answered again
 *
 * Every failure is retried, for as long as it takes: the private pages are at the target and nowhere else.  open has
 * "moved": true, so that no backend takes the guest for a new one without pages.  The old mapping stays as it is until
 * the new one is there: mapped pages can be read, and writes wait.
 *
 * Where nothing can be mapped the region becomes inaccessible, once nobody views its memory (follower_begin_view), and
 * reads and writes through the library go on by bytes.
 *
 * The successor of a backend that dies has the same connection.  The connection's end means that there is none: then
 * the thread answers the faults (orphan.h), until it is stopped.
 */
#define _GNU_SOURCE
#include "transport/core/guest/follow.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include "cache/core/abi.h"
#include "transport/core/guest/orphan.h"
#include "transport/core/guest/handshake.h"

#define STACK_BYTES (128u << 10)
#define ROOM_BYTES (64u << 10)
#define REQUEST_BYTES (8u << 10)
#define REPLY_MS 60000
#define CLOSE_MS 5000
#define PAUSE_MS 200
#define MAX_SENT_ON 8
#define TAKEN_AWAY (-1)

struct follower {
	struct region *region;
	int connection_fd;
	int kick_fd;
	int target_fd;       /* -1, or a connection to the target that has not replaced the old one */
	struct region fresh; /* a mapping that has not replaced the old one, if it has an address */
	bool old_let_go;     /* the old backend answers no more */
	_Atomic bool stop;
	_Atomic int nr_views; /* or TAKEN_AWAY */
	pthread_t thread;
	pthread_mutex_t lock; /* for status */
	struct follow_status status;
	bool follows;
	char guest[72];
	char digest[136];
	char *open_request;
	char *request; /* REQUEST_BYTES */
	char *room;    /* ROOM_BYTES */
	struct handshake handshake;
	int reply_ms; /* how long to wait for a reply; -1: without limit */
};

static void note_why(struct follower *f, const char *format, ...) __attribute__((format(printf, 2, 3)));

static void note_why(struct follower *f, const char *format, ...)
{
	va_list arguments;

	pthread_mutex_lock(&f->lock);
	va_start(arguments, format);
	vsnprintf(f->status.why, sizeof(f->status.why), format, arguments);
	va_end(arguments);
	pthread_mutex_unlock(&f->lock);
}

static void set_state(struct follower *f, enum follow_state state)
{
	__atomic_store_n(&f->status.state, (int)state, __ATOMIC_RELEASE);
}

/* Waits for a descriptor (-1: for nothing), or a kick: 1 ready, 0 time is up or kicked, -ECANCELED to stop. */
static int wait_for(struct follower *f, int fd, short events, int milliseconds)
{
	struct pollfd fds[2] = {{.fd = fd, .events = events}, {.fd = f->kick_fd, .events = POLLIN}};
	eventfd_t kicks;

	if (poll(fds, 2, milliseconds) > 0 && fds[1].revents)
		eventfd_read(f->kick_fd, &kicks);
	if (atomic_load(&f->stop))
		return -ECANCELED;
	return fds[0].revents != 0;
}

static int handshake_wait(struct handshake *handshake, short events)
{
	struct follower *f = (struct follower *)((char *)handshake - offsetof(struct follower, handshake));
	int ready;

	do
		ready = wait_for(f, handshake->fd, events, f->reply_ms);
	while (ready == 0 && f->reply_ms < 0);
	return ready;
}

/* Directs the next requests to that connection, and waits for each reply for reply_ms; -1: without limit. */
static struct handshake *speak_with(struct follower *f, int fd, int reply_ms)
{
	f->handshake.fd = fd;
	f->handshake.asked = 0;
	f->reply_ms = reply_ms;
	return &f->handshake;
}

/* Notes where to go. */
static void note_place(struct follower *f, const char *uri)
{
	pthread_mutex_lock(&f->lock);
	snprintf(f->status.uri, sizeof(f->status.uri), "%s", uri);
	pthread_mutex_unlock(&f->lock);
	set_state(f, FOLLOW_MOVES);
}

/* Reads the target's URI, and the token for it, from an event; false if these cannot be used. */
static bool take_place(struct follower *f, struct json event)
{
	struct json token;
	char uri[sizeof(f->status.uri)];

	if (!json_text(event, "uri", uri, sizeof(uri)) || !uri[0] || !json_raw(event, "token", &token) ||
	    token.length < 2 || token.length >= sizeof(f->status.token) || token.text[0] != '"')
		return false;
	pthread_mutex_lock(&f->lock);
	memcpy(f->status.token, token.text, token.length);
	f->status.token[token.length] = '\0';
	pthread_mutex_unlock(&f->lock);
	note_place(f, uri);
	return true;
}

/* Notes why the target refuses the guest, or where it redirects us. */
static int note_refusal(struct follower *f, int err)
{
	if (err == -EREMCHG)
		note_place(f, f->handshake.moved_to);
	else if (err == -EACCES)
		note_why(f, "%s refuses the guest: %s", f->status.uri, f->handshake.message);
	return err;
}

static int dial(struct follower *f)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	const char *path = f->status.uri + strlen("unix://");

	if (strlen(path) >= sizeof(address.sun_path))
		return -ENAMETOOLONG;
	strcpy(address.sun_path, path);
	f->target_fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
	if (f->target_fd < 0 || connect(f->target_fd, (const struct sockaddr *)&address, sizeof(address)) < 0)
		return -errno;
	return note_refusal(f, handshake_hello(speak_with(f, f->target_fd, REPLY_MS)));
}

/* Maps the image that the target opened; its descriptors stay the caller's. */
static int map_image(struct follower *f, const struct guest_image *image)
{
	int stage, err;

	if (image->map_bytes != f->region->map_bytes ||
	    (image->digest[0] && f->digest[0] && strcmp(image->digest, f->digest) != 0)) {
		note_why(f, "%s serves another image under that name", f->status.uri);
		return -EACCES;
	}
	/* Without this feature a mapping that is moved loses its guard. */
	if (!(image->uffd_features & UFFD_FEATURE_EVENT_REMAP))
		return -EPROTO;
	f->fresh.read_only = f->region->read_only;
	err = region_init(&f->fresh, image->memfd, image->map_bytes, image->uffd_device, image->uffd_features, &stage);
	if (err < 0) {
		note_why(f, "cannot map the image of %s (step %d): %s", f->status.uri, stage, strerror(-err));
		return -EACCES;
	}
	return 0;
}

static int open_there(struct follower *f)
{
	struct guest_image image;
	int err;

	err = snprintf(f->request, REQUEST_BYTES, "%s,\"token\":%s}", f->open_request, f->status.token);
	if (err < 0 || (unsigned)err >= REQUEST_BYTES)
		return -EMSGSIZE;
	err = note_refusal(f, handshake_open(speak_with(f, f->target_fd, REPLY_MS), f->request, &image));
	if (err < 0)
		return err;
	err = map_image(f, &image);
	if (err == 0) {
		pthread_mutex_lock(&f->lock);
		memcpy(f->status.generation, image.generation, sizeof(f->status.generation));
		f->status.extent_bytes = image.extent_bytes;
		pthread_mutex_unlock(&f->lock);
	}
	handshake_close_image(&image);
	return err;
}

/* Makes the old backend release the mapping: after this it does nothing more to it. */
static int leave_old(struct follower *f)
{
	int err = -ETIMEDOUT;

	/* A backend that died meanwhile may have lost the request: ask its successor again. */
	while (err == -ETIMEDOUT && !f->old_let_go)
		err = handshake_close(speak_with(f, f->connection_fd, CLOSE_MS));
	if (err == -ECANCELED)
		return err;
	f->old_let_go = true;
	return 0;
}

static void drop_tries(struct follower *f)
{
	if (f->target_fd >= 0)
		close(f->target_fd);
	f->target_fd = -1;
	if (f->fresh.address)
		region_deinit(&f->fresh);
}

/* Gives the mapping to the target. After a failure it must be made anew. */
static int hand_over(struct follower *f)
{
	const struct region *r = f->region;
	const int fds[3] = {r->uffd, r->pagemap_fd, r->mem_fd};
	/* Without limit: if the target gets the request and dies, its successor goes on at this connection. */
	struct handshake *handshake = speak_with(f, f->target_fd, -1);
	int err = note_refusal(f, handshake_region(handshake, r->address, r->map_bytes, fds, ""));

	if (err < 0)
		return err;
	if (dup3(f->target_fd, f->connection_fd, O_CLOEXEC) < 0)
		return -errno;
	return 0;
}

static void begin_swap(struct region *r)
{
	__atomic_store_n(&r->epoch, r->epoch | 1, __ATOMIC_RELEASE);
}

static void end_swap(struct region *r)
{
	__atomic_store_n(&r->epoch, (r->epoch | 1) + 1, __ATOMIC_RELEASE);
}

static int move_once(struct follower *f)
{
	int err = dial(f);

	if (err == 0)
		err = open_there(f);
	if (err == 0)
		err = leave_old(f);
	if (err < 0)
		return err;
	begin_swap(f->region);
	err = region_replace(f->region, &f->fresh);
	if (err == 0)
		err = hand_over(f);
	if (err < 0)
		return err;
	f->old_let_go = false;
	pthread_mutex_lock(&f->lock);
	f->status.nr_moves++;
	f->status.why[0] = '\0';
	pthread_mutex_unlock(&f->lock);
	set_state(f, FOLLOW_LISTENS);
	end_swap(f->region);
	return 0;
}

/* Goes on by bytes: makes the memory inaccessible, or fails with -EBUSY while somebody views it. */
static int take_away(struct follower *f)
{
	int nobody = 0, err;

	if (!atomic_compare_exchange_strong(&f->nr_views, &nobody, TAKEN_AWAY)) {
		note_why(f, "its memory is in use: release every view, so that it goes on by bytes at %s",
		         f->status.uri);
		return -EBUSY;
	}
	err = leave_old(f);
	if (err < 0)
		return err;
	begin_swap(f->region);
	/* Before any thread is woken: its access then fails, and this says why. */
	set_state(f, FOLLOW_BYTES);
	while ((err = region_revoke(f->region)) < 0 && wait_for(f, -1, 0, PAUSE_MS) >= 0)
		note_why(f, "cannot give up its memory: %s", strerror(-err));
	end_swap(f->region);
	return err;
}

/* Retries until it has followed the guest; -ECANCELED to stop. */
static int follow_to(struct follower *f)
{
	unsigned nr_sent_on = 0;
	int err;

	for (;;) {
		bool maps = strncmp(f->status.uri, "unix://", strlen("unix://")) == 0;

		err = maps ? move_once(f) : take_away(f);
		drop_tries(f);
		if (err == 0 || err == -ECANCELED)
			return err;
		if (err == -EREMCHG && nr_sent_on++ < MAX_SENT_ON)
			continue;
		if (err != -EACCES && err != -EBUSY && err != -EREMCHG)
			note_why(f, "%s: %s; trying again", f->status.uri, strerror(-err));
		nr_sent_on = 0;
		if (wait_for(f, -1, 0, err == -EBUSY ? -1 : PAUSE_MS) < 0)
			return -ECANCELED;
	}
}

/* The backend is gone for good: until the thread is stopped, touching an absent page is SIGBUS. */
static void answer_as_orphan(struct follower *f)
{
	orphan_wake(f->region->uffd);
	orphan_report(
		"guest %s lost its backend, and none comes after it: touching pages that are not in memory is SIGBUS "
		"from now on; see the backend's log, and start this program again",
		f->guest);
	while (orphan_answer(f->region->uffd) == 0 && wait_for(f, f->region->uffd, POLLIN, -1) >= 0)
		;
}

/* Waits for the connection's end. Reads nothing: the program does that. */
static int await_end(struct follower *f)
{
	int ready;

	while ((ready = wait_for(f, f->connection_fd, 0, -1)) == 0)
		;
	return ready < 0 ? ready : -EPIPE;
}

static void *follower_run(void *argument)
{
	struct follower *f = argument;
	struct packet event;
	char what[16];
	int err = f->follows ? 0 : await_end(f);

	while (err == 0 && f->status.state == FOLLOW_LISTENS) {
		err = packet_receive(f->connection_fd, f->room, ROOM_BYTES, &event);
		if (err == -EAGAIN) {
			err = wait_for(f, f->connection_fd, POLLIN, -1) < 0 ? -ECANCELED : 0;
			continue;
		}
		if (err < 0)
			continue;
		packet_close_fds(&event);
		if (json_text(event.json, "event", what, sizeof(what)) && strcmp(what, "moved") == 0 &&
		    take_place(f, event.json))
			err = follow_to(f);
	}
	if (err != -ECANCELED && f->status.state == FOLLOW_LISTENS)
		set_state(f, FOLLOW_ENDED);
	if (err != -ECANCELED && follower_state(f) == FOLLOW_ENDED && orphan_is(f->connection_fd))
		answer_as_orphan(f);
	return NULL;
}

static void follower_free(struct follower *f)
{
	if (f->kick_fd >= 0)
		close(f->kick_fd);
	free(f->open_request);
	free(f->request);
	free(f->room);
	free(f);
}

static int start_thread(struct follower *f)
{
	sigset_t all, before;
	pthread_attr_t attributes;
	int err;

	/* The program's signals are for the program's threads. */
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	pthread_attr_init(&attributes);
	pthread_attr_setstacksize(&attributes, STACK_BYTES);
	err = pthread_create(&f->thread, &attributes, follower_run, f);
	pthread_attr_destroy(&attributes);
	pthread_sigmask(SIG_SETMASK, &before, NULL);
	return -err;
}

int follower_start(struct region *region, int connection_fd, bool follows, const char *guest, const char *open_request,
                   const char *digest, struct follower **follower_out)
{
	struct follower *f = calloc(1, sizeof(*f));
	int err = 0;

	if (!f)
		return -ENOMEM;
	f->region = region;
	f->connection_fd = connection_fd;
	f->follows = follows;
	snprintf(f->guest, sizeof(f->guest), "%s", guest);
	f->target_fd = -1;
	f->fresh = (struct region){.uffd = -1, .pagemap_fd = -1, .mem_fd = -1};
	pthread_mutex_init(&f->lock, NULL);
	snprintf(f->digest, sizeof(f->digest), "%s", digest);
	f->open_request = strdup(open_request);
	f->request = malloc(REQUEST_BYTES);
	f->room = malloc(ROOM_BYTES);
	f->handshake = (struct handshake){.room = f->room, .room_bytes = ROOM_BYTES, .wait = handshake_wait};
	f->kick_fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
	if (f->kick_fd < 0)
		err = -errno;
	else if (!f->open_request || !f->request || !f->room)
		err = -ENOMEM;
	else
		err = start_thread(f);
	if (err < 0) {
		follower_free(f);
		return err;
	}
	*follower_out = f;
	return 0;
}

void follower_stop(struct follower *f)
{
	atomic_store(&f->stop, true);
	eventfd_write(f->kick_fd, 1);
	pthread_join(f->thread, NULL);
	drop_tries(f);
	pthread_mutex_destroy(&f->lock);
	follower_free(f);
}

void follower_forget(struct follower *f)
{
	if (f->target_fd >= 0)
		close(f->target_fd);
	if (f->fresh.address)
		region_forget(&f->fresh);
	follower_free(f);
}

int follower_state(const struct follower *f)
{
	return __atomic_load_n(&f->status.state, __ATOMIC_ACQUIRE);
}

void follower_read(struct follower *f, struct follow_status *status_out)
{
	pthread_mutex_lock(&f->lock);
	*status_out = f->status;
	pthread_mutex_unlock(&f->lock);
}

int follower_begin_view(struct follower *f)
{
	int nr = atomic_load(&f->nr_views);

	while (nr != TAKEN_AWAY)
		if (atomic_compare_exchange_weak(&f->nr_views, &nr, nr + 1))
			return 0;
	return -EXDEV;
}

void follower_end_view(struct follower *f)
{
	if (atomic_fetch_sub(&f->nr_views, 1) == 1)
		eventfd_write(f->kick_fd, 1);
}
