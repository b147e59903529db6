/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What the files of the NBD server share: connections, requests that take longer than a moment, and a turn.
 *
 * A *turn* is one thread serving one connection: it receives what there is, parses many requests, answers what it
 * can and sends the answers together.  Most requests live only inside a turn, on its stack.  One that cannot end
 * there (a miss, a payload that has not all come, a flush of a disk, a range of gigabytes) becomes an *op*; what an
 * op waits for are *pieces*.  A piece is finished by a loader, a flusher or a page that arrives, which only puts it on
 * its connection's ready list; a turn does the rest.
 *
 * Resident pages are sent from a read-only mapping of the frames, and touched only while their extent is held. What
 * a socket will not take at once is copied and the holds are let go, so a slow reader never stands in an eviction's
 * way.
 *
 * Lock order: server->lock, connection->lock, server->ready_lock; none is held while a store or an overlay is called.
 */
#ifndef COWSHED_NBD_STATE_H
#define COWSHED_NBD_STATE_H

#include "accounting/core/overlay/missing.h"
#include "cache/core/loader.h"
#include "cache/core/store.h"
#include "transport/core/nbd.h"
#include "transport/core/nbd_wire.h"

#include <pthread.h>
#include <sys/uio.h>

#define PIECE_BYTES (256u << 10)                 /* the most that one piece of a read covers */
#define IN_BYTES (320u << 10)                    /* received at a time */
#define ARENA_BYTES (PIECE_BYTES + (192u << 10)) /* headers and private pages of one send */
#define OUT_BYTES (256u << 10)                   /* a send is made when so much is ready */
#define OUT_IOVECS 1000                          /* below IOV_MAX */
#define OUT_HOLDS 2048
#define OUTSTANDING_MAX 256             /* ops of a connection; beyond, it is not read from */
#define BUFFERED_MAX (32u << 20)        /* bytes its pieces hold; the same */
#define CACHING_MAX 4                   /* pieces of a CACHE, or of a long read, that wait at once */
#define STEP_BYTES ((uint64_t)16 << 20) /* of a TRIM or WRITE_ZEROES, between two looks at other requests */

struct nbd_connection;
struct nbd_op;

/* The frames of an image, mapped once for all exports of it. */
struct nbd_frames {
	struct nbd_frames *next;
	struct image *image;
	uint32_t nr_exports;
	_Atomic uint64_t nr_parked;
	const uint8_t *base;
};

#define NBD_COUNT_NO(name) (offsetof(struct nbd_counters, name) / sizeof(uint64_t))
/* All but parked, which ends with the process. */
#define NBD_COUNTS_NR NBD_COUNT_NO(parked)
_Static_assert(NBD_COUNTS_NR == sizeof(struct nbd_counters) / sizeof(uint64_t) - 1, "parked is the last of them");
_Static_assert(NBD_COUNTS_NR <= IMAGE_SERVED_WORDS && NBD_COUNTS_NR <= LEDGER_SERVED_WORDS, "there is room for them");

struct nbd_export {
	struct nbd_server *server;
	struct nbd_frames *frames;
	struct image *image;
	struct overlay *overlay;
	uint64_t size_bytes, extent_bytes;
	uint32_t nr_connections; /* under server->lock */
	/* Counters are words in the order of struct nbd_counters: its own (an overlay's are in its ledger, an image's
	 * alone here), and those of all exports of the image. */
	_Atomic uint64_t *counts, *image_counts;
	_Atomic uint64_t here[NBD_COUNTS_NR];
	_Atomic uint64_t nr_parked;
	_Atomic uint64_t latency_sum_ns[NBD_LATENCY_NR];
	_Atomic uint64_t latency[NBD_LATENCY_NR][LATENCY_BUCKETS];
};

/* Bytes of one extent that a piece waits for. */
struct nbd_wait {
	struct load_waiter waiter;
	struct nbd_piece *piece;
	uint64_t offset;
	uint32_t length;
	bool held;
};

enum piece_kind { PIECE_READ, PIECE_CACHE, PIECE_PATCH, PIECE_SYNC, PIECE_LATE };

struct nbd_piece {
	struct nbd_piece *next;
	struct nbd_connection *connection;
	struct nbd_op *op;
	struct overlay_sync sync;
	struct overlay_wait missing;
	enum piece_kind kind;
	uint64_t offset;
	uint32_t length;
	_Atomic uint32_t nr_missing;
	_Atomic int status;
	uint32_t nr_waits;
	uint8_t *bytes; /* read: what the reply carries; patch: what is written, NULL: zeros */
	struct nbd_wait waits[];
};

/* A request that outlives its turn, or may. */
struct nbd_op {
	struct nbd_op *next; /* in connection->longs */
	struct nbd_request request;
	uint64_t at, end;  /* what is still to be begun */
	uint64_t reserved; /* pages of the quota, taken and not yet used */
	uint64_t start_ns;
	uint32_t nr_pieces; /* waiting */
	int err;
	bool begun; /* nothing more will be begun: it ends with its last piece */
	bool missed, chunked, replied, synced;
	bool zeroes;  /* WRITE_ZEROES, or a trim that is to read as zeros */
	bool missing; /* waits for pages that are not here yet, and goes on then */
};

/* Bytes that the socket would not take. */
struct nbd_segment {
	struct nbd_segment *next;
	const uint8_t *at;
	size_t nr;
	struct nbd_piece *owner; /* whose bytes they are, or NULL: they follow this struct */
};

/*
 * Invariants: (1) one turn at a time, while running; (2) nr_pieces is the number of pieces that are neither finished
 * nor spent; (3) a connection is in the ready queue exactly while queued. Fields below the line belong to the turn.
 */
struct nbd_connection {
	pthread_mutex_t lock;
	bool running, again, queued;
	bool detached;
	struct nbd_piece *ready, **ready_tail;
	struct nbd_connection *next_ready;
	uint64_t connection_no;
	struct nbd_server *server;
	struct nbd_export *export;
	struct nbd_negotiated negotiated;
	int fd;
	/* ---- */
	bool closing, broken; /* no more requests; nor replies */
	enum nbd_end reason;
	int err;
	uint8_t *carry; /* received, not yet parsed */
	size_t nr_carry;
	struct nbd_op *payload; /* whose payload comes next */
	uint64_t payload_left;
	struct nbd_op *longs, **longs_tail;
	struct nbd_segment *backlog, **backlog_tail;
	struct nbd_piece *completed, **completed_tail; /* done, and holding nothing; not answered yet */
	uint32_t nr_ops, nr_pieces;
	uint64_t buffered_bytes;
	uint64_t stream_offset, stream_bytes; /* where the last read ended, and how long it has gone on so */
	bool held;                            /* something of it waits for its overlay's thaw */
	struct overlay_hold hold;
	uint64_t ahead_offset; /* up to where that stream was read ahead; 0: not yet */
};

struct nbd_out {
	struct iovec iov[OUT_IOVECS];
	struct nbd_piece *owner[OUT_IOVECS];
	uint32_t nr_iov, nr_holds;
	size_t bytes, arena_used;
	uint8_t *arena;
	extent_word *holds[OUT_HOLDS];
	struct nbd_piece *spent; /* to be freed when sent */
};

/* One thread's work room; the connection it serves, if any. */
struct nbd_turn {
	struct nbd_server *server;
	struct nbd_connection *connection;
	pthread_t thread;
	uint8_t *in;
	size_t in_at, in_end;
	struct nbd_out out;
	uint64_t now_ns;     /* when these requests were received */
	uint32_t nr_hits[2]; /* requests answered from what is resident, and writes, since now_ns: for their latency */
	struct nbd_counters counts;
	uint8_t *scratch; /* a page */
};

struct nbd_server {
	pthread_mutex_t lock;
	pthread_cond_t idle; /* the last connection ended */
	struct nbd_connection **slots;
	uint32_t nr_slots, next_generation;
	_Atomic uint32_t nr_connections; /* changed under lock */
	struct nbd_frames *frames;
	uint32_t nr_exports;
	struct nbd_ended *ended; /* in order; room for every connection there is */
	uint64_t nr_ended, ended_room;
	int epoll_fd, ready_fd, event_fd;
	_Atomic bool stop;

	pthread_mutex_t ready_lock;
	struct nbd_connection *ready, **ready_tail;

	struct nbd_turn *turns;
	uint32_t nr_workers;
};

/* nbd_export.c */
void nbd_export_add(struct nbd_export *export, size_t count_no, uint64_t nr);
/* One request more, or fewer, of its clients waits. */
void nbd_export_park(struct nbd_export *export);
void nbd_export_unpark(struct nbd_export *export);

/* nbd_server.c */
void *nbd_worker_main(void *arg);
/* Puts a connection in line for a turn; under its lock. */
void nbd_enqueue(struct nbd_connection *connection);
/* A piece has all it waited for: from any thread. */
void nbd_piece_ready(struct nbd_piece *piece);

/* nbd_turn.c: serves the connection for a while. Returns the epoll events it waits for, 0 for none (a piece's end
 * brings it back), TURN_AGAIN for another turn at once, TURN_ENDED if it is over and may be freed. */
#define TURN_AGAIN (1u << 30)
#define TURN_ENDED (1u << 31)
uint32_t nbd_turn_run(struct nbd_turn *turn);
void nbd_turn_break(struct nbd_turn *turn, enum nbd_end reason, int err);
struct nbd_op *nbd_op_new(struct nbd_turn *turn, const struct nbd_request *request);
void nbd_op_queue(struct nbd_turn *turn, struct nbd_op *op);
/* Sends the last reply of an op that has nothing more to do, and frees it. */
void nbd_op_end(struct nbd_turn *turn, struct nbd_op *op);

/* nbd_output.c */
uint8_t *out_reserve(struct nbd_turn *turn, size_t nr_bytes); /* room in the arena, queued to be sent */
void out_refer(struct nbd_turn *turn, const void *at, size_t nr_bytes, struct nbd_piece *owner);
bool out_has_room(const struct nbd_turn *turn, size_t nr_bytes, uint32_t nr_extents);
void out_send(struct nbd_turn *turn);
bool out_send_backlog(struct nbd_turn *turn); /* true: it is all gone */
void out_release(struct nbd_turn *turn);
/* A reply without data; err 0 or -errno. */
void reply_status(struct nbd_turn *turn, const struct nbd_request *request, int err);
/* The header of a chunk, or of the whole simple reply. */
void reply_data(struct nbd_turn *turn, const struct nbd_request *request, uint64_t offset, uint32_t length, bool done);
void reply_chunk(struct nbd_turn *turn, const struct nbd_request *request, uint16_t type, uint64_t length, bool done);

/* nbd_pieces.c */
/* A piece that waits for at most nr_waits extents, and for piece_wanted_all; NULL without memory. */
struct nbd_piece *piece_new(struct nbd_turn *turn, struct nbd_op *op, enum piece_kind kind, uint64_t offset,
                            uint32_t length, uint32_t nr_waits);
void piece_free(struct nbd_piece *piece);
/* Holds the extent of offset if it is resident (true); else makes the piece wait for it. */
bool piece_want(struct nbd_piece *piece, uint64_t offset, uint32_t length);
void piece_wanted_all(struct nbd_piece *piece);
/* Takes what is done off the ready list, makes its patches and lets go of what they hold. */
void pieces_complete(struct nbd_turn *turn);
/* Sends completed replies until the socket would block. */
void pieces_finish(struct nbd_turn *turn);
/* The piece has been used: counts it off its op, which may end. */
void piece_end(struct nbd_turn *turn, struct nbd_piece *piece);

/* nbd_missing.c */
/* Has a piece wait for pages that are not here yet. */
void piece_want_missing(struct nbd_piece *piece);
/* 0: all of a range is here; -EIO: some is lost; -EINPROGRESS: some is missing. */
int missing_look(const struct nbd_connection *connection, uint64_t offset, uint64_t length);
/* Has an op wait for them. */
void missing_park(struct nbd_turn *turn, struct nbd_op *op, uint64_t offset, uint64_t length);
/* Nobody waits for them any more: the client is gone. */
void missing_abandon(struct nbd_connection *connection);

enum nbd_step { STEP_MORE, STEP_WAIT, STEP_DONE };

/* nbd_read.c, nbd_modify.c, nbd_status.c; requests were checked (nbd_turn.c). */
void read_begin(struct nbd_turn *turn, const struct nbd_request *request);
enum nbd_step read_step(struct nbd_turn *turn, struct nbd_op *op);
void read_finish(struct nbd_turn *turn, struct nbd_piece *piece);
void cache_begin(struct nbd_turn *turn, const struct nbd_request *request);
enum nbd_step cache_step(struct nbd_turn *turn, struct nbd_op *op);
/* err: what the request is answered with once its payload is gone by. */
void write_begin(struct nbd_turn *turn, const struct nbd_request *request, int err);
/* Takes payload, as much as it can use now; how much. */
size_t write_take(struct nbd_turn *turn, const uint8_t *bytes, size_t nr_bytes);
void write_cancel(struct nbd_turn *turn);
/* false: not now; the piece will be ready again. */
bool patch_complete(struct nbd_piece *piece);
void clear_begin(struct nbd_turn *turn, const struct nbd_request *request);
enum nbd_step clear_step(struct nbd_turn *turn, struct nbd_op *op);
void flush_begin(struct nbd_turn *turn, const struct nbd_request *request);
/* Has an op wait until all that was written is durable; false: there is nothing to wait for. */
bool op_sync(struct nbd_turn *turn, struct nbd_op *op);
void status_begin(struct nbd_turn *turn, const struct nbd_request *request);

#endif
