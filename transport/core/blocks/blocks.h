/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The block request engine: reads and changes of an image, or of an image under an overlay. It knows no socket.
 *
 * A *device* is an image with its frames and perhaps an overlay (device.h). A *queue* takes the requests of one client.
 * A *frontend* parses what a client sends, submits requests, and gets data and completions through its *sink*.
 *
 * Most requests complete within blk_submit. One that cannot (a miss, a missing page, a flush of a disk, a frozen
 * overlay, a range of gigabytes) stays in the queue; what it waits for are *waits* (wait.h). Loaders, flushers and
 * pages that arrive only put a wait on the queue's ready list and call the sink's wake, from their own threads.
 * Everything else is done by the queue's worker: one thread at a time, which the frontend chooses.
 *
 * What holds for every frontend:
 *   - A request never keeps some extents held while it waits for others.
 *   - Bytes in the frames are given with their extent held. The sink drops these holds before its worker waits for
 *     its client, so a slow client holds no extent.
 *   - The quota for a whole request is taken before its first byte changes; at the quota nothing is changed (-ENOSPC).
 *   - While its overlay is frozen, a queue takes no further request: changes are made in the order of the requests.
 *   - Each request completes exactly once.
 *
 *   queue.c   submit, worker, end       read.c    READ, PREFETCH      write.c   WRITE         flush.c    FLUSH, FUA
 *   wait.c    what requests wait for    ahead.c   readahead           clear.c   DISCARD, ZERO missing.c  missing pages
 *   status.c  what is resident, private or zero                       patch.c   parts of pages
 */
#ifndef COWSHED_BLOCKS_H
#define COWSHED_BLOCKS_H

#include "accounting/core/overlay/missing.h"
#include "transport/core/blocks/device.h"

#include <pthread.h>

#define BLK_RUN_BYTES (256u << 10)   /* the most given to a sink at a time, except for a read without BLK_SPLIT */
#define BLK_REQUESTS_MAX 256         /* requests of a queue at which it accepts no more */
#define BLK_BUFFERED_MAX (32u << 20) /* bytes in buffers of a queue's waits at which it accepts no more */

/*
 * READ        gives `length` bytes to the sink.
 * WRITE       its payload follows by blk_write, before any other request.
 * DISCARD     gives the whole pages of the range back to the image.
 * ZERO        makes the range zeros.
 * FLUSH       completes once everything that was written is durable; offset and length are 0.
 * PREFETCH    completes once the range was loaded.
 */
enum blk_op { BLK_READ, BLK_WRITE, BLK_DISCARD, BLK_ZERO, BLK_FLUSH, BLK_PREFETCH };

#define BLK_FUA (1u << 0)      /* a change: completes once it is durable */
#define BLK_SPLIT (1u << 1)    /* READ: its runs may be given one by one, in any order */
#define BLK_ALLOCATE (1u << 2) /* ZERO: zeros are stored */
#define BLK_FAST (1u << 3)     /* ZERO: -ENOTSUP where it could take as long as a write */

/* The frontend keeps it in place until it completes. */
struct blk_request {
	enum blk_op op;
	uint32_t flags;
	uint64_t offset, length; /* in the device; length 0: for WRITE and FLUSH only */
	int err; /* 0, or -errno: a request submitted with an error changes nothing, completes with it */
	/* ---- the engine's; a frontend may read them in complete */
	bool missed; /* it needed something that was not in memory */
	bool waited; /* it did not complete within blk_submit */
	bool given;  /* a read whose bytes were given whole */
	bool begun;  /* all of it was begun: it ends with its last wait */
	bool synced, awaits_pages;
	uint32_t nr_waits;
	struct blk_request *next; /* in queue->steps */
	uint64_t at, end;         /* the range that is not begun yet */
	uint64_t reserved_pages;  /* taken of the quota and not yet used */
};

struct blk_queue;
struct blk_wait;

/* A frontend's functions. All but wake are called by the queue's worker, within the calls that it makes. */
struct blk_sink {
	/* Whether the client takes one more run now. false: the frontend must call the engine again when it does. */
	bool (*is_ready)(struct blk_queue *queue);
	/* A run of a read begins; its bytes follow in order, by refer, or by room and fill. whole: the only run. */
	void (*begin)(struct blk_queue *queue, struct blk_request *request, uint64_t offset, uint32_t length,
	              bool whole);
	/* Bytes in the frames. The sink must release the hold when it has sent or copied them. */
	void (*refer)(struct blk_queue *queue, const uint8_t *bytes, uint64_t nr_bytes, extent_word *hold);
	/* Returns memory for the rest of the run; fill follows, with the number of bytes put there. */
	uint8_t *(*room)(struct blk_queue *queue);
	void (*fill)(struct blk_queue *queue, uint64_t nr_bytes);
	/* The run is not given after all: forget it, and release its holds. */
	void (*undo)(struct blk_queue *queue);
	/* A run that had to wait: wait->length bytes at wait->bytes. The sink must blk_wait_free it. */
	void (*give)(struct blk_queue *queue, struct blk_request *request, struct blk_wait *wait, bool whole);
	/* The request has completed, with request->err. Its memory is the frontend's again. */
	void (*complete)(struct blk_queue *queue, struct blk_request *request);
	/* Makes the worker call the engine again. Any thread calls it, under queue->lock or the overlay's: it may only
	 * enqueue. */
	void (*wake)(struct blk_queue *queue);
};

/*
 * One thread at a time, the worker, is in the functions below. nr_waits is the number of waits that were made and not
 * freed, nr_requests that of requests that were submitted and have not completed, buffered_bytes the sum of the waits'
 * buffers: all are 0 at the end, which blk_queue_deinit asserts. Other threads may use the fields above the line only.
 */
struct blk_queue {
	pthread_mutex_t lock; /* taken before any lock that wake takes */
	struct blk_wait *ready, **ready_tail;
	struct overlay_thaw_wait thaw;
	struct blk_device *device;
	const struct blk_sink *sink;
	/* ---- */
	bool broken;                                /* the client is gone: nothing more is given to it */
	bool frozen;                                /* a change waits for its overlay's thaw */
	struct blk_request *steps, **steps_tail;    /* requests that go on step by step */
	struct blk_wait *finished, **finished_tail; /* waits that are over and hold nothing, for blk_queue_give */
	uint32_t nr_requests, nr_waits;
	uint64_t buffered_bytes;
	uint64_t stream_offset, stream_bytes; /* where the last read ended; bytes read in sequence up to there */
	uint64_t ahead_offset;                /* up to where that stream was read ahead; 0: not yet */
	uint64_t nr_hits, nr_misses;          /* extents found resident, and waited for; the frontend may reset them */
};

void blk_queue_init(struct blk_queue *queue, struct blk_device *device, const struct blk_sink *sink);
/* No wait and no request may be left. */
void blk_queue_deinit(struct blk_queue *queue);

/* Takes a request whose range is inside the device (unless it has an err), and completes it now or later. The queue
 * must accept one. */
void blk_submit(struct blk_queue *queue, struct blk_request *request);
/* Whether the queue takes requests and payload: not while it is frozen, nor at one of its limits. */
bool blk_queue_accepts(const struct blk_queue *queue);
/* Takes as much payload of a WRITE as it can use now; returns how much. 0: a part of a page must come whole, or the
 * overlay is frozen. Completes the request with its last byte, or later. */
uint64_t blk_write(struct blk_queue *queue, struct blk_request *request, const uint8_t *bytes, uint64_t nr_bytes);
/* Ends a WRITE whose payload does not come any more. */
void blk_write_cancel(struct blk_queue *queue, struct blk_request *request);

/* What a worker does when it was woken, in this order. */
/* Takes the waits that are ready and drops their holds, even while the client takes nothing. */
void blk_queue_collect(struct blk_queue *queue);
/* Gives the sink the data that has come, while it is ready. */
void blk_queue_give(struct blk_queue *queue);
/* Advances each long request by a step, while the sink is ready; returns whether one could go on at once. */
bool blk_queue_step(struct blk_queue *queue);
/* The client is gone (broken): ends all that can end without a loader or a flusher. Waits for these end later. */
void blk_queue_abandon(struct blk_queue *queue);

enum blk_status { BLK_RESIDENT, BLK_PRIVATE, BLK_ZEROES };
/* Whether the byte at offset is resident, private or known to be zero, and over how many bytes, of length at most, the
 * same is true; *run_out > 0. A run may end early. */
bool blk_status_run(const struct blk_device *device, enum blk_status what, uint64_t offset, uint64_t length,
                    uint64_t *run_out);

#endif
