/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Replies: collected in a list of iovecs, and sent with one call.
 *
 * The bytes lie in the slice's arena (headers, private pages), in the frames (held until the call is over) or in a
 * wait's buffer (freed then). If the socket takes only a part, the rest of arena and frames is copied into a segment of
 * the connection's backlog, a wait goes there as it is, and all holds are released. While there is a backlog the
 * connection is not read from, so that it never has more than one send's worth.
 */
#ifndef COWSHED_NBD_OUTPUT_H
#define COWSHED_NBD_OUTPUT_H

#include "transport/core/nbd/connection.h"

#include <sys/uio.h>

#define ARENA_BYTES (BLK_RUN_BYTES + (192u << 10)) /* headers and private pages of one send */
#define OUT_BYTES (256u << 10)                     /* a send is made when this much is ready */
#define OUT_IOVECS 1000                            /* below IOV_MAX */
#define OUT_HOLDS 2048

/* A position in the list, to go back to. */
struct nbd_out_mark {
	uint32_t nr_iov, nr_holds;
	size_t bytes, arena_used, last_bytes;
};

struct nbd_out {
	struct iovec iov[OUT_IOVECS];
	struct blk_wait *owner[OUT_IOVECS];
	uint32_t nr_iov, nr_holds;
	size_t bytes, arena_used;
	uint8_t *arena;
	extent_word *holds[OUT_HOLDS];
	struct blk_wait *spent;   /* to be freed when sent */
	struct nbd_out_mark mark; /* where the current run began */
};

uint8_t *out_reserve(struct nbd_slice *slice, size_t nr_bytes); /* room in the arena, queued to be sent */
void out_refer(struct nbd_slice *slice, const void *at, size_t nr_bytes, struct blk_wait *owner);
void out_send(struct nbd_slice *slice);
bool out_send_backlog(struct nbd_slice *slice); /* true: it is empty, or the client is gone */
/* Drops the list and the backlog unsent. */
void out_drop(struct nbd_slice *slice);
void out_segments_free(struct nbd_connection *connection);

/* A reply without data; err 0 or -errno. */
void reply_status(struct nbd_slice *slice, const struct nbd_request *request, int err);
/* The header of a chunk, or of the whole simple reply. */
void reply_data(struct nbd_slice *slice, const struct nbd_request *request, uint64_t offset, uint32_t length,
                bool done);
void reply_chunk(struct nbd_slice *slice, const struct nbd_request *request, uint16_t type, uint64_t length, bool done);

/* What the engine calls for each connection. */
extern const struct blk_sink nbd_sink;

#endif
