/* SPDX-License-Identifier: Apache-2.0 */
/*
 * This program's guest mappings go where their backend says that the guest has moved to.  For the thread of orphans.c,
 * but for what says otherwise.
 */
#ifndef COWSHED_PRELOAD_MOVES_H
#define COWSHED_PRELOAD_MOVES_H

#include <stdbool.h>

#include "transport/core/guest/json.h"

/* An event of the backend's, whatever it is. True if the mapping of the connection that it came over is to go. */
bool moves_hear(struct json event);

/* Holding the lock: takes a link's mappings to where its guest is.  was_left: the old backend answers for them no more
   (orphans_leave).  0, and the link is closed; or -errno, and it is to be called again, having said why: what is there
   is there, and the rest waits once the old backend has been left. */
int moves_take(unsigned link_no, bool was_left);

/* Where that is: the path of a socket. */
const char *moves_target(void);

#endif
