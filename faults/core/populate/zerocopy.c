/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Zerocopy guests: extents are pinned for them and announced, so that they map the frames themselves.
 *
 * Nothing guards such a mapping: an extent punched under it would read as zeros, silently. So an extent is announced
 * only while it is resident and pinned, and the pin is given back once the guest is stopped. An extent that was copied
 * in part is never lent.
 */
#include "cache/core/abi.h"
#include "cache/core/collapse.h"
#include "cache/core/store.h"
#include "faults/core/populate/populate.h"

#include <errno.h>

#define LOOKS_AT_ONCE 64

/* The extents that are lent and announced together: one, or those of a huge page, the guest's or the frames'. A part of
 * huge frames would keep the rest from being evicted; none is made of frames that are lent. */
struct unit {
	uint64_t extent, nr;
};

static struct unit unit_of(const struct guest *guest, uint64_t extent)
{
	const struct image_shape *shape = &guest->image->shape;
	const struct populate *populate = guest->populate;
	uint64_t page = extent * shape->extent_pages;
	uint64_t huge = page / OPEN_PAGES * OPEN_PAGES / shape->extent_pages;

	for (uint32_t i = 0; i < populate->nr_regions; i++) {
		const struct populate_region *region = &populate->regions[i];

		if (region->page_bytes == PAGE_BYTES || page - region->first_page >= region->nr_pages)
			continue;
		uint64_t first = page - (page - region->first_page) % HUGE_PAGES;
		uint64_t end = first + HUGE_PAGES < shape->nr_pages ? first + HUGE_PAGES : shape->nr_pages;

		return (struct unit){.extent = first / shape->extent_pages,
		                     .nr = (end - 1) / shape->extent_pages + 1 - first / shape->extent_pages};
	}
	if (image_collapsed_extents(guest->image, huge) > 1)
		return (struct unit){.extent = huge, .nr = image_collapsed_extents(guest->image, huge)};
	return (struct unit){.extent = extent, .nr = 1};
}

static bool allowance_take(struct zerocopy_allowance *allowance, uint64_t nr)
{
	_Atomic uint64_t *left = (_Atomic uint64_t *)&allowance->left_extents;
	uint64_t seen = atomic_load(left);

	while (seen >= nr)
		if (atomic_compare_exchange_weak(left, &seen, seen - nr))
			return true;
	return false;
}

static void allowance_give(struct zerocopy_allowance *allowance, uint64_t nr)
{
	atomic_fetch_add((_Atomic uint64_t *)&allowance->left_extents, nr);
}

/* Pins the unit, if none of it was copied and there is room for it. */
static bool unit_pin(struct guest *guest, struct unit unit)
{
	struct populate *populate = guest->populate;
	const struct image_shape *shape = &guest->image->shape;
	uint64_t end = unit.extent + unit.nr;
	uint64_t first_page = unit.extent * shape->extent_pages, end_page = end * shape->extent_pages;
	uint64_t room = image_room(guest->image, unit.extent, unit.nr);

	if (bits_test(populate->lent, unit.extent))
		return true;
	end_page = end_page < shape->nr_pages ? end_page : shape->nr_pages;
	if (bits_next(guest->account->private, first_page, end_page) < end_page)
		return false;
	if (!allowance_take(populate->allowance, room))
		return false;
	if (store_lend(guest->image, unit.extent, unit.nr, populate->max_pinned_extents) < 0) {
		allowance_give(populate->allowance, room);
		return false;
	}
	for (uint64_t extent = unit.extent; extent < end; extent++)
		bits_set(populate->lent, extent);
	return true;
}

/* Announces a pinned unit if all of it is resident, as it then stays; returns whether it did. */
static bool unit_announce(struct guest *guest, struct unit unit)
{
	struct image *image = guest->image;
	uint64_t end = unit.extent + unit.nr;

	for (uint64_t extent = unit.extent; extent < end; extent++)
		if (extent_state(&image->states[extent]) != EXTENT_RESIDENT)
			return false;
	for (uint64_t extent = unit.extent; extent < end; extent++) {
		account_grant(guest->account, extent);
		bits_set(guest->populate->to_announce, extent);
	}
	store_raise(guest->populate->zerocopy_fd);
	return true;
}

bool zerocopy_fault(struct guest *guest, const struct populate_region *region, uint64_t page, uint64_t read_ns)
{
	struct account *account = guest->account;
	struct image *image = guest->image;
	struct unit unit;

	(void)region;
	if (!guest->populate->allowance)
		return false;
	unit = unit_of(guest, page / image->shape.extent_pages);
	if (!unit_pin(guest, unit))
		return false;
	image_touch(image, page / image->shape.extent_pages);
	if (unit_announce(guest, unit)) {
		count_access(account->header, false, FAULT_HIT);
		account_note_latency(account, LATENCY_HIT, clock_now_ns() - read_ns);
		return true;
	}
	store_prefetch(image, unit.extent, unit.nr);
	for (uint64_t extent = unit.extent; extent < unit.extent + unit.nr; extent++)
		if (extent_state(&image->states[extent]) != EXTENT_RESIDENT)
			populate_want(guest, extent, page, read_ns);
	unit_announce(guest, unit);
	return true;
}

bool zerocopy_loaded(struct guest *guest, uint64_t extent)
{
	if (!guest->populate->allowance || !bits_test(guest->populate->lent, extent))
		return false;
	if (extent_state(&guest->image->states[extent]) != EXTENT_RESIDENT)
		return false;
	unit_announce(guest, unit_of(guest, extent));
	return true;
}

int zerocopy_adopt(struct guest *guest)
{
	struct populate *populate = guest->populate;
	uint64_t nr_extents = guest->image->shape.nr_extents;

	if (!populate->allowance)
		return 0;
	/* Granted extents were announced, or were about to be, with the rest of their unit. */
	for (uint64_t e = 0; (e = bits_next(guest->account->granted, e, nr_extents)) < nr_extents; e++) {
		struct unit unit = unit_of(guest, e);

		for (uint64_t extent = unit.extent; extent < unit.extent + unit.nr; extent++) {
			uint64_t room = image_room(guest->image, extent, 1);

			if (bits_test(populate->lent, extent))
				continue;
			if (!allowance_take(populate->allowance, room))
				return -ENOSPC;
			if (store_lend(guest->image, extent, 1, UINT64_MAX) < 0) {
				allowance_give(populate->allowance, room);
				return -ENOSPC;
			}
			bits_set(populate->lent, extent);
		}
	}
	return 0;
}

static bool unit_resident(const struct guest *guest, struct unit unit)
{
	for (uint64_t extent = unit.extent; extent < unit.extent + unit.nr; extent++)
		if (extent_state(&guest->image->states[extent]) != EXTENT_RESIDENT)
			return false;
	return true;
}

bool zerocopy_ahead(struct guest *guest)
{
	struct populate *populate = guest->populate;
	uint64_t nr_extents = guest->image->shape.nr_extents;

	if (populate->zerocopy_at >= nr_extents)
		return false;
	for (int i = 0; i < LOOKS_AT_ONCE && populate->zerocopy_at < nr_extents; i++) {
		struct unit unit = unit_of(guest, populate->zerocopy_at);

		populate->zerocopy_at = unit.extent + unit.nr;
		/* It may be evicted between the look and the pin: then a fault on it announces it. */
		if (unit_resident(guest, unit) && !bits_test(populate->lent, unit.extent) && unit_pin(guest, unit))
			unit_announce(guest, unit);
	}
	return true;
}

int zerocopy_fd(const struct guest *guest)
{
	return guest->populate->zerocopy_fd;
}

int64_t zerocopy_take(struct guest *guest, uint64_t *firsts_out, uint64_t *nrs_out, uint64_t nr_max)
{
	const struct image_shape *shape = &guest->image->shape;
	bits_word *to_announce = guest->populate->to_announce;
	uint64_t nr = 0;

	for (uint64_t e = 0; nr < nr_max && (e = bits_next(to_announce, e, shape->nr_extents)) < shape->nr_extents;) {
		uint64_t first = e;

		while (e < shape->nr_extents && bits_clear(to_announce, e))
			e++;
		if (e == first) /* cannot happen: there is only one taker */
			break;
		uint64_t end_page =
			e * shape->extent_pages < shape->nr_pages ? e * shape->extent_pages : shape->nr_pages;

		firsts_out[nr] = first * shape->extent_pages;
		nrs_out[nr++] = end_page - first * shape->extent_pages;
	}
	return (int64_t)nr;
}

void zerocopy_end(struct guest *guest)
{
	struct populate *populate = guest->populate;
	uint64_t nr_extents = guest->image->shape.nr_extents;

	if (!populate->allowance)
		return;
	for (uint64_t e = 0; (e = bits_next(populate->lent, e, nr_extents)) < nr_extents; e++) {
		store_end_loan(guest->image, e, 1);
		allowance_give(populate->allowance, image_room(guest->image, e, 1));
	}
}
