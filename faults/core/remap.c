/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A guest that moves, cuts up or unmaps its mapping.
 *
 * mremap waits until its REMAP event has been read, and then, for the old address, until its UNMAP event has. The
 * regions are updated for what moved. A guest that cuts its mapping into more regions than there is room for can no
 * longer be served; but its mremap must not hang, so the guest is dropped only after that second event, or after a
 * second if none comes (MREMAP_DONTUNMAP).
 */
#include "faults/core/remap.h"

#include "cache/core/abi.h"
#include "faults/core/answer.h"
#include "faults/core/guest.h"
#include "faults/core/uffd.h"

#include <errno.h>

#define DROP_AFTER_NS 1000000000u

void answer_drop(struct guest *guest)
{
	guest->drop_at_ns = 0;
	answer_failed(guest, -EXDEV);
}

void answer_remap(struct guest *guest, uint64_t from, uint64_t to, uint64_t length)
{
	struct account *account = guest->account;
	struct region_table table;

	account_regions(account, &table);
	int err = regions_move(&table, from, to, length);
	if (err) {
		guest->drop_at_ns = clock_now_ns() + DROP_AFTER_NS;
		guest->drop_address = from;
		return;
	}
	pthread_mutex_lock(&account->write_lock);
	account_set_regions(account, &table);
	pthread_mutex_unlock(&account->write_lock);
	/* Wake faults at the old address; nothing is mapped there now. */
	uffd_wake(guest->uffd, from, length);
}

void answer_unmap(struct guest *guest, uint64_t start, uint64_t end, bool unmapped)
{
	struct region_table table;
	uint64_t first, nr;

	if (guest->drop_at_ns) {
		if (unmapped && start <= guest->drop_address && guest->drop_address < end)
			answer_drop(guest);
		return;
	}
	account_regions(guest->account, &table);
	for (uint64_t i = 0; i < table.nr; i++)
		if (region_clip(&table.regions[i], start, end, &first, &nr))
			answer_discard(guest, first, nr, unmapped);
}

/*
 * Answers a fault outside the regions: in a mapping that grew, or in one that the guest registered with our
 * userfaultfd. The guest gets SIGBUS where the kernel can poison the page; otherwise it is woken and faults again.
 */
void answer_unknown_address(struct guest *guest, uint64_t address)
{
	address &= ~(uint64_t)(PAGE_BYTES - 1);
	if (guest->drop_at_ns || uffd_poison_page(guest->uffd, address, false) < 0)
		uffd_wake(guest->uffd, address, PAGE_BYTES);
}
