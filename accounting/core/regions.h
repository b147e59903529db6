/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Where a guest has which pages of the image: up to REGIONS_MAX regions, each a run of pages mapped in one piece.
 *
 * One region that is the whole image is the usual case, and costs one load: whole_address.  Else the table is
 * searched.  It is kept in the ledger, twice: a change fills the table that is not in use and then makes it the
 * one in use by counting the version up, so that neither a reader without a lock nor a successor of a process
 * killed in between ever sees half of a change.  A reader whose version changed meanwhile reads again.
 */
#ifndef COWSHED_REGIONS_H
#define COWSHED_REGIONS_H

#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

/* cdef-begin */
#define REGIONS_MAX 32

struct account_region {
	uint64_t address; /* of its first page, in the guest */
	uint64_t first_page, nr_pages;
};

/* Invariants: sorted by first_page; disjoint in pages and in addresses; neighbours in both are one region. */
struct region_table {
	uint64_t nr;
	struct account_region regions[REGIONS_MAX];
};

/* Makes a table of nr regions of an image of nr_image_pages; -E2BIG, or -EINVAL if one is empty, unaligned or outside
 * of the image or of the address space, or if two overlap. */
int regions_make(const struct account_region *regions, uint64_t nr, uint64_t nr_image_pages,
                 struct region_table *table_out);
/* Moves what is mapped at [from, from + length) to `to`; what was mapped there leaves the table. -E2BIG if that makes
 * too many regions; the table is then unchanged. */
int regions_move(struct region_table *table, uint64_t from, uint64_t to, uint64_t length);
/* cdef-end */

/* A run of pages that the guest has in one piece. */
struct account_span {
	uint64_t page, nr_pages, address;
};

struct shared_regions {
	_Atomic uint64_t whole_address; /* of page 0, if there is one region and it is the whole image; else 0 */
	_Atomic uint64_t version;       /* tables[version % 2] is in use */
	struct {
		_Atomic uint64_t nr;
		_Atomic uint64_t words[REGIONS_MAX][3]; /* struct account_region */
	} tables[2];
};
_Static_assert(sizeof(struct shared_regions) == 8 * (2 + 2 * (1 + 3 * REGIONS_MAX)), "the layout is shared");

/* One writer at a time. */
void regions_write(struct shared_regions *shared, const struct region_table *table, uint64_t nr_image_pages);
void regions_read(const struct shared_regions *shared, struct region_table *table_out);
/* Find the first run of [first, end) that a region has; the region of a page; of an address. false if there is none. */
bool regions_span(const struct shared_regions *shared, uint64_t first, uint64_t end, struct account_span *span_out);
bool regions_find_page(const struct shared_regions *shared, uint64_t page, struct account_region *region_out);
bool regions_find_address(const struct shared_regions *shared, uint64_t address, struct account_region *region_out);

/* The pages of a region that [start, end) touches; false if it touches none. */
bool region_clip(const struct account_region *region, uint64_t start, uint64_t end, uint64_t *first_out,
                 uint64_t *nr_out);

#endif
