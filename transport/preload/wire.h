/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The handshake (transport/core/guest/handshake.h) as a program under `cowshed attach` has it: with the lock held, and
 * its signals. One buffer for replies: only for whoever holds the lock.
 *
 * Functions return >= 0 or -errno; whatever the backend refuses or says wrongly is told to stderr here.  -EINTR is not
 * the end: see lock_wait.
 */
#ifndef COWSHED_PRELOAD_WIRE_H
#define COWSHED_PRELOAD_WIRE_H

#include "transport/core/guest/handshake.h"

#include <errno.h>
#include <signal.h>
#include <stdbool.h>

/* How often to come again to a backend that died before it had said yes: its successor is at the same socket. */
#define WIRE_TRIES 5

/* Connects to config.socket_path and greets; the descriptor is the caller's.  Fails as wire_open does. */
int wire_connect(void);

/* Whether an error is that the backend went away, or (-EREMCHG) sends us on to wire_moved_to. Nothing is reported of
   it: callers that give up must. */
static inline bool wire_is_gone(int err)
{
	return handshake_is_gone(err) || err == -EREMCHG;
}

/* The path of a socket, as long as config.socket_path; of the last refusal that was -EREMCHG. */
extern char wire_moved_to[108];

/* Takes such a path out of what came: false if it names no socket of this host. */
bool wire_take_path(struct json json, char path_out[static sizeof(wire_moved_to)]);
void wire_report_gone(int err);

/* As handshake_open and handshake_region: -EPROTO for a reply that makes no sense, -EACCES for a refusal, -EPIPE when
   the backend is gone, and what lock_wait says. */
int wire_open(int connection_fd, const char *request, struct guest_image *image_out);
int wire_region(int connection_fd, uintptr_t address, uint64_t nr_bytes, const int fds[3], bool inherited);

/* A fresh descriptor of the image's source, for who may not open it. Yields the lock to handlers that are due; signals
   is what lock_take gave. */
int wire_open_source(sigset_t *signals);

/* Says a mapping's end, and waits until the backend has let go of it, for as long as there is one or a successor of it.
   0, or -errno if it makes no sense. */
int wire_leave(int connection_fd);

/* Says a mapping's end, and waits for a few seconds at most until the backend has let go of it.  0, or -EINTR: to be
   called again. */
int wire_farewell(int connection_fd);

#endif
