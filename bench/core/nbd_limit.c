/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An upper bound for NBD servers: it has no disk.  It answers every read from one buffer, drops every write, and
 * answers requests that arrived together with one send.  A client's rate with it is the limit of the client and the
 * socket, which no server exceeds.
 *
 *     nbd_limit SOCKET SIZE_BYTES      listens, prints a line, serves until it is killed
 */
#define _GNU_SOURCE
#include "transport/core/nbd/wire.h"

#include <pthread.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#define IN_BYTES (1u << 18)
#define ANSWER_BYTES (1u << 21)
#define BATCH 64

#define NBD_OPT_EXPORT_NAME 1u
#define NBD_OPT_ABORT 2u
#define NBD_OPT_INFO 6u
#define NBD_OPT_GO 7u
#define NBD_REP_ACK 1u
#define NBD_REP_INFO 3u
#define NBD_REP_ERR_UNSUP ((1u << 31) + 1u)
/* HAS_FLAGS, SEND_FLUSH, SEND_TRIM, CAN_MULTI_CONN */
#define EXPORT_FLAGS (1u | 1u << 2 | 1u << 5 | 1u << 8)

static uint64_t size_bytes;
static uint8_t answer[ANSWER_BYTES]; /* zeros */

static bool take(int fd, void *to, size_t nr)
{
	return recv(fd, to, nr, MSG_WAITALL) == (ssize_t)nr;
}

static bool give(int fd, const void *from, size_t nr)
{
	return send(fd, from, nr, MSG_NOSIGNAL) == (ssize_t)nr;
}

static bool give_option_reply(int fd, uint32_t option, uint32_t type, const void *payload, uint32_t length)
{
	uint8_t head[20], *to = wire_put64(head, 0x3e889045565a9ull);

	wire_put32(wire_put32(wire_put32(to, option), type), length);
	return give(fd, head, sizeof head) && (!length || give(fd, payload, length));
}

/* The handshake, up to the transmission phase. */
static bool negotiate(int fd)
{
	uint8_t greeting[18], flags[4], option[16], skipped[4096], export[12];

	memcpy(greeting, "NBDMAGICIHAVEOPT", 16);
	wire_put16(greeting + 16, 3); /* FIXED_NEWSTYLE, NO_ZEROES */
	if (!give(fd, greeting, sizeof greeting) || !take(fd, flags, sizeof flags))
		return false;
	while (take(fd, option, sizeof option)) {
		uint32_t what = wire_get32(option + 8), length = wire_get32(option + 12);

		if (length > sizeof skipped || (length && !take(fd, skipped, length)))
			return false;
		if (what == NBD_OPT_EXPORT_NAME) {
			wire_put16(wire_put64(export, size_bytes), EXPORT_FLAGS);
			return give(fd, export, 10);
		}
		if (what == NBD_OPT_ABORT)
			return false;
		if (what != NBD_OPT_GO && what != NBD_OPT_INFO) {
			if (!give_option_reply(fd, what, NBD_REP_ERR_UNSUP, NULL, 0))
				return false;
			continue;
		}
		wire_put16(wire_put64(wire_put16(export, 0), size_bytes), EXPORT_FLAGS);
		if (!give_option_reply(fd, what, NBD_REP_INFO, export, sizeof export) ||
		    !give_option_reply(fd, what, NBD_REP_ACK, NULL, 0))
			return false;
		if (what == NBD_OPT_GO)
			return true;
	}
	return false;
}

struct batch {
	uint8_t heads[BATCH][NBD_SIMPLE_REPLY_BYTES];
	struct iovec iov[2 * BATCH];
	int nr_heads, nr_iov;
};

static bool batch_send(int fd, struct batch *batch)
{
	struct iovec *iov = batch->iov;
	int nr = batch->nr_iov;

	batch->nr_heads = batch->nr_iov = 0;
	while (nr) {
		struct msghdr message = {.msg_iov = iov, .msg_iovlen = (size_t)nr};
		ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);

		if (sent < 0)
			return false;
		for (; nr && (size_t)sent >= iov->iov_len; iov++, nr--)
			sent -= (ssize_t)iov->iov_len;
		if (nr) {
			iov->iov_base = (char *)iov->iov_base + sent;
			iov->iov_len -= (size_t)sent;
		}
	}
	return true;
}

static void batch_add(struct batch *batch, const struct nbd_request *request)
{
	uint8_t *head = batch->heads[batch->nr_heads++];

	wire_put_raw64(wire_put32(wire_put32(head, NBD_SIMPLE_REPLY_MAGIC), 0), request->cookie);
	batch->iov[batch->nr_iov++] = (struct iovec){head, NBD_SIMPLE_REPLY_BYTES};
	if (request->type == NBD_CMD_READ)
		batch->iov[batch->nr_iov++] = (struct iovec){answer, request->length};
}

static void transmit(int fd, uint8_t *in)
{
	struct batch batch = {.nr_heads = 0};
	size_t nr_in = 0, payload = 0;

	for (ssize_t nr; (nr = recv(fd, in + nr_in, IN_BYTES - nr_in, 0)) > 0;) {
		struct nbd_request request;
		size_t at = 0;

		nr_in += (size_t)nr;
		while (at < nr_in) {
			size_t skip = payload < nr_in - at ? payload : nr_in - at;

			payload -= skip;
			at += skip;
			if (payload || nr_in - at < NBD_REQUEST_BYTES)
				break;
			if (!wire_get_request(in + at, false, &request) || request.type == NBD_CMD_DISC ||
			    (request.type == NBD_CMD_READ && request.length > ANSWER_BYTES))
				return;
			at += NBD_REQUEST_BYTES;
			payload = request.type == NBD_CMD_WRITE ? request.length : 0;
			batch_add(&batch, &request);
			if (batch.nr_heads == BATCH && !batch_send(fd, &batch))
				return;
		}
		memmove(in, in + at, nr_in - at);
		nr_in -= at;
		if (!batch_send(fd, &batch))
			return;
	}
}

static void *serve(void *passed)
{
	int fd = (int)(intptr_t)passed;
	uint8_t *in = malloc(IN_BYTES);

	if (in && negotiate(fd))
		transmit(fd, in);
	free(in);
	close(fd);
	return NULL;
}

int main(int argc, char **argv)
{
	struct sockaddr_un address = {.sun_family = AF_UNIX};
	int listener = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (argc != 3 || strlen(argv[1]) >= sizeof address.sun_path)
		return 2;
	strcpy(address.sun_path, argv[1]);
	size_bytes = strtoull(argv[2], NULL, 10);
	if (bind(listener, (struct sockaddr *)&address, sizeof address) || listen(listener, 64)) {
		perror(argv[1]);
		return 1;
	}
	for (int fd; (fd = accept(listener, NULL, NULL)) >= 0;) {
		pthread_t thread;

		if (pthread_create(&thread, NULL, serve, (void *)(intptr_t)fd))
			close(fd);
		else
			pthread_detach(thread);
	}
	return 1;
}
