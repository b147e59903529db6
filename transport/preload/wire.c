/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "transport/preload/wire.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

#include "transport/preload/real.h"
#include "transport/preload/config.h"

#define SLICE_MICROSECONDS 50000
#define REPLY_SECONDS 60 /* in all, for one call of the program */
#define FAREWELL_SECONDS 5
#define WRITABLE_SECONDS 5
#define WRITABLE_TRIES 12

static char reply_text[16 << 10];
static unsigned limit_seconds;
char wire_moved_to[108];

/* Runs when a call on the socket timed out: lock_wait decides whether to go on. */
static int wait_on(struct handshake *handshake, short events)
{
	int err = lock_wait(limit_seconds);

	(void)handshake;
	(void)events;
	return err < 0 ? err : 1;
}

static struct handshake handshake = {.room = reply_text, .room_bytes = sizeof(reply_text), .wait = wait_on};

static struct handshake *speak_with(int fd, unsigned seconds)
{
	handshake.fd = fd;
	handshake.asked = 0;
	limit_seconds = seconds;
	return &handshake;
}

/* Makes calls on the socket time out after a slice, so that lock_wait can decide whether to go on. */
static int set_timeout(int fd)
{
	struct timeval limit = {.tv_usec = SLICE_MICROSECONDS};

	if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)) < 0 ||
	    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit)) < 0)
		return -errno;
	return 0;
}

static void report_failure(int err)
{
	if (err == -EACCES || err == -EINTR)
		return; /* reported by refused(); to be called again */
	if (err == -EMFILE) {
		report("no mapping of the image: this process has too many descriptors; raise its limit (ulimit -n), "
		       "or close some");
		return;
	}
	report("no mapping of the image: the backend at %s: %s; see 'cowshed status' and its log", config.socket_path,
	       strerrordesc_np(-err));
}

static bool take_path(const char *uri, char path_out[static sizeof(wire_moved_to)])
{
	const char *scheme = "unix://";

	if (strncmp(uri, scheme, strlen(scheme)) != 0 || strlen(uri) - strlen(scheme) >= sizeof(wire_moved_to))
		return false;
	strcpy(path_out, uri + strlen(scheme));
	return true;
}

bool wire_take_path(struct json json, char path_out[static sizeof(wire_moved_to)])
{
	char uri[sizeof(wire_moved_to) + 8];

	/* json_text cuts a longer URI to the size of the buffer, which take_path refuses. */
	return json_text(json, "uri", uri, sizeof(uri)) && take_path(uri, path_out);
}

/* Reports a refusal, unless it redirects to another backend. */
static int refused(int err)
{
	if (err == -EREMCHG && take_path(handshake.moved_to, wire_moved_to))
		return err;
	if (err != -EREMCHG && err != -EACCES)
		return err;
	report("no mapping of the image: the backend refused it: %s", handshake.message);
	return -EACCES;
}

/* Reports a failure, unless callers do (wire_is_gone). */
static int failed(int err)
{
	err = refused(err);
	if (err < 0 && !wire_is_gone(err))
		report_failure(err);
	return err;
}

void wire_report_gone(int err)
{
	if (wire_is_gone(err))
		report_failure(err);
}

/* Interrupted like any call on a socket with a time limit, see packets.c. */
static int connect_retrying(int fd, const struct sockaddr_un *address)
{
	int err = 0;

	while (err == 0 && connect(fd, (const struct sockaddr *)address, sizeof(*address)) < 0)
		if (errno != EINTR)
			err = errno == EAGAIN ? lock_wait(REPLY_SECONDS) : -errno;
	return err;
}

int wire_connect(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int fd, err;

	_Static_assert(sizeof(address.sun_path) == sizeof(config.socket_path), "the path fits, with its NUL");
	memcpy(address.sun_path, config.socket_path, sizeof(config.socket_path));
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (fd < 0) {
		err = -errno;
		report_failure(err);
		return err;
	}
	err = set_timeout(fd);
	if (err == 0)
		err = connect_retrying(fd, &address);
	if (err < 0) {
		report_failure(err);
	} else {
		err = failed(handshake_hello(speak_with(fd, REPLY_SECONDS)));
	}
	if (err < 0) {
		real_close(fd);
		return err;
	}
	return fd;
}

int wire_open(int connection_fd, const char *request, struct guest_image *image_out)
{
	int err = handshake_open(speak_with(connection_fd, REPLY_SECONDS), request, image_out);

	if (err != -EPROTO)
		return failed(err);
	report("no mapping of the image: the backend's reply is malformed; is it another version?");
	return err;
}

int wire_region(int connection_fd, uintptr_t address, uint64_t nr_bytes, const int fds[3], bool inherited)
{
	return failed(handshake_region(speak_with(connection_fd, REPLY_SECONDS), (const void *)address, nr_bytes, fds,
	                               inherited ? ",\"inherited\":true" : ""));
}

static int describe(int connection_fd, struct packet *reply_out)
{
	return failed(handshake_ask(speak_with(connection_fd, REPLY_SECONDS), HANDSHAKE_DESCRIBE,
	                            config.describe_request, NULL, 0, reply_out));
}

static int open_source(void)
{
	struct packet reply;
	int err = -EPIPE;

	for (int i = 0; i < WIRE_TRIES && wire_is_gone(err); i++) {
		int fd = wire_connect();

		err = fd < 0 ? fd : describe(fd, &reply);
		if (fd >= 0)
			real_close(fd);
	}
	wire_report_gone(err);
	if (err < 0)
		return err;
	if (reply.nr_fds != 1) {
		packet_close_fds(&reply);
		report_failure(-EPROTO);
		return -EPROTO;
	}
	return reply.fds[0];
}

int wire_open_source(sigset_t *signals)
{
	int fd;

	while ((fd = open_source()) == -EINTR)
		lock_yield(signals);
	return fd;
}

int wire_make_writable(int connection_fd, void (*hear)(unsigned of, struct json event), unsigned of)
{
	struct packet reply;
	int err = -ETIMEDOUT;

	/* A backend that dies may take the request along: ask its successor, on the same connection. */
	handshake.hear = hear;
	handshake.of = of;
	for (int i = 0; err == -ETIMEDOUT && i < WRITABLE_TRIES; i++)
		err = handshake_ask(speak_with(connection_fd, (unsigned)(i + 1) * WRITABLE_SECONDS), HANDSHAKE_WRITABLE,
		                    "{\"op\":\"writable\"}", NULL, 0, &reply);
	handshake.hear = NULL;

	if (err == 0)
		packet_close_fds(&reply);
	/* A release that does not know the request knows no open regions either. */
	if (err == -EACCES && strcmp(handshake.kind, "unknown") != 0)
		return -EAGAIN;
	if (err == -ETIMEDOUT) /* it lives, and does not charge for writes yet */
		return -EAGAIN;
	return err == -EINTR ? err : 0;
}

int wire_leave(int connection_fd)
{
	int err;

	lock_be_patient(true);
	err = refused(handshake_close(speak_with(connection_fd, REPLY_SECONDS)));
	lock_be_patient(false);
	return err == -EREMCHG ? 0 : err;
}

int wire_farewell(int connection_fd)
{
	int err = refused(handshake_close(speak_with(connection_fd, FAREWELL_SECONDS)));

	return err == -EINTR ? err : 0;
}
