/* SPDX-License-Identifier: Apache-2.0 */
/*
 * NBD's transmission phase: serves clients that have negotiated, straight from the store.
 *
 * The caller negotiates, and hands over a connected stream socket with the parameters agreed on; from then on only the
 * threads of the server use it: they read requests from it and answer them.  A connection that ends, for whatever
 * reason, is closed and reported once (nbd_event_fd, nbd_take_ended).
 *
 *   server.c   workers                  parse.c   requests are checked and submitted     output.c   what is sent
 *   connections.c, ready.c              sink.c    the engine's data and completions      status.c   BLOCK_STATUS
 *   export.c   devices and counters     slice.c   one worker serves one connection
 *
 * Reads and changes themselves are the block request engine's (transport/core/blocks/).
 *
 * Protocol: NetworkBlockDevice/nbd, doc/proto.md (with the extended headers of its extension-ext-header branch).
 */
#ifndef COWSHED_NBD_H
#define COWSHED_NBD_H

#include "accounting/core/overlay/overlay.h"
#include "cache/core/image.h"

/* cdef-begin */
struct nbd_server;
struct nbd_export;

/* Context ids are by index: base:allocation (its own flags), cowshed:resident (1: the page is in memory),
 * cowshed:private (1: the page is the client's own; a write to another may fail with ENOSPC, at the quota). */
enum nbd_context { NBD_CONTEXT_ALLOCATION, NBD_CONTEXT_RESIDENT, NBD_CONTEXT_PRIVATE, NBD_CONTEXTS };

/* What was negotiated.  structured and extended: which replies (extended implies the 32-byte headers both ways). */
struct nbd_negotiated {
	uint32_t structured;
	uint32_t extended;
	uint32_t read_only;         /* always so for an export without an overlay */
	uint32_t max_payload_bytes; /* as advertised: 4096 .. 2^25 */
	uint32_t trim_zeroes;       /* a trimmed range reads as zeros, and not as the image again */
	uint32_t context_ids[3];    /* by enum nbd_context; 0: not negotiated */
};

/* Counters of an export or an image; all but parked only grow. Requests are counted when they are answered. The
 * counters of an image and of an overlay outlive the process, with their memfds. */
struct nbd_counters {
	uint64_t connections;
	uint64_t reads, writes, trims, zeroes, flushes, caches, block_statuses;
	uint64_t errors; /* requests answered with an error */
	uint64_t read_bytes, write_bytes;
	uint64_t hits, misses; /* extents that reads found resident; that they waited for */
	uint64_t parked;       /* requests that wait now: for loads, missing pages or a disk */
};

enum nbd_latency { NBD_LATENCY_HIT, NBD_LATENCY_MISS, NBD_LATENCY_WRITE, NBD_LATENCY_FLUSH, NBD_LATENCY_NR };

enum nbd_end {
	NBD_END_DISC,     /* the client sent NBD_CMD_DISC */
	NBD_END_EOF,      /* it closed the socket without that */
	NBD_END_DETACHED, /* nbd_detach, nbd_server_drain */
	NBD_END_PROTOCOL, /* it broke the protocol, and the next request cannot be found */
	NBD_END_IO,       /* its socket failed: err */
	NBD_END_MEMORY    /* there was no memory for its requests */
};

struct nbd_ended {
	uint64_t connection_no;
	int32_t err; /* -errno, of NBD_END_IO */
	uint32_t reason;
};

int nbd_server_init(uint32_t nr_workers, struct nbd_server **server_out);
/* Ends every connection and waits until the last is gone: for loads and flushes in progress, but for no client. */
void nbd_server_drain(struct nbd_server *server);
/* -EBUSY, and nothing done, while exports are open. */
int nbd_server_deinit(struct nbd_server *server);

/* Both are borrowed and must outlive the export.  overlay NULL: the image itself, read-only. */
int nbd_export_init(struct nbd_server *server, struct image *image, struct overlay *overlay,
                    struct nbd_export **export_out);
/* -EBUSY, and nothing done, while connections use it. */
int nbd_export_deinit(struct nbd_export *export);
void nbd_export_count(const struct nbd_export *export, struct nbd_counters *counters_out);
/* Counts all exports of an image, past ones and those of earlier processes too; parked is this server's alone. */
void nbd_image_count(struct nbd_server *server, const struct image *image, struct nbd_counters *counters_out);
/* Adds to counts_out[LATENCY_BUCKETS] and sum_ns_out, as account_latency does; kind is an enum nbd_latency. */
int nbd_export_latency(const struct nbd_export *export, int kind, uint64_t *counts_out, uint64_t *sum_ns_out);

/* Serves a connected stream socket, which is taken over on success only.  early: bytes that came after the
 * negotiation and were read with it.  -EINVAL for parameters that contradict themselves, -EMFILE past 65,536
 * connections. */
int nbd_attach(struct nbd_server *server, struct nbd_export *export, int fd, const struct nbd_negotiated *negotiated,
               const uint8_t *early, uint64_t nr_early, uint64_t *connection_no_out);
/* Ends a connection; it is gone when nbd_take_ended reports it.  -ENOENT if it has ended already. */
int nbd_detach(struct nbd_server *server, uint64_t connection_no);
/* A borrowed eventfd: readable when connections ended. */
int nbd_event_fd(const struct nbd_server *server);
/* Takes the connections that ended since the last call; returns how many.  Each is reported once. */
int64_t nbd_take_ended(struct nbd_server *server, struct nbd_ended *ended_out, uint64_t nr_max);
/* cdef-end */

#endif
