/* SPDX-License-Identifier: Apache-2.0 */
/* Recomputes the invariants of an account (ledger.h), for tests. */
#include "accounting/core/ledger.h"
#include "cache/core/bits.h"

const char *account_check(struct account *account)
{
	const struct ledger_header *header = account->header;
	uint64_t nr_words = (header->nr_pages + 63) / 64;
	uint64_t nr_private = 0, nr_preloaded = 0;
	const char *broken = NULL;

	pthread_mutex_lock(&account->write_lock);
	for (uint64_t i = 0; i < nr_words && !broken; i++) {
		uint64_t private = atomic_load(&account->private[i]), unsettled = atomic_load(&account->unsettled[i]);
		uint64_t preloaded = atomic_load(&account->preloaded[i]);

		nr_private += (uint64_t)__builtin_popcountll(private);
		nr_preloaded += (uint64_t)__builtin_popcountll(preloaded);
		if (unsettled & ~private)
			broken = "account (3): unsettled is a subset of private";
		else if (preloaded & ~private || preloaded & unsettled)
			broken = "account (4): preloaded is a subset of private, and disjoint from unsettled";
	}
	if (!broken && nr_private != atomic_load(&header->private_pages))
		broken = "account (2): private_pages is the number of private bits";
	if (!broken && nr_preloaded != atomic_load(&header->preloaded_pages))
		broken = "account (6): preloaded_pages is the number of preloaded bits";
	pthread_mutex_unlock(&account->write_lock);
	return broken;
}
