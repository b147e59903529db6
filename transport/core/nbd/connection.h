/* SPDX-License-Identifier: Apache-2.0 */
/* A connection: its socket, its queue of block requests, and its state between two slices. */
#ifndef COWSHED_NBD_CONNECTION_H
#define COWSHED_NBD_CONNECTION_H

#include "cache/core/spin.h"
#include "transport/core/blocks/wait.h"
#include "transport/core/nbd/export.h"
#include "transport/core/nbd/wire.h"

struct nbd_slice;

/* A request of the client that was submitted to the engine. */
struct nbd_submitted {
	struct blk_request block;
	struct nbd_request request;
	uint64_t start_ns; /* CLOCK_MONOTONIC: when it was received */
};

/* Bytes that the socket would not take. */
struct nbd_segment {
	struct nbd_segment *next;
	const uint8_t *at;
	size_t nr;
	struct blk_wait *owner; /* whose bytes they are, or NULL: they follow this struct */
};

/*
 * One slice at a time serves it, while running. It is in the server's ready list exactly while queued. The slice owns
 * the fields below the line.
 */
struct nbd_connection {
	struct blk_queue queue;
	pthread_mutex_t lock;
	bool running, again, queued;
	bool detached;
	struct nbd_connection *next_ready;
	uint64_t connection_no;
	struct nbd_server *server;
	struct nbd_export *export;
	struct nbd_negotiated negotiated;
	int fd;
	/* ---- */
	struct nbd_slice *slice; /* that serves it now */
	bool closing;            /* no more requests; queue.broken: nor replies */
	enum nbd_end reason;
	int err;
	uint8_t *carry; /* received, not yet parsed */
	size_t nr_carry;
	struct nbd_submitted *payload; /* whose payload comes next */
	uint64_t payload_left;
	struct nbd_segment *backlog, **backlog_tail;
	struct spin spin;
};

static inline struct nbd_connection *nbd_connection_of(struct blk_queue *queue)
{
	return (struct nbd_connection *)((char *)queue - offsetof(struct nbd_connection, queue));
}

/* Nothing of it may wait any more, and no thread may find it. */
void nbd_connection_free(struct nbd_connection *connection);
/* Closes and reports a connection whose last slice is over. */
void nbd_connection_end(struct nbd_connection *connection);
/* Makes a worker serve it: now, or again if one does. For any thread. */
void nbd_connection_wake(struct nbd_connection *connection);
/* Ends it soon, whatever it is doing. The caller must hold server->lock. */
void nbd_connection_detach(struct nbd_connection *connection);

#endif
