/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Populated guests: memory that is not a mapping of the frames, as a restored machine's is.
 *
 * The memory is anonymous or of huge pages and begins empty.  A missing fault is answered by copying: the extent is
 * held, its frames are read into a buffer of the thread, UFFDIO_COPY installs them.  Every page populated is the
 * guest's own, and charged before it is installed.
 *
 * Only the guest's own thread installs pages. The kernel refuses that (EAGAIN) while a REMOVE event is unread, and the
 * thread handles an event before it installs anything else; so no copy can undo a discard that the guest made before.
 * Loaders therefore hold the loaded extent and pass it to the thread, instead of answering themselves.
 *
 * After a discard (a balloon's) memory reads as zeros if the guest is a machine's memory, and as the image if it is a
 * disk. A huge page is installed whole: its extents are read into a buffer as they become resident, one after the
 * other, so that it takes no more room in the store than any other fault.
 *
 * Zerocopy guests map the frames themselves instead, through a descriptor and without a guard (Nydus calls it
 * zerocopy). An extent is pinned before it is announced, and stays so until the guest is stopped; the number of pins is
 * bounded, and other extents are populated by copy.
 */
#ifndef COWSHED_POPULATE_H
#define COWSHED_POPULATE_H

#include "cache/core/loader.h"
#include "faults/core/guest.h"

/* cdef-begin */
/* page_bytes: 4096 or 2 MiB, of which address, first_page and nr_pages are multiples. A region may reach past the
 * image's end, where it reads as zeros. */
struct populate_region {
	uint64_t address, first_page, nr_pages, page_bytes;
};

struct populate_options {
	const struct populate_region *regions; /* copied */
	uint32_t nr_regions;
	uint32_t zero_discarded; /* discarded memory reads as zeros, not as the image */
	const uint32_t *order;   /* extents to populate in idle time; copied */
	uint64_t nr_order;
	struct zerocopy_allowance *allowance; /* NULL: no extent is lent */
	uint64_t max_pinned_extents;          /* in the store, other pins included */
	uint32_t zerocopy_resident;           /* announce resident extents ahead of faults */
};

/* How much room, in the store's extents, all zerocopy guests together may keep pinned. Must outlive them. */
struct zerocopy_allowance {
	uint64_t left_extents;
};

/* As guest_start; the account must have been placed at the regions' memory. In an adopted account, private pages are in
 * the guest's memory, or fault and are copied again, which overwrites nothing; extents that were announced are lent
 * again (-ENOSPC if the allowance is too small now). */
int populate_start(struct account *account, int uffd, int pidfd, const struct fault_options *options,
                   const struct populate_options *terms, struct guest **guest_out);
/* Borrowed eventfd of a zerocopy guest, raised when extents wait to be announced; -1: it has none. */
int zerocopy_fd(const struct guest *guest);
/* Takes runs of pages to announce, as first and number, in order; returns how many runs. */
int64_t zerocopy_take(struct guest *guest, uint64_t *firsts_out, uint64_t *nrs_out, uint64_t nr_max);
/* cdef-end */

#define POPULATE_REGIONS_MAX 32
#define HUGE_BYTES (2u << 20)
#define HUGE_PAGES (HUGE_BYTES / 4096u)

/* A huge page that is being put together. */
struct assembly {
	bool active;
	const struct populate_region *region;
	uint64_t first_page, nr_pages;      /* of the image */
	bits_word missing[HUGE_PAGES / 64]; /* by extent of it */
	uint64_t read_ns;
	bool loaded;
	char *buffer; /* HUGE_BYTES, once one was needed */
};

/*
 * done changes under the guest's answer_lock; only the thread changes the rest (zerocopy_take clears to_announce, too).
 * An extent's to_announce bit is set only while its lent bit is. Each lent bit is one loan in the store and one extent
 * taken from the allowance.
 */
struct populate {
	struct populate_region regions[POPULATE_REGIONS_MAX];
	uint32_t nr_regions;
	bool zero_discarded, huge_waiting;
	struct populate_miss *done; /* loads that ended, their extents held */
	bits_word *populated;       /* by extent: some of it was copied; windows are planned by it */
	char *buffer;               /* COPY_PAGES */
	uint32_t *order;
	uint64_t nr_order, order_at;
	uint32_t nr_order_looks;
	struct assembly assembly;

	struct zerocopy_allowance *allowance;
	uint64_t max_pinned_extents, zerocopy_at;
	bits_word *lent, *to_announce; /* by extent */
	int zerocopy_fd;
};

struct populate_miss {
	struct load_waiter waiter;
	struct guest *guest;
	struct populate_miss *next;
	uint64_t page, read_ns;
	int status;
};

/* Requests an extent from the store for a fault on page: 0, or 1 if it is resident after all. */
int populate_want(struct guest *guest, uint64_t extent, uint64_t page, uint64_t read_ns);
/* install.c. */
uint64_t populate_address(const struct populate_region *region, uint64_t page);
/* Charges up to nr pages from first, none of which may be charged yet, and installs copies of from, or zeros if that is
 * NULL. The quota may cut nr short. Returns how many were installed, or -errno; -EDQUOT: there is no room for any. */
int64_t populate_install(struct guest *guest, const struct populate_region *region, uint64_t first, uint64_t nr,
                         const char *from);
/* Installs a page again that is charged but faults, without charging it; 0 or -errno. */
int populate_again(struct guest *guest, const struct populate_region *region, uint64_t first, const char *from);
/* Under write_lock: poisons the page; all of it, if it is a huge one. */
int populate_poison(struct guest *guest, const struct populate_region *region, uint64_t page);
/* Whether page was discarded and reads as zeros. */
bool populate_is_zero(const struct guest *guest, uint64_t page);
/* Reads frames that the caller holds. */
int frames_read(const struct image *image, uint64_t first, uint64_t nr, char *to);
/* At the quota: poisons the page if the policy is kill, else stops the guest. */
void populate_refuse(struct guest *guest, const struct populate_region *region, uint64_t page);

/* huge.c: a fault in a huge page; an extent of one was loaded and is held (or failed: status); a discard. */
void huge_fault(struct guest *guest, const struct populate_region *region, uint64_t page, uint64_t read_ns);
void huge_loaded(struct guest *guest, const struct populate_region *region, uint64_t extent, int status);
void huge_discard(struct guest *guest, uint64_t first, uint64_t nr);

/* zerocopy.c: whether the fault is (or will be) answered by announcing its extents. */
bool zerocopy_fault(struct guest *guest, const struct populate_region *region, uint64_t page, uint64_t read_ns);
/* For an adopted account: lends again the extents that were announced; -ENOSPC: the allowance is too small. */
int zerocopy_adopt(struct guest *guest);
/* A requested extent is held: true if it is lent; it is announced once all of its unit is resident. */
bool zerocopy_loaded(struct guest *guest, uint64_t extent);
/* Announces more resident extents (zerocopy_resident); returns whether there was anything to do. */
bool zerocopy_ahead(struct guest *guest);
void zerocopy_end(struct guest *guest);

#endif
