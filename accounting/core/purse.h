/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What a guest may spend on private pages, over all its accounts: its mappings, and those of processes that
 * joined it.
 *
 * Pages are taken before they are charged to an account and given back when the charge is.  Taking is one
 * compare-and-swap, so accounts that charge at the same time, each under its own write_lock, never take more
 * together than there is.  It takes all it needs or nothing: nobody finds the purse empty because of what
 * somebody else took for a moment only.
 *
 * Invariant: used_pages is the sum of private_pages over the purse's accounts, plus what is taken and not charged
 * yet.  A mapping's account has such pages only under its write_lock, and account_purse_pages recomputes it; an
 * overlay's has them in hand for as long as a request takes, and overlay_sums does.
 */
#ifndef COWSHED_PURSE_H
#define COWSHED_PURSE_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* cdef-begin */
struct purse;

enum quota_policy { QUOTA_STOP, QUOTA_KILL, QUOTA_ALLOW };

struct purse_status {
	uint64_t quota_pages, used_pages;
	uint32_t policy;
	uint32_t nr_accounts;
};

/* An empty purse; the caller's reference and each account's keep it. */
int purse_open(uint64_t quota_pages, int policy, struct purse **purse_out);
/* The purse in a memfd that another process left, taken over on success; nothing is used until its accounts are adopted
 * too.  -EBADMSG: it is none of ours. */
int purse_adopt(int fd, struct purse **purse_out);
/* Gives up a reference. */
void purse_close(struct purse *purse);
/* May be less than what is used: then nothing can be taken until enough was given back. */
int purse_set_quota(struct purse *purse, uint64_t quota_pages, int policy);
void purse_read(const struct purse *purse, struct purse_status *status_out);
/* The memfd that holds it: struct purse_header; the purse's own. */
int purse_fd(const struct purse *purse);
/* cdef-end */

#define PURSE_MAGIC 0x3145535255505743ull /* "CWPURSE1" */
/* cdef-begin */
#define PURSE_LAYOUT 1
/* cdef-end */

/* In a memfd of its own, for another process to adopt. */
struct purse_header {
	uint64_t magic;
	uint32_t layout;
	_Atomic uint32_t policy;
	_Atomic uint64_t quota_pages, used_pages;
};
_Static_assert(sizeof(struct purse_header) == 32 && offsetof(struct purse_header, quota_pages) == 16 &&
                       offsetof(struct purse_header, used_pages) == 24,
               "the layout is shared: a change needs a new PURSE_LAYOUT");

struct purse {
	struct purse_header *header;
	int fd;
	_Atomic uint32_t nr_users;      /* references */
	_Atomic uint32_t nr_accounts;   /* of those, accounts */
	_Atomic uint64_t settled_at_ns; /* when all its accounts were settled for the sake of one */
};

/* For an account. */
void purse_join(struct purse *purse);
void purse_leave(struct purse *purse);

static inline uint32_t purse_policy(const struct purse *purse)
{
	return atomic_load_explicit(&purse->header->policy, memory_order_relaxed);
}

/* Whether nr pages could be taken now. */
static inline bool purse_has_room(const struct purse *purse, uint64_t nr)
{
	uint64_t used = atomic_load(&purse->header->used_pages);
	uint64_t quota = atomic_load(&purse->header->quota_pages);

	return purse_policy(purse) == QUOTA_ALLOW || (used < quota && quota - used >= nr);
}

/* Takes at most nr_most pages: all that is left, if that is less; but nothing if it is less than nr_least. */
static inline uint64_t purse_take(struct purse *purse, uint64_t nr_least, uint64_t nr_most)
{
	struct purse_header *header = purse->header;
	uint64_t used = atomic_load(&header->used_pages), nr;

	do {
		uint64_t quota = atomic_load(&header->quota_pages);
		uint64_t left = quota > used ? quota - used : 0;

		if (purse_policy(purse) == QUOTA_ALLOW)
			left = nr_most;
		if (left < nr_least)
			return 0;
		nr = left < nr_most ? left : nr_most;
	} while (!atomic_compare_exchange_weak(&header->used_pages, &used, used + nr));
	return nr;
}

/* Takes pages past the quota too: the guest has them already. */
static inline void purse_take_anyway(struct purse *purse, uint64_t nr)
{
	atomic_fetch_add(&purse->header->used_pages, nr);
}

static inline void purse_give(struct purse *purse, uint64_t nr)
{
	atomic_fetch_sub(&purse->header->used_pages, nr);
}

#endif
