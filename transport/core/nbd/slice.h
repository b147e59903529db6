/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A worker slice: one thread serves one connection for a while. It receives what there is, parses many requests,
 * submits them, and sends the replies together.
 */
#ifndef COWSHED_NBD_SLICE_H
#define COWSHED_NBD_SLICE_H

#include "transport/core/nbd/output.h"

#include <time.h>

#define IN_BYTES (320u << 10) /* received at a time */

/* A worker thread, with its buffers; the connection it serves, if any. */
struct nbd_slice {
	struct nbd_server *server;
	struct nbd_connection *connection;
	pthread_t thread;
	uint8_t *in;
	size_t in_at, in_end;
	struct nbd_out out;
	struct nbd_submitted *spare;        /* most requests end before the next is parsed: they share it */
	uint64_t now_ns;                    /* when these requests were received */
	uint32_t nr_prompt[NBD_LATENCY_NR]; /* requests that ended without waiting, since now_ns: for their latency */
	struct nbd_counters counts;
};

/* Serves the connection for a while. Returns the epoll events it waits for, 0 for none (a wake brings it back),
 * SLICE_AGAIN for another slice at once, SLICE_ENDED if the connection is over and may be freed. */
#define SLICE_AGAIN (1u << 30)
#define SLICE_ENDED (1u << 31)
uint32_t nbd_slice_run(struct nbd_slice *slice);
/* Gives the connection up: it takes no more requests, and gets no more replies. */
void nbd_slice_break(struct nbd_slice *slice, enum nbd_end reason, int err);

/* parse.c */
/* Uses the received bytes as far as it can; true if it stopped because it needs more. */
bool nbd_parse(struct nbd_slice *slice);
/* status.c: answers a BLOCK_STATUS that was checked. */
void nbd_status(struct nbd_slice *slice, const struct nbd_request *request);

static inline uint64_t clock_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

#endif
