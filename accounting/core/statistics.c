/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Sums of the ledger's counters: of one account, and of all that an image ever had.
 *
 * Nothing here stops a fault thread. A counter is read while it grows; a sum of several is not a consistent snapshot,
 * but no account is counted twice or left out, and no counter ever decreases.
 */
#define _GNU_SOURCE
#include "accounting/core/ledger.h"

#include <errno.h>
#include <sched.h>
#include <string.h>
#include <time.h>

static uint64_t clock_ns(void)
{
	struct timespec now;

	clock_gettime(CLOCK_MONOTONIC, &now);
	return (uint64_t)now.tv_sec * 1000000000u + (uint64_t)now.tv_nsec;
}

void account_begin_stop(struct account *account)
{
	if (atomic_load(&account->header->stopped_since_ns))
		return;
	count_add(COUNTER(account->header, quota_stops), 1);
	atomic_store(&account->header->stopped_since_ns, clock_ns());
}

/* The clock is read after STOP_ENDING is stored, so that no reader has counted beyond that time. */
void account_end_stop(struct account *account)
{
	struct ledger_header *header = account->header;
	uint64_t since_ns = atomic_load(&header->stopped_since_ns);

	if (!since_ns)
		return;
	atomic_store(&header->stopped_since_ns, STOP_ENDING);
	atomic_fetch_add(COUNTER(header, stopped_ns), clock_ns() - since_ns);
	atomic_store(&header->stopped_since_ns, 0);
}

/* Returns the time stopped at the quota up to now, which never decreases; since_ns_out: since when, or 0. */
static uint64_t read_stopped_ns(const struct ledger_header *header, uint64_t *since_ns_out)
{
	for (;;) {
		uint64_t since_ns = atomic_load(&header->stopped_since_ns);
		uint64_t before_ns = atomic_load(COUNTER(header, stopped_ns));
		uint64_t now_ns = clock_ns();

		if (since_ns != STOP_ENDING && since_ns == atomic_load(&header->stopped_since_ns)) {
			*since_ns_out = since_ns;
			return before_ns + (since_ns ? now_ns - since_ns : 0);
		}
		sched_yield();
	}
}

/* The counters are words, in the order of the struct. */
static void add_counters(const struct ledger_header *header, uint64_t *counts, uint64_t *since_ns_out)
{
	uint64_t stopped_ns = read_stopped_ns(header, since_ns_out);

	for (size_t i = 0; i < COUNTS_NR; i++)
		if (i != COUNT_NO(stopped_ns))
			counts[i] += atomic_load_explicit(&header->counts[i], memory_order_relaxed);
	counts[COUNT_NO(stopped_ns)] += stopped_ns;
}

static void add_latencies(const struct ledger_header *header, uint64_t *sum_ns, uint64_t (*counts)[LATENCY_BUCKETS])
{
	for (int kind = 0; kind < LATENCY_NR; kind++) {
		sum_ns[kind] += atomic_load_explicit(&header->latency_sum_ns[kind], memory_order_relaxed);
		for (int i = 0; i < LATENCY_BUCKETS; i++)
			counts[kind][i] += atomic_load_explicit(&header->latency[kind][i], memory_order_relaxed);
	}
}

void account_add_past(const struct account *account)
{
	struct account_past *past = account->image->past;
	uint64_t since_ns;

	add_counters(account->header, past->counts, &since_ns);
	add_latencies(account->header, past->latency_sum_ns, past->latency);
}

/* Two counters, which change one after the other. */
static uint64_t private_pages(const struct account *account)
{
	uint64_t nr_reserved = atomic_load(&account->nr_reserved);
	uint64_t nr_charged = atomic_load(&account->header->private_pages);

	return nr_charged > nr_reserved ? nr_charged - nr_reserved : 0;
}

void account_read(const struct account *account, struct account_status *status_out)
{
	struct ledger_header *header = account->header;
	struct account_status status = {
		.granted_extents = header->granted_extents,
		.private_pages = private_pages(account),
		.quota_pages = atomic_load(&account->quota->header->quota_pages),
		.policy = quota_policy_of(account->quota),
		.broken = header->broken,
		.frozen = atomic_load(&header->frozen),
		.preloaded_pages = atomic_load(&header->preloaded_pages),
		.open_regions = atomic_load(&account->nr_open),
		.lost_regions = atomic_load(&account->nr_lost),
		.reserved_pages = atomic_load(&account->nr_reserved),
		.account_no = account->account_no,
	};

	add_counters(header, (uint64_t *)&status.counters, &status.stopped_since_ns);
	*status_out = status;
}

int64_t account_read_all(struct image *image, struct account_status *statuses_out, uint64_t nr_max)
{
	uint64_t nr = 0;

	pthread_rwlock_rdlock(&image->accounts_lock);
	for (const struct account *account = image->accounts; account; account = account->next, nr++)
		if (nr < nr_max)
			account_read(account, &statuses_out[nr]);
	pthread_rwlock_unlock(&image->accounts_lock);
	return (int64_t)nr;
}

static enum account_state state_of(const struct ledger_header *header)
{
	if (atomic_load(&header->broken))
		return ACCOUNT_BROKEN;
	if (atomic_load(&header->frozen))
		return ACCOUNT_FROZEN;
	uint64_t since_ns = atomic_load(&header->stopped_since_ns);
	return since_ns && since_ns != STOP_ENDING ? ACCOUNT_STOPPED : ACCOUNT_RUNNING;
}

int64_t account_states(struct image *image, uint64_t *account_nos_out, uint8_t *states_out, uint64_t nr_max)
{
	uint64_t nr = 0;

	pthread_rwlock_rdlock(&image->accounts_lock);
	for (const struct account *account = image->accounts; account; account = account->next, nr++) {
		if (nr >= nr_max)
			continue;
		account_nos_out[nr] = account->account_no;
		states_out[nr] = (uint8_t)state_of(account->header);
	}
	pthread_rwlock_unlock(&image->accounts_lock);
	return (int64_t)nr;
}

static uint64_t raise_to(_Atomic uint64_t *highest, uint64_t value)
{
	uint64_t seen = atomic_load(highest);

	while (seen < value && !atomic_compare_exchange_weak(highest, &seen, value))
		;
	return seen < value ? value : seen;
}

void account_sum(struct image *image, struct account_sums *sums_out)
{
	struct account_past *past = image->past;

	*sums_out = (struct account_sums){0};
	pthread_rwlock_rdlock(&image->accounts_lock);
	memcpy(&sums_out->counters, past->counts, sizeof past->counts);
	memcpy(sums_out->latency_sum_ns, past->latency_sum_ns, sizeof past->latency_sum_ns);
	memcpy(sums_out->latency, past->latency, sizeof past->latency);
	sums_out->closed_cow_pages = sums_out->counters.charged_pages - sums_out->counters.uncharged_pages;
	for (const struct account *account = image->accounts; account; account = account->next) {
		const struct ledger_header *header = account->header;
		uint64_t since_ns;

		add_counters(header, (uint64_t *)&sums_out->counters, &since_ns);
		add_latencies(header, sums_out->latency_sum_ns, sums_out->latency);
		sums_out->private_pages += private_pages(account);
		sums_out->reserved_pages += atomic_load(&account->nr_reserved);
		sums_out->open_regions += atomic_load(&account->nr_open);
		sums_out->lost_regions += atomic_load(&account->nr_lost);
	}
	sums_out->opens = atomic_load(&past->opens);
	for (int i = 0; i < CLOSE_NR; i++)
		sums_out->closes[i] = atomic_load(&past->closes[i]);
	uint64_t charged = sums_out->counters.charged_pages, returned = sums_out->counters.uncharged_pages;
	sums_out->cow_pages = raise_to(&past->cow_pages, charged > returned ? charged - returned : 0);
	pthread_rwlock_unlock(&image->accounts_lock);
}

/* Four buckets to each power of two: bounds are within 25 % of any duration they hold. */
uint32_t bucket_of(uint64_t duration_ns)
{
	if (duration_ns < 4)
		return (uint32_t)duration_ns;
	uint32_t exponent = 63 - (uint32_t)__builtin_clzll(duration_ns);
	uint32_t bucket = (exponent - 1) * 4 + (uint32_t)(duration_ns >> (exponent - 2) & 3);
	return bucket < LATENCY_BUCKETS ? bucket : LATENCY_BUCKETS - 1;
}

uint64_t bucket_bound_ns(uint32_t bucket)
{
	uint32_t next = bucket + 1;

	if (next < 8)
		return next;
	return (uint64_t)(4 + next % 4) << (next / 4 - 1);
}

void account_note_latency(struct account *account, int kind, uint64_t duration_ns)
{
	count_add(&account->header->latency[kind][bucket_of(duration_ns)], 1);
	count_add(&account->header->latency_sum_ns[kind], duration_ns);
}

int account_latency(const struct account *account, int kind, uint64_t *counts_out, uint64_t *sum_ns_out)
{
	if (kind < 0 || kind >= LATENCY_NR)
		return -EINVAL;
	for (int i = 0; i < LATENCY_BUCKETS; i++)
		counts_out[i] += account->header->latency[kind][i];
	*sum_ns_out += account->header->latency_sum_ns[kind];
	return 0;
}
