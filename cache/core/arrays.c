/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "cache/core/arrays.h"

#include "cache/core/collapse.h"
#include "cache/core/image.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

struct layout {
	size_t words, bytes; /* length of a per-extent array of uint32_t, of uint8_t */
	size_t before_bytes; /* what releases without open regions have; the bitmap of collapsed regions follows */
	size_t total_bytes;
};

static size_t round_up(size_t length)
{
	return (length + 63) / 64 * 64;
}

static struct layout layout_of(const struct image *image)
{
	uint64_t nr = image->shape.nr_extents;
	struct layout layout = {.words = round_up(nr * sizeof(uint32_t)), .bytes = round_up(nr)};

	layout.before_bytes = sizeof(struct arrays_header) + 5 * layout.words + 2 * layout.bytes +
	                      8 * (IMAGE_PAST_WORDS + IMAGE_SERVED_WORDS);
	layout.total_bytes = layout.before_bytes + bits_bytes(image_nr_regions(image));
	return layout;
}

static int arrays_map(struct image *image)
{
	struct layout layout = layout_of(image);
	void *mapped = mmap(NULL, layout.total_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, image->ledger_fd, 0);

	if (mapped == MAP_FAILED)
		return -errno;
	char *at = (char *)mapped + sizeof(struct arrays_header);
	image->header = mapped;
	image->ledger_bytes = layout.total_bytes;
	image->totals = &image->header->totals;
	image->states = (extent_word *)at;
	image->refs = (_Atomic uint32_t *)(at + layout.words);
	image->pins = (_Atomic uint32_t *)(at + 2 * layout.words);
	image->order = (_Atomic uint32_t *)(at + 3 * layout.words);
	image->loans = (_Atomic uint32_t *)(at + 4 * layout.words);
	image->touches = (_Atomic uint8_t *)(at + 5 * layout.words);
	image->touched = (_Atomic uint8_t *)(at + 5 * layout.words + layout.bytes);
	at += 5 * layout.words + 2 * layout.bytes;
	image->past = (struct account_past *)at;
	image->served = (_Atomic uint64_t *)(at + 8 * IMAGE_PAST_WORDS);
	image->waiters = calloc(image->shape.nr_extents, sizeof *image->waiters);
	image->standby = calloc(image->shape.nr_extents, sizeof *image->standby);
	image->region_loans = calloc(image_nr_regions(image), sizeof *image->region_loans);
	image->collapsed = (bits_word *)((char *)mapped + layout.before_bytes);
	return image->waiters && image->standby && image->region_loans ? 0 : -ENOMEM;
}

int arrays_create(struct image *image)
{
	image->ledger_fd = memfd_create("cowshed-extents", MFD_CLOEXEC);
	if (image->ledger_fd < 0 || ftruncate(image->ledger_fd, (off_t)layout_of(image).total_bytes) < 0)
		return -errno;
	int err = arrays_map(image);
	if (err)
		return err;
	image->header->version = ARRAYS_VERSION;
	image->header->extent_pages = image->shape.extent_pages;
	image->header->size_bytes = image->shape.size_bytes;
	image->header->nr_extents = image->shape.nr_extents;
	image->header->magic = ARRAYS_MAGIC;
	return 0;
}

static bool describes(const struct arrays_header *header, const struct image_shape *shape)
{
	return header->magic == ARRAYS_MAGIC && header->version == ARRAYS_VERSION &&
	       header->extent_pages == shape->extent_pages && header->size_bytes == shape->size_bytes &&
	       header->nr_extents == shape->nr_extents;
}

int arrays_adopt(struct image *image, int arrays_fd)
{
	struct stat status;

	if (fstat(arrays_fd, &status) < 0)
		return -errno;
	struct layout layout = layout_of(image);
	if (status.st_size == (off_t)layout.before_bytes) {
		if (ftruncate(arrays_fd, (off_t)layout.total_bytes) < 0)
			return -errno;
	} else if (status.st_size != (off_t)layout.total_bytes) {
		return -EBADMSG;
	}
	image->ledger_fd = arrays_fd;
	int err = arrays_map(image);
	if (!err && !describes(image->header, &image->shape))
		err = -EBADMSG;
	if (err) {
		image->ledger_fd = -1;
		arrays_close(image);
	}
	return err;
}

void arrays_close(struct image *image)
{
	free(image->waiters);
	free(image->standby);
	free(image->region_loans);
	image->region_loans = NULL;
	image->waiters = NULL;
	image->standby = NULL;
	if (image->header)
		munmap(image->header, image->ledger_bytes);
	image->header = NULL;
	if (image->ledger_fd >= 0)
		close(image->ledger_fd);
	image->ledger_fd = -1;
}

static bool is_lent(const struct image *image, uint64_t extent)
{
	return atomic_load(&image->loans[extent]) && extent_state(&image->states[extent]) == EXTENT_RESIDENT;
}

/* What is known so far of the extents that stay. */
struct mending {
	uint64_t max_room;       /* that those that stay may take */
	uint64_t lent_room;      /* of lent extents that were not looked at yet */
	uint64_t room, nr_pages; /* of those that stay */
};

/* Keeps nr extents from first, or punches them all at once: a part of a huge page must not be punched (collapse.h). */
static int mend_run(struct image *image, uint64_t first, uint64_t nr, struct mending *mending)
{
	bool lent = false, resident = true, absent = true;

	for (uint64_t e = first; e < first + nr; e++) {
		enum extent_state state = extent_state(&image->states[e]);

		mending->lent_room -= is_lent(image, e) ? image_room(image, e, 1) : 0;
		lent |= is_lent(image, e);
		resident &= state == EXTENT_RESIDENT;
		absent &= state == EXTENT_ABSENT;
	}
	uint64_t room = image_room(image, first, nr);
	bool keep = resident && (lent || mending->room + mending->lent_room + room <= mending->max_room);
	/* Frames of an ABSENT extent do not matter: a load overwrites them, a scrub drops them. */
	int err = keep || absent ? 0 : image_punch(image, first, nr);
	for (uint64_t e = first; e < first + nr && !err; e++) {
		atomic_store(&image->states[e], keep ? EXTENT_RESIDENT : EXTENT_ABSENT);
		atomic_store(&image->refs[e], 0);
		atomic_store(&image->loans[e], 0);
		mending->nr_pages += keep ? image_extent_pages(image, e) : 0;
	}
	mending->room += keep ? room : 0;
	return err;
}

int64_t arrays_mend(struct image *image, uint64_t max_room)
{
	struct mending mending = {.max_room = max_room};

	/* Lent extents stay, beyond max_room too: a guest that maps them unguarded, or has them open, would read zeros.
	 */
	for (uint64_t e = 0; e < image->shape.nr_extents; e++)
		mending.lent_room += is_lent(image, e) ? image_room(image, e, 1) : 0;
	for (uint64_t e = 0, nr; e < image->shape.nr_extents; e += nr) {
		nr = image_collapsed_extents(image, e);
		int err = mend_run(image, e, nr, &mending);
		if (err)
			return err;
	}
	atomic_store(&image->resident_pages, mending.nr_pages);
	return (int64_t)mending.room;
}
