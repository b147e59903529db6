/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Packets of transport/messages/protocol.py over a Unix sequenced-packet socket, for a guest's half of the protocol:
 * each of its messages fits into one packet.  Used by the handshake, follow.c and the preload library.
 *
 * Functions return 0 or -errno.
 */
#ifndef COWSHED_PACKETS_H
#define COWSHED_PACKETS_H

#include "transport/core/guest/json.h"

#define PACKET_MAX_FDS 4

/* A received message: its text is in the caller's room, and the caller must close its descriptors. */
struct packet {
	uint32_t tag;
	struct json json;
	int fds[PACKET_MAX_FDS];
	unsigned nr_fds;
};

/* Sends a message of one packet; fds stay the caller's. -EAGAIN if the socket is full, for as long as its timeout. */
int packet_send(int socket_fd, uint32_t tag, const char *text, const int *fds, unsigned nr_fds);

/* Receives one. -EPIPE when the peer has closed, -EAGAIN when there is none, -EMFILE when this process may not
   have so many descriptors, -EPROTO for one that is malformed or does not fit. On failure nothing is to be closed. */
int packet_receive(int socket_fd, char *room, size_t room_bytes, struct packet *packet_out);

void packet_close_fds(struct packet *packet);

#endif
