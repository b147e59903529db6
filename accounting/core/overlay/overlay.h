/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The private pages of a guest that maps nothing: the backend keeps them for it.
 *
 * The account's bitmap says which pages are private; their bytes are in a sparse memfd of the image's length, or in
 * a sparse file, each page at its own offset. Everything else is read from the image.  A page's bytes are written
 * before its bit is set, and its bit is cleared before they are dropped.
 *
 * Each run of 64 pages (a word of the bitmap) belongs to one of OVERLAY_STRIPES locks: readers of private pages share
 * it, writers have it alone. So writers of different parts of one page exclude each other, and a read of one page is
 * consistent. Reading shared pages takes no lock.
 *
 * The quota is taken before a byte changes, for the whole request; at the quota a request is refused with -ENOSPC and
 * nothing of it was done (unless another request trimmed pages of its range meanwhile).
 *
 * Writes can be tracked, page by page, and held back (frozen) for a while: requests then wait for the thaw, and do not
 * fail. track.h does the same for guests that map.
 *
 * Pages that a request has taken from the quota and not used yet are in hand: the quota's used pages are the private
 * ones and those in hand; overlay_sums reads them all at one moment.
 *
 * pages.c has the pages, files.c what files need besides, adopt.c the overlay of another process, track.c tracking and
 * freezing, check.c the audit's view, missing.c missing pages, move.c copies for a handoff.
 */
#ifndef COWSHED_OVERLAY_H
#define COWSHED_OVERLAY_H

#include "accounting/core/ledger.h"

#include <pthread.h>

/* cdef-begin */
struct overlay;

/* Opens an empty overlay in memory.  The account is borrowed, and must be closed after the overlay. */
int overlay_open(struct account *account, struct overlay **overlay_out);
#define OVERLAY_IDENTITY_BYTES 32
/* Opens the overlay in two files, or makes one if map_fd is empty, of the image with that identity and size. Its
 * private pages are charged, past the quota too. Takes over both descriptors, on success only. -ESTALE: it belongs to
 * another image; -EBADMSG: it is damaged; -EBUSY: another process has it open. */
int overlay_open_files(struct account *account, int data_fd, int map_fd, const uint8_t *identity,
                       struct overlay **overlay_out);
/* Adopts the overlay that another process left: its account, adopted before, and its memfd, taken over on success.
 * Bytes of pages that are not private (a write or a trim that was cut short) are dropped. -EBADMSG: it is no overlay of
 * this image. */
int overlay_adopt(struct account *account, int data_fd, struct overlay **overlay_out);
/* The same with files: the account's private pages stay private, flushed or not. Otherwise as overlay_open_files. */
int overlay_adopt_files(struct account *account, int data_fd, int map_fd, const uint8_t *identity,
                        struct overlay **overlay_out);
/* Gives the private pages back; with files, flushes them first and keeps them (-errno if that failed). The overlay must
 * not be in use any more. */
int overlay_close(struct overlay *overlay);
/* Gives every private page back to the image: the overlay then reads as the image does. */
int overlay_discard(struct overlay *overlay);
/* The pages that the memfd or file holds bytes for: (nr_pages + 63) / 64 words.  Each should be private; a private
 * one without bytes is zeros. */
int overlay_stored(struct overlay *overlay, uint64_t *words_out, uint64_t nr_words);
/* The memfd or file with the private pages' bytes; the overlay's own. */
int overlay_fd(const struct overlay *overlay);

/* Begins to track the private pages, all of them dirty at first; or ends that. */
int overlay_track(struct overlay *overlay, int on);
/* Takes the pages that became private, were written or are private no more: (nr_pages + 63) / 64 words; returns how
 * many. A page read afterwards is as new, or is dirty again. -EINVAL: they are not tracked. */
int64_t overlay_take_dirty(struct overlay *overlay, uint64_t *words_out, uint64_t nr_words);
/* From its return until the thaw no page changes: requests for changes wait. Cost: waits for writes under way. */
void overlay_freeze(struct overlay *overlay);
void overlay_thaw(struct overlay *overlay);
/* The pages that hold bytes (overlay_stored) and are not private, each seen while nothing was writing it: there should
 * be none. (None are found where the file system's holes are larger than a page.) */
int overlay_strays(struct overlay *overlay, uint64_t *words_out, uint64_t nr_words);

struct overlay_sums {
	uint64_t counted_pages; /* bits of the account's bitmap: these two should be the same */
	uint64_t private_pages; /* the account's counter */
	uint64_t used_pages;    /* of the quota: should be the private ones, and those in hand */
	uint64_t in_hand_pages; /* taken by requests, not private yet */
};
/* Reads all at one moment. */
void overlay_sums(struct overlay *overlay, struct overlay_sums *sums_out);
/* cdef-end */

#define OVERLAY_STRIPES 64

struct overlay_disk;
struct overlay_missing;

/* A request to be notified when all that was written is durable; the flusher's thread calls done. */
struct overlay_sync {
	struct overlay_sync *next;
	void (*done)(struct overlay_sync *sync, int status);
};

/* Waits for a thaw; the thawing thread calls go once, under the overlay's thaw_lock. */
struct overlay_thaw_wait {
	struct overlay_thaw_wait *next;
	bool queued;
	void (*go)(struct overlay_thaw_wait *wait);
};

struct overlay {
	struct account *account;
	struct image *image;
	int data_fd;
	struct overlay_disk *disk;       /* NULL: in memory */
	struct overlay_missing *missing; /* NULL: no page was ever missing (missing.h) */
	pthread_rwlock_t stripes[OVERLAY_STRIPES];
	_Atomic(bits_word *) dirty; /* NULL: not tracked; its words change under their stripes' locks */
	pthread_mutex_t thaw_lock;  /* innermost but for locks that go takes */
	struct overlay_thaw_wait *thaw_waits;
	pthread_mutex_t quota_lock; /* within a stripe's, or alone */
	uint64_t in_hand_pages;     /* under quota_lock */
};

/* Calls that change pages return -EBUSY while frozen, with a part of it or nothing done; the caller must repeat the
 * whole call after the thaw. true: wait->go will be called then; false: the thaw has come. */
bool overlay_await_thaw(struct overlay *overlay, struct overlay_thaw_wait *wait);
/* go will not be called. */
void overlay_cancel_thaw_wait(struct overlay *overlay, struct overlay_thaw_wait *wait);

/* Under the stripe's lock. */
static inline void overlay_mark_dirty(struct overlay *overlay, uint64_t first, uint64_t nr)
{
	bits_word *dirty = atomic_load(&overlay->dirty);

	for (uint64_t page = first; dirty && page < first + nr; page++)
		bits_set(dirty, page);
}

/* Takes quota for those of nr pages from first that are not private; -ENOSPC. The caller must give back what it does
 * not use. */
int overlay_take(struct overlay *overlay, uint64_t first, uint64_t nr, uint64_t *reserved);
/* Takes quota past the limit, too. */
void overlay_take_anyway(struct overlay *overlay, uint64_t nr);
void overlay_give(struct overlay *overlay, uint64_t nr);

/* Finds the run at offset, at most length bytes, that is all private or all not, and copies private bytes to `to`.
 * Returns its length, or -errno; none of it may be missing. */
int64_t overlay_read_run(struct overlay *overlay, uint64_t offset, uint64_t length, void *to, bool *private_out);
/* The same without reading; want_zero: also whether private pages are known to be zeros. */
uint64_t overlay_status_run(struct overlay *overlay, uint64_t offset, uint64_t length, bool want_zero,
                            bool *private_out, bool *zero_out);
/* Writes whole pages; the image's last one may be short. *reserved is what overlay_take took, and is used up. */
int overlay_write(struct overlay *overlay, uint64_t offset, uint64_t length, const uint8_t *bytes, uint64_t *reserved);
/* The same with zeros; allocated: stores them. */
int overlay_zero(struct overlay *overlay, uint64_t offset, uint64_t length, bool allocated, uint64_t *reserved);
/* Writes part of one page; bytes NULL: zeros. -EAGAIN if the page is not private and frame, the image's page (held), is
 * NULL; -EINPROGRESS: it is missing; -EIO: it is lost. */
int overlay_patch(struct overlay *overlay, uint64_t offset, uint32_t length, const uint8_t *bytes, const uint8_t *frame,
                  uint64_t *reserved);
/* Gives pages back to the image. */
int overlay_trim(struct overlay *overlay, uint64_t first, uint64_t nr);
/* 1: all that was written is as durable as it gets; 0: sync->done will be called once it is. */
int overlay_flush(struct overlay *overlay, struct overlay_sync *sync);

#endif
