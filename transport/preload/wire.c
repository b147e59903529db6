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

/* One request at a time is under way, and each takes the same tag, but for the last of a connection: a successor of the
   backend's may answer again what had been answered. Events, which nobody asked for, have none. */
#define TAG 1
#define TAG_OF_LAST 2
#define TAG_OF_EVENTS 0
#define SLICE_MICROSECONDS 50000
#define REPLY_SECONDS 60 /* in all, for a call of the program's */
#define FAREWELL_SECONDS 5

static char reply_text[16 << 10];
char wire_moved_to[108];

/* A call on the socket comes back after this: then lock_wait says whether to go on. */
static int set_timeout(int fd)
{
	struct timeval limit = {.tv_usec = SLICE_MICROSECONDS};

	if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)) < 0 ||
	    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit)) < 0)
		return -errno;
	return 0;
}

static int send_request(int fd, uint32_t tag, const char *request, const int *fds, unsigned nr_fds,
                        unsigned limit_seconds)
{
	int err;

	while ((err = packet_send(fd, tag, request, fds, nr_fds)) == -EAGAIN) {
		err = lock_wait(limit_seconds);
		if (err < 0)
			break;
	}
	return err;
}

/* A refusal without a tag is of whatever we asked: the backend had no room to make out which. */
static bool is_reply(const struct packet *reply, uint32_t tag)
{
	struct json refused;

	return reply->tag == tag || (reply->tag == TAG_OF_EVENTS && json_object(reply->json, "error", &refused));
}

static int receive_reply(int fd, uint32_t tag, unsigned limit_seconds, struct packet *reply)
{
	int err = 0;

	while (err == 0) {
		err = packet_receive(fd, reply_text, sizeof(reply_text), reply);
		if (err == 0 && is_reply(reply, tag))
			return 0;
		if (err == 0) {
			packet_close_fds(reply);
			err = reply->tag < tag ? lock_wait(limit_seconds) : -EPROTO;
		} else if (err == -EAGAIN) {
			err = lock_wait(limit_seconds);
		}
	}
	return err;
}

void reply_close_fds(struct packet *reply)
{
	while (reply->nr_fds > 0)
		real_close(reply->fds[--reply->nr_fds]);
}

static void say_failure(int err)
{
	if (err == -EACCES || err == -EINTR)
		return; /* said where it was refused; not over */
	if (err == -EMFILE) {
		report("no mapping of the image: this process has too many descriptors; raise its limit (ulimit -n), "
		       "or close some");
		return;
	}
	report("no mapping of the image: the backend at %s: %s; see 'cowshed status' and its log", config.socket_path,
	       strerrordesc_np(-err));
}

bool wire_take_path(struct json json, char path_out[static sizeof(wire_moved_to)])
{
	const char *scheme = "unix://";
	char uri[sizeof(wire_moved_to) + 8];

	/* What does not fit is cut, and then it is as long as the room. */
	if (!json_text(json, "uri", uri, sizeof(uri)) || strncmp(uri, scheme, strlen(scheme)) != 0 ||
	    strlen(uri) - strlen(scheme) >= sizeof(wire_moved_to))
		return false;
	strcpy(path_out, uri + strlen(scheme));
	return true;
}

/* Says what was refused, unless it is that the guest is elsewhere now. */
static int refused(struct json reply)
{
	char kind[32], why[800];
	struct json error;

	if (!json_object(reply, "error", &error) || !json_text(error, "message", why, sizeof(why)))
		return -EPROTO;
	json_text(error, "kind", kind, sizeof(kind));
	if (strcmp(kind, "moved") == 0 && wire_take_path(error, wire_moved_to))
		return -EREMCHG;
	report("no mapping of the image: the backend refused it: %s", why);
	return -EACCES;
}

static int ask(int fd, uint32_t tag, const char *request, const int *fds, unsigned nr_fds, unsigned limit_seconds,
               struct packet *reply)
{
	int err = send_request(fd, tag, request, fds, nr_fds, limit_seconds);

	if (err < 0 && !wire_is_gone(err))
		return err;
	err = receive_reply(fd, tag, limit_seconds, reply); /* it may have said why before it hung up */
	return err == 0 && !json_is_true(reply->json, "ok") ? refused(reply->json) : err;
}

int wire_ask(int connection_fd, const char *request, const int *fds, unsigned nr_fds, struct packet *reply_out)
{
	struct packet reply = {.nr_fds = 0};
	int err = ask(connection_fd, TAG, request, fds, nr_fds, REPLY_SECONDS, &reply);

	if (err < 0) {
		reply_close_fds(&reply);
		if (!wire_is_gone(err))
			say_failure(err);
		return err;
	}
	*reply_out = reply;
	return 0;
}

void wire_report_gone(int err)
{
	if (wire_is_gone(err))
		say_failure(err);
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
	struct packet reply;
	int fd, err;

	_Static_assert(sizeof(address.sun_path) == sizeof(config.socket_path), "the path fits, with its end");
	memcpy(address.sun_path, config.socket_path, sizeof(config.socket_path));
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (fd < 0) {
		err = -errno;
		say_failure(err);
		return err;
	}
	err = set_timeout(fd);
	if (err == 0)
		err = connect_retrying(fd, &address);
	if (err < 0) {
		say_failure(err);
	} else {
		err = wire_ask(fd, "{\"op\":\"hello\",\"version\":1,\"features\":[]}", NULL, 0, &reply);
		if (err == 0)
			reply_close_fds(&reply);
	}
	if (err < 0) {
		real_close(fd);
		return err;
	}
	return fd;
}

static int open_source(void)
{
	struct packet reply;
	int err = -EPIPE;

	for (int i = 0; i < WIRE_TRIES && wire_is_gone(err); i++) {
		int fd = wire_connect();

		err = fd < 0 ? fd : wire_ask(fd, config.describe_request, NULL, 0, &reply);
		if (fd >= 0)
			real_close(fd);
	}
	wire_report_gone(err);
	if (err < 0)
		return err;
	if (reply.nr_fds != 1) {
		reply_close_fds(&reply);
		say_failure(-EPROTO);
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

int wire_leave(int connection_fd)
{
	struct packet reply = {.nr_fds = 0};
	int err;

	lock_be_patient(true);
	err = ask(connection_fd, TAG_OF_LAST, "{\"op\":\"close\"}", NULL, 0, REPLY_SECONDS, &reply);
	lock_be_patient(false);
	reply_close_fds(&reply);
	return wire_is_gone(err) ? 0 : err;
}

int wire_farewell(int connection_fd)
{
	struct packet reply = {.nr_fds = 0};
	int err = ask(connection_fd, TAG_OF_LAST, "{\"op\":\"close\"}", NULL, 0, FAREWELL_SECONDS, &reply);

	reply_close_fds(&reply);
	return err == -EINTR ? err : 0;
}
