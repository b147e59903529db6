/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Huge pages of a populated guest: installed whole, from a buffer that extents are read into as they become resident.
 *
 * One is put together at a time. A fault in another one meanwhile is dropped, and its extents are prefetched; when the
 * first is done, all huge regions are woken and fault again.
 */
#include "cache/core/abi.h"
#include "cache/core/store.h"
#include "faults/core/answer.h"
#include "faults/core/guest.h"
#include "faults/core/populate/populate.h"
#include "faults/core/uffd.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

static uint64_t huge_first(const struct populate_region *region, uint64_t page)
{
	return page - (page - region->first_page) % HUGE_PAGES;
}

static uint64_t huge_pages(const struct image *image, uint64_t first)
{
	uint64_t left = image->shape.nr_pages - first;

	return left < HUGE_PAGES ? left : HUGE_PAGES;
}

/* The extents of a huge page: they lie in it, or it lies in one of them. */
static void huge_extents(const struct image *image, uint64_t first, uint64_t *extent_out, uint64_t *nr_out)
{
	*extent_out = first / image->shape.extent_pages;
	*nr_out = (first + huge_pages(image, first) - 1) / image->shape.extent_pages + 1 - *extent_out;
}

static void end_assembly(struct guest *guest)
{
	struct populate *populate = guest->populate;

	populate->assembly.active = false;
	if (!populate->huge_waiting)
		return;
	populate->huge_waiting = false;
	for (uint32_t i = 0; i < populate->nr_regions; i++)
		if (populate->regions[i].page_bytes > PAGE_BYTES)
			uffd_wake(guest->uffd, populate->regions[i].address,
			          populate->regions[i].nr_pages << PAGE_SHIFT);
}

static void install(struct guest *guest)
{
	struct assembly *assembly = &guest->populate->assembly;
	struct account *account = guest->account;
	int64_t err;

	if (bits_test(account->private, assembly->first_page))
		err = populate_again(guest, assembly->region, assembly->first_page, assembly->buffer);
	else
		err = populate_install(guest, assembly->region, assembly->first_page, assembly->nr_pages,
		                       assembly->buffer);
	if (err == -EDQUOT)
		populate_refuse(guest, assembly->region, assembly->first_page);
	else if (err < 0)
		answer_failed(guest, (int)err);
	else if (!assembly->loaded) {
		count_access(account->header, false, FAULT_HIT);
		account_note_latency(account, LATENCY_HIT, clock_now_ns() - assembly->read_ns);
	}
	end_assembly(guest);
}

/* Reads the huge page's part of an extent that the caller holds. */
static int take_extent(struct guest *guest, uint64_t extent)
{
	struct assembly *assembly = &guest->populate->assembly;
	uint64_t first = extent * guest->image->shape.extent_pages;
	uint64_t end = first + image_extent_pages(guest->image, extent);
	uint64_t limit = assembly->first_page + assembly->nr_pages;

	first = first > assembly->first_page ? first : assembly->first_page;
	end = end < limit ? end : limit;
	int err = frames_read(guest->image, first, end - first,
	                      assembly->buffer + ((first - assembly->first_page) << PAGE_SHIFT));
	if (!err)
		bits_clear(assembly->missing, extent - assembly->first_page / guest->image->shape.extent_pages);
	return err;
}

/* The page cannot be had: SIGBUS for who touches it. */
static void poison_assembly(struct guest *guest)
{
	struct assembly *assembly = &guest->populate->assembly;

	pthread_mutex_lock(&guest->account->write_lock);
	populate_poison(guest, assembly->region, assembly->first_page);
	pthread_mutex_unlock(&guest->account->write_lock);
	end_assembly(guest);
}

static bool begin_assembly(struct guest *guest, const struct populate_region *region, uint64_t first, uint64_t read_ns)
{
	struct assembly *assembly = &guest->populate->assembly;
	uint64_t nr_pages = huge_pages(guest->image, first);

	if (!assembly->buffer && posix_memalign((void **)&assembly->buffer, PAGE_BYTES, HUGE_BYTES)) {
		assembly->buffer = NULL;
		answer_failed(guest, -EAGAIN); /* no memory for the buffer: retry later */
		return false;
	}
	assembly->active = true;
	assembly->loaded = false;
	assembly->region = region;
	assembly->first_page = first;
	assembly->nr_pages = nr_pages;
	assembly->read_ns = read_ns;
	memset(assembly->buffer + (nr_pages << PAGE_SHIFT), 0, (HUGE_PAGES - nr_pages) << PAGE_SHIFT);
	return true;
}

/* Reads resident extents and requests the rest: 1 if all are there, 0 if some are to come, or -errno. */
static int gather(struct guest *guest)
{
	struct assembly *assembly = &guest->populate->assembly;
	struct image *image = guest->image;
	uint64_t extent, nr, nr_missing = 0;

	huge_extents(image, assembly->first_page, &extent, &nr);
	for (uint64_t i = 0; i < nr; i++) {
		bits_set(assembly->missing, i);
		image_touch(image, extent + i);
		image_note_first_touch(image, extent + i);
	}
	/* Absent extents are prefetched, for long reads, and requested at once, so that they go ahead of loads without
	 * a waiter. */
	store_prefetch(image, extent, nr);
	for (uint64_t i = 0; i < nr; i++) {
		bool held = extent_hold(&image->states[extent + i]);

		while (!held && populate_want(guest, extent + i, assembly->first_page, assembly->read_ns))
			held = extent_hold(&image->states[extent + i]);
		if (held) {
			int err = take_extent(guest, extent + i);

			extent_release(&image->states[extent + i]);
			if (err)
				return err;
		}
		nr_missing += !held;
	}
	return nr_missing == 0;
}

void huge_fault(struct guest *guest, const struct populate_region *region, uint64_t page, uint64_t read_ns)
{
	struct assembly *assembly = &guest->populate->assembly;
	uint64_t first = huge_first(region, page);
	uint64_t extent, nr;

	if (assembly->active) {
		if (assembly->first_page == first)
			return; /* the answer is on its way, and covers it */
		guest->populate->huge_waiting = true;
		huge_extents(guest->image, first, &extent, &nr);
		store_prefetch(guest->image, extent, nr);
		return;
	}
	if (!begin_assembly(guest, region, first, read_ns))
		return;
	int all_there = 1;
	if (populate_is_zero(guest, first))
		memset(assembly->buffer, 0, assembly->nr_pages << PAGE_SHIFT);
	else
		all_there = gather(guest);
	if (all_there < 0)
		poison_assembly(guest);
	else if (all_there)
		install(guest);
}

void huge_loaded(struct guest *guest, const struct populate_region *region, uint64_t extent, int status)
{
	struct assembly *assembly = &guest->populate->assembly;
	uint64_t first, nr;

	if (!assembly->active || assembly->region != region)
		return; /* the page was discarded meanwhile, or another of its extents failed */
	huge_extents(guest->image, assembly->first_page, &first, &nr);
	if (extent - first >= nr || !bits_test(assembly->missing, extent - first))
		return;
	assembly->loaded = true;
	if (status == 0)
		status = take_extent(guest, extent);
	if (status)
		poison_assembly(guest);
	else if (bits_next(assembly->missing, 0, nr) == nr)
		install(guest);
}

void huge_discard(struct guest *guest, uint64_t first, uint64_t nr)
{
	const struct assembly *assembly = &guest->populate->assembly;

	if (!assembly->active || first >= assembly->first_page + assembly->nr_pages ||
	    assembly->first_page >= first + nr)
		return;
	/* It reads as zeros now: wake the faults in it. */
	uint64_t address = populate_address(assembly->region, assembly->first_page);

	end_assembly(guest);
	uffd_wake(guest->uffd, address, HUGE_BYTES);
}
