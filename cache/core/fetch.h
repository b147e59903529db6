/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Fetches: loads of images whose bytes come from elsewhere, given by threads of the caller.
 *
 * An image with an origin has no file to read. Its loads wait in the origin's queues until a fetch thread takes one
 * (store_take_fetch), reads the bytes wherever it likes, and gives them in order (store_fill). C never calls the
 * thread; the thread pulls. Extents are published one by one as their bytes arrive, so a guest does not wait for the
 * rest of the request. Room is taken before a fetch is handed out, as loaders do it: a fetch never waits for room.
 *
 * A demand fetch is the aligned block of FETCH_BLOCK_BYTES around the extent, as far as its neighbours are absent and
 * there is room beyond the low mark: when room is short, nothing is fetched that nobody asked for. Prefetches that are
 * neighbours become one fetch of up to FETCH_BYTES_MAX. Loads from the standby list are the loaders' (loader.h).
 *
 * A fetch may last as long as a network does, and nothing waits for it: the evictor takes no LOADING extent, a
 * successor finds LOADING extents ABSENT (arrays.h), and an image that is closed takes its extents back from the
 * fetches in hand, whose bytes are then refused with -ECANCELED.
 */
#ifndef COWSHED_FETCH_H
#define COWSHED_FETCH_H

#include "cache/core/image.h"
#include "cache/core/load_queue.h"

/* cdef-begin */
struct origin;
struct fetch;

/* What a fetch wants: bytes of an image, in whole extents. is_prefetch: nobody waited for them when it was taken. */
struct fetch_request {
	uint32_t image_no;
	int is_prefetch;
	uint64_t offset_bytes, length_bytes;
};

struct origin_counters {
	uint64_t queued_demand, queued_prefetch; /* loads */
	uint64_t fetches;                        /* taken, and not ended */
};

int origin_open(struct store *store, struct origin **origin_out);
/* -EBUSY, and nothing done, while images have it or a fetch of it is in hand. */
int origin_close(struct origin *origin);
/* Ends all waits in store_take_fetch, now and from now on. */
void origin_stop(struct origin *origin);
void origin_count(const struct origin *origin, struct origin_counters *counters_out);

/* Waits until a load of the origin's images is queued and has room, demand first; demand_only: takes no prefetch. The
 * caller owns the fetch until store_fetch_end. -ETIMEDOUT after timeout_ms, -ESHUTDOWN once the origin is stopped. */
int store_take_fetch(struct origin *origin, int demand_only, int timeout_ms, struct fetch **fetch_out,
                     struct fetch_request *request_out);
/* Gives the next bytes, from the request's offset on; publishes each extent that they complete. 0; -EMSGSIZE, and
 * nothing done, for more than is left; -ECANCELED, and nothing done, if the image was closed. An extent whose frames
 * cannot be written fails by itself. */
int store_fill(struct fetch *fetch, const void *bytes, uint64_t length_bytes);
/* Ends a fetch and frees it. What is left fails with err, a positive errno; 0: with ENODATA. */
void store_fetch_end(struct fetch *fetch, int err);
/* cdef-end */

#define FETCH_BLOCK_BYTES (1u << 20)
#define FETCH_BYTES_MAX (4u << 20)

/* A fetch in hand: nr extents from first are LOADING, with room, and in no queue. Under the store's lock, but what the
 * thread in store_fill uses: part, and the frames of its extents while is_filling. */
struct fetch {
	struct fetch *next;
	struct origin *origin;
	struct image *image; /* NULL: it was closed */
	uint64_t first, nr;
	bool is_prefetch, is_filling;
	char *part; /* bytes of the first extent, while they are not all there */
	uint64_t nr_part_bytes;
	_Atomic uint64_t since_ns; /* CLOCK_MONOTONIC, of its beginning or of the last bytes */
};

/* Images that the same fetch threads serve. All under the store's lock. */
struct origin {
	struct origin *next;
	struct store *store;
	pthread_cond_t work; /* a load was queued, room came free, or stop */
	struct load_queue demand, prefetch;
	struct fetch *fetches;
	uint64_t nr_images;
	uint32_t nr_waiting_room;
	bool stopped;
};

struct run;

/* Without the lock: has a run fetched, LOADING and with room, whose bytes the standby list could not give. */
void fetch_instead(const struct run *run);
/* Under lock. */
/* Wakes fetch threads for loads that could not be taken a moment ago. */
void origins_wake(struct store *store);
/* When the image's longest silent fetch last had bytes, CLOCK_MONOTONIC; 0: it has none. */
uint64_t fetch_waits_since_ns(const struct image *image);
/* Takes an image's extents back from the fetches in hand; waits for threads that are in store_fill. -ETIMEDOUT: the
 * store was stopped meanwhile. */
int fetches_abandon(struct image *image);
/* Recomputes what struct fetch says of its extents; returns what does not hold, or NULL. */
const char *origins_check(const struct store *store);

#endif
