/* SPDX-License-Identifier: Apache-2.0 */
/* Which regions a guest's fault thread finds worth opening (open_regions.h): a hint, without a lock. */
#include "accounting/core/open_regions.h"

#include "cache/core/store.h"

#define FAULTS_WANTED 4 /* in a region that is not collapsed; else the first one */

void account_note_fault(struct account *account, uint64_t page)
{
	uint64_t region_no = page / OPEN_PAGES;
	uint8_t seen = atomic_load_explicit(&account->faults[region_no], memory_order_relaxed);

	if ((region_no + 1) * OPEN_PAGES > account->header->nr_pages)
		return;
	if (seen < UINT8_MAX) /* only the fault thread writes it, but for a reset: a lost one is harmless */
		atomic_store_explicit(&account->faults[region_no], ++seen, memory_order_relaxed);
	if (seen < FAULTS_WANTED && !image_is_collapsed(account->image, region_no))
		return;
	if (bits_set(account->wanted, region_no) && !atomic_exchange(&account->wants_regions, true))
		store_raise(account->image->store->wanted_fd);
}

int64_t account_take_wanted(struct account *account, uint32_t *regions_out, uint64_t nr_max)
{
	uint64_t nr_regions = image_nr_regions(account->image), nr = 0;

	if (!atomic_exchange(&account->wants_regions, false))
		return 0;
	for (uint64_t no = 0; (no = bits_next(account->wanted, no, nr_regions)) < nr_regions; no++) {
		if (nr == nr_max) {
			atomic_store(&account->wants_regions, true);
			break;
		}
		bits_clear(account->wanted, no);
		atomic_store_explicit(&account->faults[no], 0, memory_order_relaxed);
		regions_out[nr++] = (uint32_t)no;
	}
	return (int64_t)nr;
}
