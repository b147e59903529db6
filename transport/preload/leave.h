/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The backend's permission to map a part of the image: requested, checked, and used once the part is mapped and
 * guarded.  The caller must hold the lock.  Functions report failures, except those that wire_is_gone() names; -EINTR
 * means to call again, see lock_wait.
 */
#ifndef COWSHED_PRELOAD_LEAVE_H
#define COWSHED_PRELOAD_LEAVE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "transport/preload/table.h"

/* Permission to map a part, and what mapping it takes. */
struct leave {
	int connection_fd, memfd, uffd;
	struct frames frames;
	uint64_t features; /* of the userfaultfd */
};

/* Asks the backend at config.socket_path, once; read_only: the program does not write the mapping; more is "" or
   further fields of the request, after a comma.  0, or -errno as wire_open returns it. */
int leave_ask(struct leave *leave_out, uint64_t offset_bytes, uint64_t length_bytes, bool read_only, const char *more);
/* Makes the backend answer the faults of a registered range; an inherited one keeps its private pages. */
int leave_use(const struct leave *leave, uintptr_t address, uint64_t nr_bytes, bool inherited);
void leave_close(struct leave *leave);

/* As leave_ask, at whichever backend has the guest now; this program asks there from then on.  During a drain the
   source redirects us, and the target does not know the guest yet: with waits, wait for the end of the drain.  Programs
   that have a part of the image already should. */
int leave_find(struct leave *leave_out, uint64_t offset_bytes, uint64_t length_bytes, bool read_only, bool waits);

/* Set once the guest has moved to where this program cannot follow. For any thread. */
extern atomic_bool leave_is_nowhere;

/* The image's digest, as the backend that the guest left sent it, or "".  A backend with another digest is refused. */
extern char leave_digest[136];

#endif
