/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The ledger of one mapping of a guest, or of one overlay: its regions, grants, private pages and counters.
 *
 * A guest may have several mappings, in one process or in several, each with its account; together they share one quota
 * (quota.h). All of an account lives in one memfd (header, then bitmaps), so that it can outlive the process; struct
 * account is this process's handle on it.
 *
 *   granted    by extent  the guest may map it; counted in the image's refs
 *   private    by page    charged: the page is the guest's own, or it was allowed to become so
 *   unsettled  by page    charged, but the kernel's copy has not been seen yet (settle.h)
 *   discarded  by page    was given back once (MADV_DONTNEED); a late zap may still take a new copy away, so
 *                         such a page never counts as settled for good
 *   unmapped   by page    the guest unmapped it (munmap): what is at its address now is not ours
 *   poisoned   by page    SIGBUS for the guest, because the source failed
 *   preloaded  by page    private, and still only in the preload file, not in the guest's memory yet (preload.h)
 *   reserved   by page    charged with its open region (open_regions.h), and no copy of it was seen
 *   opened     by region  the region is open
 *   lost       by region  was open, and the guest has moved a part of it away unguarded: its frames stay lent
 *
 * While private pages are tracked (track.h) there is one more bitmap, in the process's own memory:
 *
 *   dirty      by page    became private, was written, or is private no more, since the dirty pages were last taken
 */
#ifndef COWSHED_LEDGER_H
#define COWSHED_LEDGER_H

#include "accounting/core/quota.h"
#include "accounting/core/regions.h"
#include "cache/core/bits.h"
#include "cache/core/collapse.h"
#include "cache/core/image.h"

#include <pthread.h>

/* cdef-begin */
struct account;

/* Why a region is closed: its quota ran short, room did, its pages are tracked or frozen, it is evicted, to learn
 * whether it is used, its guest changed or unguarded it. */
enum close_reason { CLOSE_QUOTA, CLOSE_PRESSURE, CLOSE_FREEZE, CLOSE_REQUEST, CLOSE_SAMPLE, CLOSE_GUEST };
#define CLOSE_NR 6

enum latency_kind { LATENCY_HIT, LATENCY_MISS, LATENCY_WRITE, LATENCY_NR };
#define LATENCY_BUCKETS 160

struct account_counters {
	uint64_t faults_missing, faults_minor, faults_write; /* reported, before anything is done about them */
	uint64_t misses; /* missing and minor faults that began to wait for a load */
	/* Faults that were answered, by kind and outcome; hits are missing_hit and minor_hit. */
	/* The extent was resident; was loaded, for this fault or an earlier one; could not be loaded. */
	uint64_t missing_hit, missing_loaded, missing_failed;
	uint64_t minor_hit, minor_loaded, minor_failed;
	uint64_t write_copied;    /* opened, so that the kernel makes the copy */
	uint64_t write_refused;   /* at the quota; includes first touches that were writes */
	uint64_t charged_pages;   /* ever charged */
	uint64_t uncharged_pages; /* of those, given back because the copy never happened */
	uint64_t discarded_pages; /* private pages the guest gave back */
	uint64_t mapped_pages;    /* mapped into the guest, on a fault or ahead */
	uint64_t poisoned_pages, repaired_pages;
	uint64_t quota_stops; /* times the guest came to a stop at its quota */
	uint64_t retries;     /* answers put off because the guest's memory was changing */
	uint64_t stopped_ns;  /* time spent stopped at the quota; in an account_status up to now */
};

struct account_status {
	uint64_t granted_extents;
	uint64_t private_pages;    /* charged now, and not reserved */
	uint64_t quota_pages;      /* the quota's limit; the policy is the quota's, too */
	uint64_t stopped_since_ns; /* CLOCK_MONOTONIC, 0: running */
	uint32_t policy;
	int32_t broken;  /* -errno once its memory can't be served any more */
	uint32_t frozen; /* 1: no private page changes until the thaw */
	uint32_t spare;
	uint64_t preloaded_pages; /* private pages that are not in its memory yet */
	uint64_t open_regions, lost_regions;
	uint64_t reserved_pages; /* charged, with open regions, and not private; private_pages does not count them */
	uint64_t account_no;     /* unique in this process, never used again */
	struct account_counters counters;
};

/* All accounts of one image together. The counters include closed accounts. */
struct account_sums {
	uint64_t private_pages;  /* charged now, and not reserved */
	uint64_t reserved_pages; /* as account_status.reserved_pages */
	uint64_t open_regions, lost_regions;
	uint64_t opens;            /* of regions, ever */
	uint64_t closes[CLOSE_NR]; /* by reason: enum close_reason */
	uint64_t cow_pages;        /* private copies ever made; never less than an earlier reading, see account_sum */
	uint64_t closed_cow_pages; /* of accounts that were closed */
	struct account_counters counters;
	uint64_t latency_sum_ns[LATENCY_NR];
	uint64_t latency[LATENCY_NR][LATENCY_BUCKETS];
};

/* Opens an empty ledger of a guest's mapping of image and adds it to the image's accounts. It keeps a reference to
 * quota, which pays for its pages. All accounts of a quota must be of one image. */
int account_open(struct image *image, struct quota *quota, struct account **account_out);
/* Adopts the account in a memfd that another process left; takes over the memfd on success. The caller must have
 * adopted its image and quota. Repairs what may be half done: drops grants of extents that are no longer resident,
 * recounts, and marks private pages unsettled, since discards may have been read and not handled. The caller must then
 * call account_place. -EBADMSG: it belongs to another image. */
int account_adopt(struct image *image, struct quota *quota, int ledger_fd, struct account **account_out);
/* Its memfd; borrowed. */
int account_fd(const struct account *account);
/* As account_status.account_no. */
uint64_t account_number(const struct account *account);
/* Returns all grants and charges.  The guest's fault thread must have been stopped. */
int account_close(struct account *account);
/* Sets where the guest's mapping is; descriptors are borrowed and must outlive the account. Fails as regions_make
 * does. */
int account_place(struct account *account, int uffd, int pagemap_fd, const struct account_region *regions,
                  uint64_t nr_regions);
/* Copies the regions as they are now. */
void account_regions(const struct account *account, struct region_table *table_out);

void account_read(const struct account *account, struct account_status *status_out);
/* Adds the latency counts to counts_out[LATENCY_BUCKETS] and the total to sum_ns_out.
 * Bucket i holds durations below bucket_bound_ns(i). */
int account_latency(const struct account *account, int kind, uint64_t *counts_out, uint64_t *sum_ns_out);
uint64_t bucket_bound_ns(uint32_t bucket);
/* Adds up the accounts of an image; no account opens or closes meanwhile. cow_pages is the highest value so far of
 * charged less uncharged pages: ahead of the kernel by unsettled charges. */
void account_sum(struct image *image, struct account_sums *sums_out);
/* Reads up to nr_max accounts of an image, the latest opened first; returns how many there are. */
int64_t account_read_all(struct image *image, struct account_status *statuses_out, uint64_t nr_max);
enum account_state { ACCOUNT_RUNNING, ACCOUNT_STOPPED, ACCOUNT_FROZEN, ACCOUNT_BROKEN };
/* As account_read_all, but reads only each account_no and enum account_state; cheaper. */
int64_t account_states(struct image *image, uint64_t *account_nos_out, uint8_t *states_out, uint64_t nr_max);
/* Counts the private pages of all accounts of this one's quota; used_out: the quota's used pages, which must be the
 * same number. Cost: waits for each account's write_lock. */
uint64_t account_quota_pages(struct account *account, uint64_t *used_out);
/* Adds 1 to refs_out[i] for each granted extent first + i. */
int account_add_grants(const struct account *account, uint64_t first, uint64_t nr, uint32_t *refs_out);
/* Copies the bitmap of private (unsettled 1: of unsettled) pages: (nr_pages + 63) / 64 words. */
int account_bitmap(const struct account *account, int unsettled, uint64_t *words_out, uint64_t nr_words);
/* Recomputes the invariants of a mapping's account; returns one that does not hold, or NULL. For tests; O(pages) under
 * write_lock. */
const char *account_check(struct account *account);
/* cdef-end */

#define COUNTS_NR (sizeof(struct account_counters) / sizeof(uint64_t))
#define COUNT_NO(name) (offsetof(struct account_counters, name) / sizeof(uint64_t))
#define COUNTER(header, name) (&(header)->counts[COUNT_NO(name)])
/* The value of stopped_since_ns while a stop is being added to stopped_ns. */
#define STOP_ENDING 1
#define LEDGER_MAGIC 0x474c4453574f43ull /* "COWSDLG" */
/* cdef-begin */
#define LEDGER_LAYOUT 5
#define OPEN_REGIONS_LAYOUT 1 /* of what is added for open regions at the end of the ledger, and of the arrays */
/* cdef-end */
#define LEDGER_READ_ONLY 0 /* the guest does not write its mapping: its open regions are not charged */
#define LEDGER_SERVED_WORDS 16
#define LEDGER_INBOX_WORDS 64

struct ledger_header {
	uint64_t magic;
	uint32_t layout;
	_Atomic int32_t broken;
	uint64_t nr_pages, nr_extents;
	_Atomic uint64_t granted_extents, private_pages, stopped_since_ns, preloaded_pages;
	_Atomic uint32_t frozen;    /* see account_freeze; an adopted account is still frozen */
	_Atomic uint32_t protected; /* private pages may be write-protected: see account_track */
	struct shared_regions regions;
	_Atomic uint64_t counts[COUNTS_NR]; /* struct account_counters: COUNTER() */
	_Atomic uint64_t latency_sum_ns[LATENCY_NR];
	_Atomic uint64_t latency[LATENCY_NR][LATENCY_BUCKETS];
	_Atomic uint64_t served[LEDGER_SERVED_WORDS]; /* transport's counters of the clients of an overlay */
	_Atomic uint32_t populated; /* pages are copied into the guest; adopting then adds no discarded bits */
	_Atomic uint32_t opening;   /* 1 + the region that is being opened, from before it is unregistered on */
	/* The fault thread reads messages into this; an event stays until it is handled, so that no death loses it. See
	 * guest.c. */
	uint64_t inbox[LEDGER_INBOX_WORDS];
};
_Static_assert(sizeof(struct ledger_header) ==
                       sizeof(struct shared_regions) + 8 * (9 + COUNTS_NR + LATENCY_NR * (1 + LATENCY_BUCKETS) +
                                                            LEDGER_SERVED_WORDS + 1 + LEDGER_INBOX_WORDS),
               "the layout is shared: a change needs a new LEDGER_LAYOUT");

/* The counters of closed accounts, in the image's memfd (image->past). */
struct account_past {
	uint64_t counts[COUNTS_NR];
	uint64_t latency_sum_ns[LATENCY_NR];
	uint64_t latency[LATENCY_NR][LATENCY_BUCKETS];
	_Atomic uint64_t cow_pages;               /* the highest sum so far */
	_Atomic uint64_t opens, closes[CLOSE_NR]; /* of closed accounts too; 0 from releases before */
};
_Static_assert(sizeof(struct account_past) <= 8 * IMAGE_PAST_WORDS, "an image has room for it");

/*
 * Invariants: (1) granted_extents is the number of granted bits, each counted in the image's refs;
 * (2) private_pages is the number of private bits, each taken from the quota; (3) unsettled is a subset of private.
 * (4) preloaded is a subset of private, and disjoint from unsettled; (5) while dirty is not NULL, every private page
 * that the guest can write without a fault is dirty; (6) header->preloaded_pages is the number of preloaded bits;
 * (7) nr_open, nr_lost and nr_reserved are the numbers of opened, lost and reserved bits; (8) reserved is a subset of
 * unsettled, and lies in opened regions; (9) all pages of an opened region are private, unless read-only or unmapped,
 * and its extents are lent, as those of a lost one. (2) to (9) change only under write_lock (an overlay's, under its
 * stripes' locks); so do the regions, and only in the guest's fault thread. An audit recomputes (1), account_check (2)
 * to (4) and (6) to (9).
 */
struct account {
	struct account *next; /* in image->accounts */
	uint64_t account_no;
	struct image *image;
	struct quota *quota;
	struct ledger_header *header;
	size_t ledger_bytes;
	int ledger_fd, uffd, pagemap_fd;
	bool populated; /* pages are copied into the guest, not mapped */
	bits_word *granted, *private, *unsettled, *discarded, *unmapped, *poisoned, *preloaded;
	bits_word *reserved, *opened, *lost;
	bits_word *flags; /* LEDGER_READ_ONLY */
	_Atomic uint64_t nr_open, nr_lost, nr_reserved;
	uint64_t quota_short_ns;    /* when regions were last closed for the quota; 0: never */
	uint64_t close_at;          /* where account_close_for_quota goes on */
	_Atomic uint8_t *faults;    /* by region: faults since it was last named wanted, at most FAULTS_WANTED */
	bits_word *wanted;          /* by region: worth opening, says the fault thread */
	_Atomic bool wants_regions; /* wanted has a bit that nobody took */
	bits_word *dirty;           /* NULL: private pages are not tracked */
	bool thaw_ends_tracking;
	const char
		*preloaded_bytes; /* the preload file, mapped while it has pages that are not in the guest's memory */
	int preload_fd;
	pthread_mutex_t write_lock; /* within image->accounts_lock, outside store->lock */
};

/* Grants an extent that the caller holds. */
void account_grant(struct account *account, uint64_t extent);
/* Takes a grant back; the extent is EVICTING, or the account is closing. */
void account_revoke(struct account *account, uint64_t extent);

/* Under write_lock.  Charges a page that is not private yet; the caller has taken it from the quota. */
void account_charge(struct account *account, uint64_t page);
/* Under write_lock.  Gives the charge of a private page back, to the quota. */
void account_uncharge(struct account *account, uint64_t page);

/* Under write_lock: the pages are about to be writable, or changed in another way. */
static inline void account_mark_dirty(struct account *account, uint64_t first, uint64_t nr)
{
	for (uint64_t page = first; account->dirty && page < first + nr; page++)
		bits_set(account->dirty, page);
}

static inline bool account_is_frozen(const struct account *account)
{
	return atomic_load_explicit(&account->header->frozen, memory_order_acquire);
}

/* Under write_lock, in the fault thread: the guest moved some of its memory. */
void account_set_regions(struct account *account, const struct region_table *table);

/* Where the whole image is mapped in one piece; 0 if it is not. */
static inline uint64_t account_whole(const struct account *account)
{
	return atomic_load_explicit(&account->header->regions.whole_address, memory_order_acquire);
}

/* The first run of pages [first, end) that the guest has in one piece; false if it has none of them.  To visit all:
 *     for (; account_span(account, first, end, &span); first = span.page + span.nr_pages) */
static inline bool account_span(const struct account *account, uint64_t first, uint64_t end,
                                struct account_span *span_out)
{
	uint64_t whole = account_whole(account);

	if (__builtin_expect(whole == 0, 0))
		return regions_span(&account->header->regions, first, end, span_out);
	*span_out = (struct account_span){first, end - first, whole + (first << 12)};
	return first < end;
}

static inline bool account_is_read_only(const struct account *account)
{
	return bits_test(account->flags, LEDGER_READ_ONLY);
}

/* Whether the page lies in an open region. */
static inline bool account_is_open(const struct account *account, uint64_t page)
{
	return __builtin_expect(atomic_load_explicit(&account->nr_open, memory_order_relaxed) != 0, 0) &&
	       bits_test(account->opened, page / OPEN_PAGES);
}

/* Where a page is; 0 if the guest does not have it. */
static inline uint64_t account_address(const struct account *account, uint64_t page)
{
	struct account_span span;

	return account_span(account, page, page + 1, &span) ? span.address : 0;
}

/* The region of a page; false if there is none. */
static inline bool account_region_of(const struct account *account, uint64_t page, struct account_region *region_out)
{
	uint64_t whole = account_whole(account);

	if (__builtin_expect(whole == 0, 0))
		return regions_find_page(&account->header->regions, page, region_out);
	*region_out = (struct account_region){whole, 0, account->image->shape.nr_pages};
	return true;
}

/* The page at an address; false if no region has it. */
static inline bool account_page_at(const struct account *account, uint64_t address, uint64_t *page_out)
{
	struct account_region region = {account_whole(account), 0, account->image->shape.nr_pages};

	if (__builtin_expect(region.address == 0, 0) &&
	    !regions_find_address(&account->header->regions, address, &region))
		return false;
	*page_out = region.first_page + ((address - region.address) >> 12);
	return address - region.address < region.nr_pages << 12;
}

uint32_t bucket_of(uint64_t duration_ns);
void account_note_latency(struct account *account, int kind, uint64_t duration_ns);

/* Begin and end a stop of the guest at its quota; both in its fault thread. */
void account_begin_stop(struct account *account);
void account_end_stop(struct account *account);
/* Under accounts_lock for writing: adds the account's counters to its image's past. */
void account_add_past(const struct account *account);

static inline void count_add(_Atomic uint64_t *counter, uint64_t nr)
{
	atomic_fetch_add_explicit(counter, nr, memory_order_relaxed);
}

enum fault_outcome { FAULT_HIT, FAULT_LOADED, FAULT_FAILED };
_Static_assert(COUNT_NO(missing_failed) == COUNT_NO(missing_hit) + FAULT_FAILED &&
                       COUNT_NO(minor_failed) == COUNT_NO(minor_hit) + FAULT_FAILED,
               "count_access adds the outcome to the counter's number");

/* The outcome of a fault that waited: for a load, or for bytes of the standby list (restored). */
static inline enum fault_outcome waited_outcome(int status, bool restored)
{
	return status ? FAULT_FAILED : restored ? FAULT_HIT : FAULT_LOADED;
}

/* A missing (or minor) fault was answered. */
static inline void count_access(struct ledger_header *header, bool minor, enum fault_outcome outcome)
{
	count_add(&header->counts[(minor ? COUNT_NO(minor_hit) : COUNT_NO(missing_hit)) + outcome], 1);
}

#endif
