/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest's quota of private pages, over all its accounts: its mappings, and those of processes that joined it.
 *
 * Pages are taken from the quota before they are charged to an account, and given back when the charge is.  Taking is
 * one compare-and-swap, so accounts that charge at the same time, each under its own write_lock, never take more
 * together than the limit.  A caller names the least it can use: it gets as many pages as are left, up to what it
 * wants, or none if fewer than that are left.
 *
 * Invariant: used_pages is the sum of private_pages over the quota's accounts, plus what is taken and not charged yet.
 * A mapping's account has taken but uncharged pages only under its write_lock, and account_quota_pages recomputes the
 * sum; an overlay's account has them in hand for as long as a request takes, and overlay_sums recomputes it.
 */
#ifndef COWSHED_QUOTA_H
#define COWSHED_QUOTA_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* cdef-begin */
struct quota;

enum quota_policy { QUOTA_STOP, QUOTA_KILL, QUOTA_ALLOW };

struct quota_status {
	uint64_t quota_pages, used_pages;
	uint32_t policy;
	uint32_t nr_accounts;
};

/* Makes an unused quota; it lives until the caller and every account have given up their references. */
int quota_open(uint64_t quota_pages, int policy, struct quota **quota_out);
/* Adopts the quota in a memfd that another process left; takes over the memfd on success. used_pages is 0 until its
 * accounts are adopted. -EBADMSG: it is not a quota. */
int quota_adopt(int fd, struct quota **quota_out);
/* Gives up a reference. */
void quota_close(struct quota *quota);
/* quota_pages may be less than the used pages: then none can be taken until enough are given back. */
int quota_set(struct quota *quota, uint64_t quota_pages, int policy);
void quota_read(const struct quota *quota, struct quota_status *status_out);
/* Its memfd, a struct quota_header; borrowed. */
int quota_fd(const struct quota *quota);
/* cdef-end */

#define QUOTA_MAGIC 0x3145535255505743ull /* "CWPURSE1", as other releases have it */
/* cdef-begin */
#define QUOTA_LAYOUT 1
/* cdef-end */

/* In a memfd of its own, for another process to adopt. */
struct quota_header {
	uint64_t magic;
	uint32_t layout;
	_Atomic uint32_t policy;
	_Atomic uint64_t quota_pages, used_pages;
};
_Static_assert(sizeof(struct quota_header) == 32 && offsetof(struct quota_header, quota_pages) == 16 &&
                       offsetof(struct quota_header, used_pages) == 24,
               "the layout is shared: a change needs a new QUOTA_LAYOUT");

struct quota {
	struct quota_header *header;
	int fd;
	_Atomic uint32_t nr_users;      /* references */
	_Atomic uint32_t nr_accounts;   /* of those, accounts */
	_Atomic uint64_t settled_at_ns; /* when account_settle_quota last ran */
};

/* For an account. */
void quota_join(struct quota *quota);
void quota_leave(struct quota *quota);

static inline uint32_t quota_policy_of(const struct quota *quota)
{
	return atomic_load_explicit(&quota->header->policy, memory_order_relaxed);
}

/* Whether nr pages could be taken now. */
static inline bool quota_has_room(const struct quota *quota, uint64_t nr)
{
	uint64_t used = atomic_load(&quota->header->used_pages);
	uint64_t limit = atomic_load(&quota->header->quota_pages);

	return quota_policy_of(quota) == QUOTA_ALLOW || (used < limit && limit - used >= nr);
}

/* Takes nr_most pages, or all that are left if fewer; none if fewer than nr_least are left. Returns how many. */
static inline uint64_t quota_take(struct quota *quota, uint64_t nr_least, uint64_t nr_most)
{
	struct quota_header *header = quota->header;
	uint64_t used = atomic_load(&header->used_pages), nr;

	do {
		uint64_t limit = atomic_load(&header->quota_pages);
		uint64_t left = limit > used ? limit - used : 0;

		if (quota_policy_of(quota) == QUOTA_ALLOW)
			left = nr_most;
		if (left < nr_least)
			return 0;
		nr = left < nr_most ? left : nr_most;
	} while (!atomic_compare_exchange_weak(&header->used_pages, &used, used + nr));
	return nr;
}

/* Takes pages past the quota too: the guest has them already. */
static inline void quota_take_anyway(struct quota *quota, uint64_t nr)
{
	atomic_fetch_add(&quota->header->used_pages, nr);
}

static inline void quota_give(struct quota *quota, uint64_t nr)
{
	atomic_fetch_sub(&quota->header->used_pages, nr);
}

#endif
