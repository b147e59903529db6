/* SPDX-License-Identifier: Apache-2.0 */
#include "accounting/core/regions.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#define PAGE_MASK_BITS 4095u
#define ADDRESS_END ((uint64_t)1 << 57) /* of the widest address space there is */

static uint64_t region_end(const struct account_region *region)
{
	return region->address + (region->nr_pages << 12);
}

static int compare_regions(const void *a, const void *b)
{
	const struct account_region *left = a, *right = b;

	return left->first_page < right->first_page ? -1 : left->first_page > right->first_page;
}

/* Sorts the regions and merges neighbours. */
static void table_tidy(struct account_region *regions, uint64_t *nr)
{
	uint64_t kept = 0;

	qsort(regions, *nr, sizeof *regions, compare_regions);
	for (uint64_t i = 0; i < *nr; i++) {
		struct account_region *last = kept ? &regions[kept - 1] : NULL;

		if (last && last->first_page + last->nr_pages == regions[i].first_page &&
		    region_end(last) == regions[i].address)
			last->nr_pages += regions[i].nr_pages;
		else
			regions[kept++] = regions[i];
	}
	*nr = kept;
}

static bool region_is_sound(const struct account_region *region, uint64_t nr_image_pages)
{
	return region->nr_pages && region->first_page < nr_image_pages &&
	       region->nr_pages <= nr_image_pages - region->first_page && region->address &&
	       !(region->address & PAGE_MASK_BITS) && region->address < ADDRESS_END &&
	       region->nr_pages <= (ADDRESS_END - region->address) >> 12;
}

static bool regions_overlap(const struct account_region *a, const struct account_region *b)
{
	return (a->first_page < b->first_page + b->nr_pages && b->first_page < a->first_page + a->nr_pages) ||
	       (a->address < region_end(b) && b->address < region_end(a));
}

int regions_make(const struct account_region *regions, uint64_t nr, uint64_t nr_image_pages,
                 struct region_table *table_out)
{
	struct region_table table = {.nr = nr};

	if (nr > REGIONS_MAX)
		return -E2BIG;
	for (uint64_t i = 0; i < nr; i++) {
		table.regions[i] = regions[i];
		if (!region_is_sound(&regions[i], nr_image_pages))
			return -EINVAL;
		for (uint64_t j = 0; j < i; j++)
			if (regions_overlap(&regions[i], &regions[j]))
				return -EINVAL;
	}
	table_tidy(table.regions, &table.nr);
	*table_out = table;
	return 0;
}

/* Adds the pages of a region that lie at [start, end), moved by shift bytes. */
static void add_part(const struct account_region *region, uint64_t start, uint64_t end, uint64_t shift,
                     struct account_region *parts, uint64_t *nr)
{
	start = start > region->address ? start : region->address;
	end = end < region_end(region) ? end : region_end(region);
	if (start < end)
		parts[(*nr)++] = (struct account_region){
			.address = start + shift,
			.first_page = region->first_page + ((start - region->address) >> 12),
			.nr_pages = (end - start) >> 12,
		};
}

int regions_move(struct region_table *table, uint64_t from, uint64_t to, uint64_t length)
{
	/* The source and the target range cut a region into at most three parts that stay, and one that moves. */
	struct account_region parts[4 * REGIONS_MAX];
	uint64_t nr = 0;
	uint64_t low = from < to ? from : to, high = from < to ? to : from;

	if ((from | to | length) & PAGE_MASK_BITS || length > ADDRESS_END || from > ADDRESS_END - length ||
	    to > ADDRESS_END - length)
		return -EINVAL;
	for (uint64_t i = 0; i < table->nr; i++) {
		const struct account_region *region = &table->regions[i];

		add_part(region, 0, low, 0, parts, &nr);
		add_part(region, low + length, high, 0, parts, &nr);
		add_part(region, high + length, UINT64_MAX, 0, parts, &nr);
		add_part(region, from, from + length, to - from, parts, &nr);
	}
	table_tidy(parts, &nr);
	if (nr > REGIONS_MAX)
		return -E2BIG;
	memcpy(table->regions, parts, nr * sizeof *parts);
	table->nr = nr;
	return 0;
}

void regions_write(struct shared_regions *shared, const struct region_table *table, uint64_t nr_image_pages)
{
	const struct account_region *first = &table->regions[0];
	uint64_t version = atomic_load(&shared->version) + 1;
	bool is_whole = table->nr == 1 && first->first_page == 0 && first->nr_pages == nr_image_pages;

	atomic_store(&shared->tables[version % 2].nr, table->nr);
	for (uint64_t i = 0; i < table->nr; i++) {
		_Atomic uint64_t *words = shared->tables[version % 2].words[i];

		atomic_store(&words[0], table->regions[i].address);
		atomic_store(&words[1], table->regions[i].first_page);
		atomic_store(&words[2], table->regions[i].nr_pages);
	}
	atomic_store(&shared->whole_address, 0);
	atomic_store(&shared->version, version);
	if (is_whole)
		atomic_store(&shared->whole_address, first->address);
}

/* This and nr_at may return torn values: the caller must check afterwards that the version is unchanged. */
static struct account_region region_at(const struct shared_regions *shared, uint64_t version, uint64_t i)
{
	const _Atomic uint64_t *words = shared->tables[version % 2].words[i];

	return (struct account_region){atomic_load(&words[0]), atomic_load(&words[1]), atomic_load(&words[2])};
}

static uint64_t nr_at(const struct shared_regions *shared, uint64_t version)
{
	uint64_t nr = atomic_load(&shared->tables[version % 2].nr);

	return nr < REGIONS_MAX ? nr : REGIONS_MAX;
}

void regions_read(const struct shared_regions *shared, struct region_table *table_out)
{
	uint64_t version;

	do {
		version = atomic_load(&shared->version);
		table_out->nr = nr_at(shared, version);
		for (uint64_t i = 0; i < table_out->nr; i++)
			table_out->regions[i] = region_at(shared, version, i);
	} while (version != atomic_load(&shared->version));
}

bool regions_span(const struct shared_regions *shared, uint64_t first, uint64_t end, struct account_span *span_out)
{
	struct account_region region = {0};
	uint64_t version;
	bool found;

	do {
		version = atomic_load(&shared->version);
		found = false;
		for (uint64_t i = 0, nr = nr_at(shared, version); i < nr && !found; i++) {
			region = region_at(shared, version, i);
			found = region.first_page + region.nr_pages > first;
		}
	} while (version != atomic_load(&shared->version));
	uint64_t page = first > region.first_page ? first : region.first_page;
	uint64_t region_end_page = region.first_page + region.nr_pages;

	if (!found || page >= end)
		return false;
	*span_out = (struct account_span){
		.page = page,
		.nr_pages = (end < region_end_page ? end : region_end_page) - page,
		.address = region.address + ((page - region.first_page) << 12),
	};
	return true;
}

bool regions_find_page(const struct shared_regions *shared, uint64_t page, struct account_region *region_out)
{
	struct region_table table;

	regions_read(shared, &table);
	for (uint64_t i = 0; i < table.nr; i++)
		if (page - table.regions[i].first_page < table.regions[i].nr_pages) {
			*region_out = table.regions[i];
			return true;
		}
	return false;
}

bool regions_find_address(const struct shared_regions *shared, uint64_t address, struct account_region *region_out)
{
	struct region_table table;

	regions_read(shared, &table);
	for (uint64_t i = 0; i < table.nr; i++)
		if (address - table.regions[i].address < table.regions[i].nr_pages << 12) {
			*region_out = table.regions[i];
			return true;
		}
	return false;
}

bool region_clip(const struct account_region *region, uint64_t start, uint64_t end, uint64_t *first_out,
                 uint64_t *nr_out)
{
	start = start > region->address ? start : region->address;
	end = end < region_end(region) ? end : region_end(region);
	if (start >= end)
		return false;
	uint64_t first = (start - region->address) >> 12;
	*first_out = region->first_page + first;
	*nr_out = ((end - region->address + 4095) >> 12) - first;
	return true;
}
