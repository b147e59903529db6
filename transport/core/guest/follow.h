/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Moves a mapping to the backend that its guest has moved to: a thread listens for that event, and acts.
 *
 * Functions return >= 0 or -errno.  Any thread may call all but follower_forget; start and stop one at a time.
 */
#ifndef COWSHED_FOLLOW_H
#define COWSHED_FOLLOW_H

#include <stdbool.h>

#include "transport/core/guest/region.h"

/* cdef-begin */
enum follow_state {
	FOLLOW_LISTENS = 0, /* nothing to do */
	FOLLOW_MOVES = 1,   /* on its way; `why` says what it waits for */
	FOLLOW_BYTES = 2,   /* the guest is where nothing can be mapped: the region must not be used any more */
	FOLLOW_ENDED = 3,   /* the backend is gone, without notice or successor: absent pages are SIGBUS */
};

struct follow_status {
	int state;
	uint32_t nr_moves;
	uint64_t extent_bytes; /* these three: of the backend that it has moved to */
	char uri[512];
	char generation[136];
	char token[400]; /* as JSON; for the backend where it is or goes */
	char why[400];
};

struct follower;

/* Listens at connection_fd (borrowed, as the region is), whose other end serves the region.  Unless it follows, it
   reads nothing, and waits for the connection's end only.  Once the guest has moved, the descriptor is of a connection
   to the target, after hello, open and region.  open_request opens the image there: a JSON object without token and
   closing brace; digest is "" if it is not known. */
int follower_start(struct region *region, int connection_fd, bool follows, const char *guest, const char *open_request,
                   const char *digest, struct follower **follower_out);

/* Stops the thread at any step, waits for that, and frees the follower. The caller still must end the region. */
void follower_stop(struct follower *follower);

/* For a forked child, where its thread does not exist. */
void follower_forget(struct follower *follower);

/* enum follow_state; costs nothing. */
int follower_state(const struct follower *follower);

void follower_read(struct follower *follower, struct follow_status *status_out);

/* Keeps the region's memory from being taken away, until follower_end_view.  -EXDEV if it was (FOLLOW_BYTES). */
int follower_begin_view(struct follower *follower);
void follower_end_view(struct follower *follower);
/* cdef-end */

#endif
