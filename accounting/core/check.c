/* SPDX-License-Identifier: Apache-2.0 */
/* Recomputes the invariants of an account (ledger.h), for tests. */
#include "accounting/core/ledger.h"
#include "cache/core/bits.h"

/* Under write_lock. */
static const char *check_regions(const struct account *account)
{
	uint64_t extent_pages = account->image->shape.extent_pages;
	uint64_t nr_regions = image_nr_regions(account->image), nr_open = 0, nr_lost = 0;

	for (uint64_t no = 0; no < nr_regions; no++) {
		bool open = bits_test(account->opened, no), lost = bits_test(account->lost, no);
		uint64_t first = no * OPEN_PAGES, end = first + OPEN_PAGES;

		nr_open += open;
		nr_lost += lost;
		for (uint64_t e = first / extent_pages; (open || lost) && e * extent_pages < end; e++)
			if (!atomic_load(&account->image->loans[e]))
				return "account (9): the extents of an opened or lost region are lent";
		for (uint64_t page = first; open && !account_is_read_only(account) && page < end; page++)
			if (!bits_test(account->private, page) && !bits_test(account->unmapped, page))
				return "account (9): the pages of an opened region are private";
	}
	if (nr_open != atomic_load(&account->nr_open) || nr_lost != atomic_load(&account->nr_lost))
		return "account (7): nr_open and nr_lost are the numbers of opened and lost bits";
	return NULL;
}

const char *account_check(struct account *account)
{
	const struct ledger_header *header = account->header;
	uint64_t nr_words = (header->nr_pages + 63) / 64;
	uint64_t nr_private = 0, nr_preloaded = 0, nr_reserved = 0;
	const char *broken = NULL;

	pthread_mutex_lock(&account->write_lock);
	for (uint64_t i = 0; i < nr_words && !broken; i++) {
		uint64_t private = atomic_load(&account->private[i]), unsettled = atomic_load(&account->unsettled[i]);
		uint64_t preloaded = atomic_load(&account->preloaded[i]);

		uint64_t reserved = atomic_load(&account->reserved[i]);

		nr_reserved += (uint64_t)__builtin_popcountll(reserved);
		if (reserved & ~unsettled || (reserved && !bits_test(account->opened, i * 64 / OPEN_PAGES)))
			broken = "account (8): reserved is a subset of unsettled, in opened regions";
		nr_private += (uint64_t)__builtin_popcountll(private);
		nr_preloaded += (uint64_t)__builtin_popcountll(preloaded);
		if (unsettled & ~private)
			broken = "account (3): unsettled is a subset of private";
		else if (preloaded & ~private || preloaded & unsettled)
			broken = "account (4): preloaded is a subset of private, and disjoint from unsettled";
	}
	if (!broken && nr_private != atomic_load(&header->private_pages))
		broken = "account (2): private_pages is the number of private bits";
	if (!broken && nr_reserved != atomic_load(&account->nr_reserved))
		broken = "account (7): nr_reserved is the number of reserved bits";
	if (!broken)
		broken = check_regions(account);
	if (!broken && nr_preloaded != atomic_load(&header->preloaded_pages))
		broken = "account (6): preloaded_pages is the number of preloaded bits";
	pthread_mutex_unlock(&account->write_lock);
	return broken;
}
