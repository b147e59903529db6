/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The handshake (transport/core/guest/handshake.h) in a program under `cowshed attach`: waiting gives way to the
 * program's signals.  The caller must hold the lock; there is one buffer for replies.
 *
 * Functions return >= 0 or -errno, and report refusals and malformed replies.  -EINTR means to call again, see
 * lock_wait.
 */
#ifndef COWSHED_PRELOAD_WIRE_H
#define COWSHED_PRELOAD_WIRE_H

#include "transport/core/guest/handshake.h"

#include <errno.h>
#include <signal.h>
#include <stdbool.h>

/* How often to ask in all when the backend dies before it accepts: its successor is at the same socket. */
#define WIRE_TRIES 5

/* Connects to config.socket_path and greets; the descriptor is the caller's.  Fails as wire_open does. */
int wire_connect(void);

/* Whether the error means that the backend is gone, or (-EREMCHG) redirects us to wire_moved_to. Callers that give up
   must report it (wire_report_gone). */
static inline bool wire_is_gone(int err)
{
	return handshake_is_gone(err) || err == -EREMCHG;
}

/* The socket path of the last refusal that was -EREMCHG; as large as config.socket_path. */
extern char wire_moved_to[108];

/* Reads such a path from a message's "uri"; false if that is no socket of this host. */
bool wire_take_path(struct json json, char path_out[static sizeof(wire_moved_to)]);
void wire_report_gone(int err);

/* As handshake_open and handshake_region: -EPROTO for a malformed reply, -EACCES for a refusal, -EPIPE if the backend
   is gone, and the errors of lock_wait. */
int wire_open(int connection_fd, const char *request, struct guest_image *image_out);
int wire_region(int connection_fd, uintptr_t address, uint64_t nr_bytes, const int fds[3], bool inherited);

/* Returns a fresh descriptor of the image's source, for a user who may not open it. Yields the lock to handlers that
   are due; signals is lock_take's. */
int wire_open_source(sigset_t *signals);

/* Before a mapping that is not written becomes writable: from its return on the backend charges what it opens.  A
   backend that is gone, or knows no open regions, charges as well.  -EAGAIN: the backend cannot, or does not
   answer; -EINTR: call again.  Events that arrive meanwhile are passed to hear. */
int wire_make_writable(int connection_fd, void (*hear)(unsigned of, struct json event), unsigned of);

/* Ends a mapping, and waits without limit until the backend or a successor has released it, or neither exists.  0, or
   -errno for a refusal or a malformed reply. */
int wire_leave(int connection_fd);

/* Ends a mapping, and waits a few seconds at most until the backend has released it.  0, or -EINTR: call again. */
int wire_farewell(int connection_fd);

#endif
