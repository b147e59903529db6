/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "transport/core/guest/packets.h"

#include <errno.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#define MAGIC 0x44485343u
#define VERSION 1

struct header {
	uint32_t magic;
	uint16_t version, flags;
	uint32_t tag;
	uint16_t nr_fds, reserved;
	uint32_t total_length, piece_length;
};
_Static_assert(sizeof(struct header) == 24, "the packet header is protocol.py's");

/*
 * The kernel does not restart a call on a socket with a timeout after an interruption, and blocking signals does not
 * prevent those: io_uring's work in a QEMU that uses it, and SIGCONT after a stop, give EINTR too (signal(7)).
 */
#define RETRIED(call)                                         \
	({                                                    \
		ssize_t retried_result;                       \
                                                              \
		do                                            \
			retried_result = (call);              \
		while (retried_result < 0 && errno == EINTR); \
		retried_result;                               \
	})

int packet_send(int socket_fd, uint32_t tag, const char *text, const int *fds, unsigned nr_fds)
{
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(PACKET_MAX_FDS * sizeof(int))];
	} control = {0};
	uint32_t length = (uint32_t)strlen(text);
	struct header header = {
		.magic = MAGIC,
		.version = VERSION,
		.tag = tag,
		.nr_fds = (uint16_t)nr_fds,
		.total_length = length,
		.piece_length = length,
	};
	struct iovec pieces[2] = {{&header, sizeof(header)}, {(char *)(uintptr_t)text, length}};
	struct msghdr message = {.msg_iov = pieces, .msg_iovlen = 2};

	if (nr_fds > 0) {
		message.msg_control = control.room;
		message.msg_controllen = CMSG_SPACE(nr_fds * sizeof(int));
		control.header.cmsg_level = SOL_SOCKET;
		control.header.cmsg_type = SCM_RIGHTS;
		control.header.cmsg_len = CMSG_LEN(nr_fds * sizeof(int));
		memcpy(CMSG_DATA(&control.header), fds, nr_fds * sizeof(int));
	}
	return RETRIED(sendmsg(socket_fd, &message, MSG_NOSIGNAL)) < 0 ? -errno : 0;
}

static void take_fds(struct msghdr *message, struct packet *packet)
{
	for (struct cmsghdr *part = CMSG_FIRSTHDR(message); part; part = CMSG_NXTHDR(message, part)) {
		if (part->cmsg_level != SOL_SOCKET || part->cmsg_type != SCM_RIGHTS)
			continue;
		/* The control buffer has room for no more descriptors than fds. */
		for (size_t i = 0; i < (part->cmsg_len - CMSG_LEN(0)) / sizeof(int); i++)
			memcpy(&packet->fds[packet->nr_fds++], CMSG_DATA(part) + i * sizeof(int), sizeof(int));
	}
}

static int check(const struct header *header, const struct msghdr *message, size_t length, struct packet *packet)
{
	size_t text_length = length - sizeof(*header);

	if (length < sizeof(*header) || (message->msg_flags & MSG_TRUNC))
		return -EPROTO;
	/* There was room for the descriptors, but this process may not have so many. */
	if (message->msg_flags & MSG_CTRUNC)
		return header->nr_fds <= PACKET_MAX_FDS ? -EMFILE : -EPROTO;
	if (header->magic != MAGIC || header->version != VERSION || header->flags != 0 ||
	    header->nr_fds != packet->nr_fds || header->reserved != 0 || header->total_length != text_length ||
	    header->piece_length != text_length)
		return -EPROTO;
	packet->tag = header->tag;
	packet->json.length = text_length;
	return json_is_object(packet->json) ? 0 : -EPROTO;
}

int packet_receive(int socket_fd, char *room, size_t room_bytes, struct packet *packet_out)
{
	union {
		struct cmsghdr header;
		char room[CMSG_SPACE(PACKET_MAX_FDS * sizeof(int))];
	} control;
	struct header header;
	struct iovec pieces[2] = {{&header, sizeof(header)}, {room, room_bytes}};
	struct msghdr message = {
		.msg_iov = pieces,
		.msg_iovlen = 2,
		.msg_control = control.room,
		.msg_controllen = sizeof(control.room),
	};
	struct packet packet = {.json = {room, 0}};
	ssize_t length = RETRIED(recvmsg(socket_fd, &message, MSG_CMSG_CLOEXEC));
	int err;

	/* The peer hung up without reading all of our data; what it sent before can still be received. */
	if (length < 0 && errno == ECONNRESET)
		length = RETRIED(recvmsg(socket_fd, &message, MSG_CMSG_CLOEXEC));

	if (length < 0)
		return -errno;
	if (length == 0)
		return -EPIPE;
	take_fds(&message, &packet);
	err = check(&header, &message, (size_t)length, &packet);
	if (err < 0)
		packet_close_fds(&packet);
	else
		*packet_out = packet;
	return err;
}

void packet_close_fds(struct packet *packet)
{
	while (packet->nr_fds > 0)
		close(packet->fds[--packet->nr_fds]);
}
