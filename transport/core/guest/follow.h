/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A mapping that goes where its backend says its guest has moved to: a thread that listens, and acts.
 *
 * Functions return >= 0 or -errno.  All but follower_forget are for any thread, but one at a time for start and stop.
 */
#ifndef COWSHED_FOLLOW_H
#define COWSHED_FOLLOW_H

#include <stdbool.h>

#include "transport/core/guest/region.h"

/* cdef-begin */
enum follow_state {
	FOLLOW_LISTENS = 0, /* nothing to do */
	FOLLOW_MOVES = 1,   /* on its way; `why` says what it waits for */
	FOLLOW_BYTES = 2,   /* the guest is where nothing can be mapped: the region is no more to be used */
	FOLLOW_ENDED = 3,   /* the backend is gone, without a word, and no other comes: pages not there are SIGBUS */
};

struct follow_status {
	int state;
	uint32_t nr_moves;
	uint64_t extent_bytes; /* these three once it has moved: of where it is now */
	char uri[512];
	char generation[136];
	char token[400]; /* as JSON; of where it is or goes */
	char why[400];
};

struct follower;

/* Listens at connection_fd (borrowed, as the region is), whose other end has the region; unless it follows, for nothing
   but its end, reading nothing.  Once the guest has moved the
   descriptor is of a connection to the target: hello, open and region are said there.  open_request is what opens it
   there, a JSON object without token and closing brace; digest "" if it is not known. */
int follower_start(struct region *region, int connection_fd, bool follows, const char *guest, const char *open_request,
                   const char *digest, struct follower **follower_out);

/* Has it stop, wherever it is, and waits for that; frees it. The region is as it should be, for its user to end. */
void follower_stop(struct follower *follower);

/* In a forked child, where its thread is not. */
void follower_forget(struct follower *follower);

/* enum follow_state; costs nothing. */
int follower_state(const struct follower *follower);

void follower_read(struct follower *follower, struct follow_status *status_out);

/* Somebody looks at the region's memory: then it is not taken away.  -EXDEV if it was (FOLLOW_BYTES). */
int follower_begin_view(struct follower *follower);
void follower_end_view(struct follower *follower);
/* cdef-end */

#endif
