/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The backend's leave to map a part of the image: asked for, checked, and used once the part is mapped and guarded.
 * Only for whoever holds the lock.  Whatever fails has been said; -EINTR is not the end, see lock_wait.
 */
#ifndef COWSHED_PRELOAD_LEAVE_H
#define COWSHED_PRELOAD_LEAVE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

#include "transport/preload/table.h"

/* The backend's leave to map a part, and what it takes. */
struct leave {
	int connection_fd, memfd, uffd;
	struct frames frames;
	uint64_t features; /* of the userfaultfd */
};

/* Asks the backend at config.socket_path, once; more is "" or further fields of the request, after a comma.  0, or
   -errno as wire_ask gives it, having said why; -EREMCHG: see wire.h. */
int leave_ask(struct leave *leave_out, uint64_t offset_bytes, uint64_t length_bytes, const char *more);
/* Has the backend answer for a registered range from now on; what is private in one that is inherited stays. */
int leave_use(const struct leave *leave, uintptr_t address, uint64_t nr_bytes, bool inherited);
void leave_close(struct leave *leave);

/* As leave_ask, wherever the guest has moved to: then that is where this program asks from now on.  While it is being
   drained the one backend sends us on and the other does not know us: waits says to wait for the end of that, as who
   has a part of the image already does. */
int leave_find(struct leave *leave_out, uint64_t offset_bytes, uint64_t length_bytes, bool waits);

/* Set once the guest has moved to where this program cannot follow. For any thread. */
extern atomic_bool leave_is_nowhere;

/* The image's digest, as its guest's backend told it; "" if it did not.  A backend that has another is refused. */
extern char leave_digest[136];

#endif
