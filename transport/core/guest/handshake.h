/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The guest's half of the handshake, over a connected Unix sequenced-packet socket.
 *
 *     hello; open IMAGE: returns its frames; region: the backend serves a mapping from now on; close: no more
 *
 * Every guest uses it: the library (attach.h), a mapping that follows its guest (follow.c) and programs under
 * `cowshed attach` (transport/preload/wire.c). They differ in how they wait.
 *
 * Functions return 0 or -errno:
 *   -EACCES     refused; handshake_reply() is the refusal, and kind and message are taken out of it
 *   -EREMCHG    refused, since the guest is at another backend; its URI is moved_to
 *   -EPIPE, -ECONNRESET   the backend is gone; a successor may be at the same path
 *   -ETIMEDOUT  no answer in time             -EPROTO   a malformed answer
 *   -EINTR and others    errors of wait. After -EINTR the same call may be made again: the request is not sent twice.
 *
 * Format: transport/messages/protocol.py.
 */
#ifndef COWSHED_HANDSHAKE_H
#define COWSHED_HANDSHAKE_H

#include "transport/core/guest/packets.h"

/* A number for each request of a connection, in the order in which they are made. */
enum handshake_tag {
	HANDSHAKE_HELLO = 1,
	HANDSHAKE_OPEN,
	HANDSHAKE_REGION,
	HANDSHAKE_DESCRIBE,
	HANDSHAKE_WRITABLE,
	HANDSHAKE_CLOSE = 1000000
};

/* cdef-begin */
/* What the backend returns for an image that it opened. The caller owns the descriptors. */
struct guest_image {
	uint64_t size_bytes, map_bytes, extent_bytes;
	uint64_t uffd_features;
	int memfd;                         /* its frames; at least map_bytes long */
	int uffd_device;                   /* an open /dev/userfaultfd, or -1 */
	char digest[136], generation[136]; /* "" while the backend does not know them */
	char guest[72];
};

struct handshake;
/* cdef-end */

struct handshake {
	int fd; /* the connection; borrowed */
	char *room;
	size_t room_bytes; /* for one reply: at least 4 KiB */
	/* Waits for the peer, for these events of poll: 1 to try again, 0 when the time is up, or -errno. */
	int (*wait)(struct handshake *handshake, short events);
	/* Hears the events that arrive before a reply; NULL: they are dropped. */
	void (*hear)(unsigned of, struct json event);
	unsigned of;
	uint32_t asked; /* the tag of a request that was sent and not answered yet, or 0 */
	struct json reply;
	char kind[32], message[800]; /* of the last refusal, as printable ASCII */
	char moved_to[512];
};

/* Sends a request and takes its reply; the reply's descriptors are the caller's, its text is good until the next
 * call. */
int handshake_ask(struct handshake *handshake, uint32_t tag, const char *request, const int *fds, unsigned nr_fds,
                  struct packet *reply_out);
int handshake_hello(struct handshake *handshake);
/* request is a JSON object with "op": "open". */
int handshake_open(struct handshake *handshake, const char *request, struct guest_image *image_out);
void handshake_close_image(struct guest_image *image);
/* fds: the userfaultfd that the range is registered with, /proc/self/pagemap and /proc/self/mem; more is "" or further
 * fields, after a comma. */
int handshake_region(struct handshake *handshake, const void *address, uint64_t nr_bytes, const int fds[3],
                     const char *more);
/* cdef-begin */
/* Makes the backend release the mapping: once it has answered, or is gone (also 0), it does nothing more to it. */
int handshake_close(struct handshake *handshake);
/* cdef-end */

/* Whether an error means that the backend is gone. */
static inline bool handshake_is_gone(int err)
{
	return err == -32 /* EPIPE */ || err == -104 /* ECONNRESET */;
}

#endif
