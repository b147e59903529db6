/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Moves this program's guest mappings to the backend that their guest has moved to.  Only for the thread of orphans.c.
 */
#ifndef COWSHED_PRELOAD_MOVES_H
#define COWSHED_PRELOAD_MOVES_H

#include <stdbool.h>

#include "transport/core/guest/json.h"

/* Handles any event of a backend. True if the mapping of the connection that it came over must move. */
bool moves_hear(struct json event);

/* Moves a link's mappings to its guest's backend.  The caller must hold the lock.  was_left: the old backend does not
   serve them any more (orphans_leave).  0: the link is closed.  -errno, reported: call it again.  Until then mapped
   pages can be read; once the old backend was left, all other accesses wait. */
int moves_take(unsigned link_no, bool was_left);

/* The socket path of that backend. */
const char *moves_target(void);

#endif
