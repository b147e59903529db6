/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Packets of transport/messages/protocol.py over a Unix sequenced-packet socket, for a guest's half of the protocol:
 * what a guest says and is told fits into one packet each.  Used by the library (follow.c) and by the preload library.
 *
 * Functions return 0 or -errno.
 */
#ifndef COWSHED_PACKETS_H
#define COWSHED_PACKETS_H

#include "transport/core/guest/json.h"

#define PACKET_MAX_FDS 4

/* What came: its text is in the room that was given, its descriptors are the caller's to close. */
struct packet {
	uint32_t tag;
	struct json json;
	int fds[PACKET_MAX_FDS];
	unsigned nr_fds;
};

/* Sends a message of one packet; fds stay the caller's. -EAGAIN if there is no room, or not in the socket's time. */
int packet_send(int socket_fd, uint32_t tag, const char *text, const int *fds, unsigned nr_fds);

/* Takes one. -EPIPE when the peer has closed, -EAGAIN when there is none, -EMFILE when this process may not
   have so many descriptors, -EPROTO for what makes no sense or does not fit; nothing is to be closed then. */
int packet_receive(int socket_fd, char *room, size_t room_bytes, struct packet *packet_out);

void packet_close_fds(struct packet *packet);

#endif
