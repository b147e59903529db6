/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "transport/preload/wire.h"

#include <errno.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <sys/un.h>

#include "transport/preload/real.h"
#include "transport/preload/terms.h"

#define MAGIC 0x44485343u
#define VERSION 1
#define REPLY_SECONDS 60
#define FAREWELL_SECONDS 5

struct header {
	uint32_t magic;
	uint16_t version, flags;
	uint32_t tag;
	uint16_t nr_fds, reserved;
	uint32_t total_length, piece_length;
};
_Static_assert(sizeof(struct header) == 24, "the packet header is protocol.py's");

static char reply_text[16 << 10];

static int set_timeout(int fd, time_t seconds)
{
	struct timeval limit = {.tv_sec = seconds};

	if (setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit)) < 0 ||
	    setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit)) < 0)
		return -errno;
	return 0;
}

/*
 * A socket with a time limit is not restarted after an interruption, and blocking signals does not prevent
 * those: io_uring's work in a QEMU that uses it, and SIGCONT after a stop, give EINTR too (signal(7)).
 */
#define RETRIED(call)                                                                                        \
	({                                                                                                   \
		ssize_t retried_result;                                                                      \
                                                                                                             \
		do                                                                                           \
			retried_result = (call);                                                             \
		while (retried_result < 0 && errno == EINTR);                                                \
		retried_result;                                                                              \
	})

static int send_request(int fd, const char *request, const int *fds, unsigned nr_fds)
{
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(WIRE_MAX_FDS * sizeof(int))];
	} control = {0};
	uint32_t length = (uint32_t)strlen(request);
	struct header header = {
		.magic = MAGIC, .version = VERSION, .tag = 1, .nr_fds = (uint16_t)nr_fds,
		.total_length = length, .piece_length = length,
	};
	struct iovec pieces[2] = {{&header, sizeof(header)}, {(char *)(uintptr_t)request, length}};
	struct msghdr message = {.msg_iov = pieces, .msg_iovlen = 2};

	if (nr_fds > 0) {
		message.msg_control = control.room;
		message.msg_controllen = CMSG_SPACE(nr_fds * sizeof(int));
		control.header.cmsg_level = SOL_SOCKET;
		control.header.cmsg_type = SCM_RIGHTS;
		control.header.cmsg_len = CMSG_LEN(nr_fds * sizeof(int));
		memcpy(CMSG_DATA(&control.header), fds, nr_fds * sizeof(int));
	}
	if (RETRIED(sendmsg(fd, &message, MSG_NOSIGNAL)) < 0)
		return errno == EAGAIN ? -ETIMEDOUT : -errno;
	return 0;
}

static void take_fds(struct msghdr *message, struct reply *reply)
{
	for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR(message, part)) {
		if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
			continue;
		/* The room for control messages holds no more of them than fds does. */
		for (size_t i = 0; i < (part->cmsg_len - CMSG_LEN(0)) / sizeof(int); i++)
			memcpy(&reply->fds[reply->nr_fds++], CMSG_DATA(part) + i * sizeof(int),
			       sizeof(int));
	}
}

static int receive_reply(int fd, struct reply *reply)
{
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(WIRE_MAX_FDS * sizeof(int))];
	} control;
	struct header header;
	struct iovec pieces[2] = {{&header, sizeof(header)}, {reply_text, sizeof(reply_text)}};
	struct msghdr message = {
		.msg_iov = pieces, .msg_iovlen = 2,
		.msg_control = control.room, .msg_controllen = sizeof(control.room),
	};
	ssize_t length = RETRIED(recvmsg(fd, &message, MSG_CMSG_CLOEXEC));
	size_t text_length;

	if (length < 0)
		return errno == EAGAIN ? -ETIMEDOUT : -errno;
	if (length == 0)
		return -EPIPE;
	take_fds(&message, reply);
	if ((size_t)length < sizeof(header) || (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)))
		return -EPROTO;
	text_length = (size_t)length - sizeof(header);
	if (header.magic != MAGIC || header.version != VERSION || header.flags != 0 || header.tag != 1 ||
	    header.nr_fds != reply->nr_fds || header.reserved != 0 ||
	    header.total_length != text_length || header.piece_length != text_length)
		return -EPROTO;
	reply->json = (struct json){reply_text, text_length};
	return json_is_object(reply->json) ? 0 : -EPROTO;
}

void reply_close_fds(struct reply *reply)
{
	while (reply->nr_fds > 0)
		real_close(reply->fds[--reply->nr_fds]);
}

static void say_failure(int err)
{
	char why[800];

	if (err == -EACCES)
		return; /* said where it was refused */
	snprintf(why, sizeof(why), "%s", strerrordesc_np(-err));
	say("no mapping of the image: the backend at %s: %s; see 'cowshed status' and its log",
	    terms.socket_path, why);
}

static int ask(int fd, const char *request, const int *fds, unsigned nr_fds, struct reply *reply)
{
	char why[800];
	struct json error;
	int err = send_request(fd, request, fds, nr_fds);

	if (err < 0)
		return err;
	err = receive_reply(fd, reply);
	if (err == 0 && !json_is_true(reply->json, "ok")) {
		if (!json_object(reply->json, "error", &error) ||
		    !json_text(error, "message", why, sizeof(why)))
			return -EPROTO;
		say("no mapping of the image: the backend refused it: %s", why);
		err = -EACCES;
	}
	return err;
}

int wire_ask(int connection_fd, const char *request, const int *fds, unsigned nr_fds, struct reply *reply_out)
{
	struct reply reply = {.nr_fds = 0};
	int err = ask(connection_fd, request, fds, nr_fds, &reply);

	if (err < 0) {
		reply_close_fds(&reply);
		if (!wire_is_gone(err))
			say_failure(err);
		return err;
	}
	*reply_out = reply;
	return 0;
}

void wire_say_gone(int err)
{
	if (wire_is_gone(err))
		say_failure(err);
}

int wire_connect(void)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	struct reply reply;
	int fd, err;

	_Static_assert(sizeof(address.sun_path) == sizeof(terms.socket_path), "the path fits, with its end");
	memcpy(address.sun_path, terms.socket_path, sizeof(terms.socket_path));
	fd = socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0);
	if (fd < 0) {
		err = -errno;
		say_failure(err);
		return err;
	}
	err = set_timeout(fd, REPLY_SECONDS);
	if (err == 0 && RETRIED(connect(fd, (const struct sockaddr *)&address, sizeof(address))) < 0)
		err = errno == EAGAIN ? -ETIMEDOUT : -errno;
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

int wire_open_source(void)
{
	struct reply reply;
	int err = -EPIPE;

	for (int i = 0; i < WIRE_TRIES && wire_is_gone(err); i++) {
		int fd = wire_connect();

		err = fd < 0 ? fd : wire_ask(fd, terms.describe_request, NULL, 0, &reply);
		if (fd >= 0)
			real_close(fd);
	}
	wire_say_gone(err);
	if (err < 0)
		return err;
	if (reply.nr_fds != 1) {
		reply_close_fds(&reply);
		say_failure(-EPROTO);
		return -EPROTO;
	}
	return reply.fds[0];
}

void wire_farewell(int connection_fd)
{
	struct reply reply = {.nr_fds = 0};

	if (set_timeout(connection_fd, FAREWELL_SECONDS) == 0)
		ask(connection_fd, "{\"op\":\"close\"}", NULL, 0, &reply);
	reply_close_fds(&reply);
}
