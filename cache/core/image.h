/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An image: its frames (one file, page offset = image offset) and the state of each extent.
 *
 * No process maps the frames for writing. Loaders write them with pwrite, guests map them through a read-only
 * descriptor, and an extent counts as resident only when its state says so: the file may hold stray zero pages that a
 * reader of an unguarded mapping caused. frames.h says what kind of file it is.
 *
 * The per-extent arrays live in a memfd of their own (arrays.h), so that they can outlive the process.
 */
#ifndef COWSHED_IMAGE_H
#define COWSHED_IMAGE_H

#include "cache/core/arrays.h"
#include "cache/core/bits.h"
#include "cache/core/extent.h"

#include <pthread.h>

/* cdef-begin */
struct store;
struct origin;
struct image;

struct image_shape {
	uint32_t image_no;
	uint32_t extent_pages;
	uint64_t size_bytes;
	uint64_t map_bytes; /* size_bytes rounded up to a page: what guests map */
	uint64_t nr_pages;
	uint64_t nr_extents;
};

struct image_counters {
	uint64_t loads;       /* extents made resident: demand_loads and prefetch_loads */
	uint64_t load_bytes;  /* bytes read from the source */
	uint64_t load_errors; /* reads that failed after their retries */
	uint64_t load_retries;
	uint64_t demand_loads, prefetch_loads; /* with a waiter at its end, without one */
	uint64_t evictions;                    /* extents evicted: because room was short, and on request */
	uint64_t evictions_pressure, evictions_request;
	uint64_t soft_hits;         /* extents brought back from the standby list for a waiter */
	uint64_t standby_unmaps;    /* extents unmapped into the standby list to make room */
	uint64_t standby_samples;   /* extents unmapped into it as samples */
	uint64_t sample_hits;       /* of soft_hits, samples */
	uint64_t strays;            /* extents found with frames that no load wrote, and emptied */
	uint64_t nr_touched;        /* extents ever granted: the length of the first-touch order */
	uint64_t reloads;           /* extents loaded again while the policy remembered their eviction */
	uint64_t attaches;          /* times a guest was attached */
	uint64_t collapse_failures; /* of image_collapse */
	uint64_t lent_regions;      /* now: regions that are pinned because a guest has them open */
};

#define REFS_BUCKETS 7

/* Sums over the per-extent arrays, in pages; resident_by_refs in extents. */
struct image_statistics {
	uint64_t resident_pages;
	uint64_t granted_pages;                         /* a page granted to two guests counts twice */
	uint64_t saved_pages;                           /* granted_pages, less one for each page that is granted */
	uint64_t pinned_pages;                          /* resident or not; not for open regions alone */
	uint64_t touched_pages, touched_resident_pages; /* ever granted; of those, resident */
	uint64_t resident_by_refs[REFS_BUCKETS]; /* RESIDENT extents with 0, 1, 2-3, 4-7, 8-15, 16-31, more refs */
};

/* The last two do not drop the bytes: they go to the standby list, if it takes them. */
enum evict_reason { EVICT_PRESSURE, EVICT_REQUEST, EVICT_STANDBY, EVICT_SAMPLE };

/* Where an image's bytes come from: a file, source_fd, and direct_fd, the same file opened O_DIRECT, or -1; or, if
 * origin is not NULL, fetch threads (fetch.h), and no descriptors. */
struct image_source {
	int source_fd, direct_fd;
	struct origin *origin;
};
/* Makes an image over a source. Takes over its descriptors, on success only. extent_pages: a power of two, from the
 * store's extent to EXTENT_PAGES_MAX. -EINVAL for another, and for a size of 0 or past 2^48; frames_probe_huge's errors
 * for extents of HUGE_EXTENT_PAGES. */
int image_open(struct store *store, const struct image_source *source, uint64_t size_bytes, uint32_t extent_pages,
               struct image **image_out);
/* Descriptors of an image that another process had open; that process must no longer use them. */
struct inherited_image {
	int frames_fd, guest_fd, arrays_fd;
};
/* Makes an image over inherited descriptors. Resident extents stay resident, as far as the store has room; unfinished
 * loads and evictions are undone. The caller must adopt the accounts before guests go on. Takes over all descriptors,
 * on success only. -EBADMSG: they belong to an image of another size or extent size. */
int image_adopt(struct store *store, const struct image_source *source, uint64_t size_bytes, uint32_t extent_pages,
                const struct inherited_image *inherited, struct image **image_out);
/* Totals that Python counts: add nr reloads, or one attach. */
void image_note_reloads(struct image *image, uint64_t nr);
void image_note_attach(struct image *image);
/* Frees the image and closes its descriptors. -EBUSY, and nothing done, while a guest is attached. -ETIMEDOUT after
 * store_stop: a loader is still reading the source; the image stays until the process ends. */
int image_close(struct image *image);

void image_shape(const struct image *image, struct image_shape *shape_out);
void image_count(const struct image *image, struct image_counters *counters_out);
/* Borrowed descriptors: the frames (read-write, for audits), the frames as guests get them (read-only), the arrays. */
int image_frames_fd(const struct image *image);
int image_guest_fd(const struct image *image);
int image_arrays_fd(const struct image *image);
/* Age of the longest read of the source that is under way; 0 if none is. */
uint64_t image_read_wait_ns(const struct image *image);
/* Pages in RESIDENT extents; O(1). */
uint64_t image_resident_pages(const struct image *image);
/* Copy an array's entries of nr extents from first: states (enum extent_state), refs, pins plus loans to
 * zerocopy guests, holds. */
int image_states(const struct image *image, uint64_t first, uint64_t nr, uint8_t *states_out);
int image_refs(const struct image *image, uint64_t first, uint64_t nr, uint32_t *refs_out);
int image_pins(const struct image *image, uint64_t first, uint64_t nr, uint32_t *pins_out);
int image_holds(const struct image *image, uint64_t first, uint64_t nr, uint32_t *holds_out);
/* O(extents), about 1 ns each; not a consistent snapshot. */
void image_measure(const struct image *image, struct image_statistics *statistics_out);
/* Copies touches: faults since image_take_touches, at most TOUCHES_MAX. */
int image_touches(const struct image *image, uint64_t first, uint64_t nr, uint8_t *touches_out);
/* One extent's counts for the eviction policy; takes the touches (they start again at 0). */
uint8_t image_take_touches(struct image *image, uint64_t extent);
uint32_t image_extent_refs(const struct image *image, uint64_t extent);
/* RESIDENT, not pinned, without a hold at this moment. */
int image_extent_idle(const struct image *image, uint64_t extent);
/* Walks over the extents: from *at by stride, modulo their number, until one is RESIDENT or after nr_steps; returns
 * that extent, or -1. Leaves *at past the last that it looked at. stride: coprime to their number. */
int64_t image_walk_resident(const struct image *image, uint64_t *at, uint64_t stride, uint64_t nr_steps);
/* Changes whenever an extent's state does: between two equal readings, no state changed. */
uint64_t image_generation(const struct image *image);
/* Copies the order in which extents were first granted; returns how many. */
int64_t image_first_touches(const struct image *image, uint32_t *extents_out, uint64_t nr_max);
/* cdef-end */

#define TOUCHES_MAX 3
#define EXTENT_PAGES_MAX 512
#define IMAGE_PAST_WORDS 576
#define IMAGE_REGION_PAGES 512 /* no extent is larger */
#define IMAGE_SERVED_WORDS 64

struct account;
struct account_past;
struct load_waiter;

/*
 * Invariants: (1) frames of a RESIDENT extent are all in the file; (2) refs[e] is the number of attached
 * accounts whose grant bit e is set; (3) waiters[e] is empty unless e is LOADING or EVICTING;
 * (4) resident_pages is the sum of the pages of RESIDENT extents. store_check recomputes (3) and (4), an audit (2).
 */
struct image {
	struct store *store;
	struct image *next;
	struct image_shape shape;
	uint32_t room_pages; /* of a unit of room: the store's extent */
	int frames_fd, guest_fd, source_fd, direct_fd, ledger_fd;
	struct origin *origin; /* NULL: source_fd is read */
	/* Held around writes of frames, which the kernel does one at a time: a loader that waits for its turn there
	 * spins, and takes the CPU from a guest. No other lock is taken within. */
	pthread_mutex_t fill_lock;

	struct arrays_header *header; /* the mapped memfd of the totals and arrays below */
	size_t ledger_bytes;
	struct image_totals *totals;
	extent_word *states;
	_Atomic uint32_t *refs;
	_Atomic uint32_t *pins;  /* by operators; changed under the store's lock */
	_Atomic uint32_t *loans; /* to zerocopy guests and open regions; as pins, but end with the guest */
	_Atomic uint32_t *order;
	_Atomic uint8_t *touches;
	_Atomic uint8_t *touched;
	struct account_past *past; /* IMAGE_PAST_WORDS words of accounting, under accounts_lock */
	_Atomic uint64_t *served;  /* IMAGE_SERVED_WORDS words of transport: counters of clients that get bytes */

	struct load_waiter **waiters;     /* by extent, under the store's lock */
	uint32_t *standby;                /* by extent: its slot in the standby list, or 0; under the store's lock */
	uint32_t nr_loaders;              /* loaders with a read of it, until it is answered; under the store's lock */
	uint32_t nr_restorers;            /* loaders that bring extents back from the standby list; likewise */
	bool was_waited_for;              /* whether waiters ever had an entry; under the store's lock */
	uint32_t nr_prefetches;           /* loads of it in the prefetch queue; under the store's lock */
	_Atomic uint64_t nr_lent_regions; /* regions with loans to them */
	_Atomic uint32_t *region_loans;   /* by region of OPEN_PAGES: of the loans of its extents, those to it */
	bits_word *collapsed;             /* by region of OPEN_PAGES: its frames are one huge page (collapse.h) */

	pthread_rwlock_t accounts_lock; /* taken before an account's write_lock, and that before the store's */
	struct account *accounts;
	_Atomic uint64_t nr_poisoned; /* pages poisoned in any guest; loads look for repairs if not 0 */
	/* Called by a loader, without locks, for each extent it made resident while nr_poisoned > 0. */
	void (*_Atomic repair)(struct image *image, uint64_t extent);

	_Atomic uint64_t resident_pages, generation;
};

static inline uint64_t image_extent_pages(const struct image *image, uint64_t extent)
{
	uint64_t first = extent * image->shape.extent_pages;
	uint64_t left = image->shape.nr_pages - first;

	return left < image->shape.extent_pages ? left : image->shape.extent_pages;
}

/* The room of nr extents from first in the store's capacity, in the store's extents. Only the last extent may need less
 * than the others. */
static inline uint64_t image_room(const struct image *image, uint64_t first, uint64_t nr)
{
	uint64_t start = first * image->shape.extent_pages;
	uint64_t end = start + nr * image->shape.extent_pages;

	end = end < image->shape.nr_pages ? end : image->shape.nr_pages;
	return end > start ? (end - start + image->room_pages - 1) / image->room_pages : 0;
}

/* Whether eviction is forbidden. */
static inline bool image_is_pinned(const struct image *image, uint64_t extent)
{
	return atomic_load_explicit(&image->pins[extent], memory_order_relaxed) ||
	       atomic_load_explicit(&image->loans[extent], memory_order_relaxed);
}

/* Of an extent's loans, those to zerocopy guests. */
static inline uint32_t image_own_loans(const struct image *image, uint64_t extent)
{
	uint64_t region_no = extent * image->shape.extent_pages / IMAGE_REGION_PAGES;
	uint32_t to_region = atomic_load_explicit(&image->region_loans[region_no], memory_order_relaxed);
	uint32_t loans = atomic_load_explicit(&image->loans[extent], memory_order_relaxed);

	return loans > to_region ? loans - to_region : 0;
}

/* Drops the frames of nr extents from first, in every mapping of every guest. */
int image_punch(struct image *image, uint64_t first, uint64_t nr);

/* Counts a fault on the extent, for the eviction policy. */
static inline void image_touch(struct image *image, uint64_t extent)
{
	uint8_t seen = atomic_load_explicit(&image->touches[extent], memory_order_relaxed);

	if (seen < TOUCHES_MAX) /* a lost update is harmless: this is a hint */
		atomic_store_explicit(&image->touches[extent], (uint8_t)(seen + 1), memory_order_relaxed);
}

/* Records a grant of the extent: the first one puts it into the first-touch order. */
static inline void image_note_first_touch(struct image *image, uint64_t extent)
{
	if (atomic_load_explicit(&image->touched[extent], memory_order_relaxed))
		return;
	if (atomic_exchange_explicit(&image->touched[extent], 1, memory_order_relaxed))
		return;
	uint64_t no = atomic_fetch_add_explicit(&image->totals->nr_touched, 1, memory_order_relaxed);
	atomic_store_explicit(&image->order[no], (uint32_t)extent + 1, memory_order_release); /* 0: not yet written */
}

#endif
