/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Adopting an overlay whose backend died between any two of its instructions.
 *
 * An unfinished request leaves one of three things behind. Pages taken from the quota and not private: account_adopt
 * adds up the quota anew from the private pages. Bytes in pages that are not private, because a write did not reach its
 * bits or a trim its punch: these bytes are dropped, or a later write of zeros, which makes a page private and stores
 * nothing, would expose them. Private pages of which some have the request's bytes and some the earlier ones: each
 * whole page has one or the other, and the request was never answered.
 *
 * A page whose private bit is set, and that is not missing, has its bytes, since the bit is set after they are stored;
 * so no written page reads as zeros, and acknowledged writes are there.
 */
#define _GNU_SOURCE
#include "accounting/core/overlay/files.h"
#include "accounting/core/overlay/missing.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/stat.h>

int overlay_drop_leftovers(struct overlay *overlay)
{
	uint64_t nr_pages = overlay->image->shape.nr_pages;
	uint64_t *stored = malloc(bits_bytes(nr_pages));
	int err = stored ? overlay_stored(overlay, stored, bits_bytes(nr_pages) / 8) : -ENOMEM;

	for (uint64_t word = 0; word < (nr_pages + 63) / 64 && !err; word++) {
		uint64_t left = stored[word] & ~atomic_load(&overlay->account->private[word]);

		for (; left && !err; left &= left - 1)
			err = overlay_punch(overlay, word * 64 + (uint64_t)__builtin_ctzll(left), 1);
	}
	free(stored);
	return err;
}

/* No guest maps an overlay's pages, so unsettled and discarded have no meaning for them. */
static void settle_all(struct account *account)
{
	for (uint64_t i = 0; i < bits_bytes(account->header->nr_pages) / sizeof(bits_word); i++) {
		atomic_store(&account->unsettled[i], 0);
		atomic_store(&account->discarded[i], 0);
	}
}

int overlay_adopt(struct account *account, int data_fd, struct overlay **overlay_out)
{
	struct overlay *overlay;
	struct stat about;

	if (fstat(data_fd, &about) < 0)
		return -errno;
	if ((uint64_t)about.st_size != account->image->shape.map_bytes)
		return -EBADMSG;
	int err = overlay_init(account, data_fd, &overlay);
	if (err)
		return err;
	settle_all(account);
	err = overlay_missing_init(overlay);
	if (!err)
		err = overlay_drop_leftovers(overlay);
	if (err)
		overlay_deinit(overlay);
	else
		*overlay_out = overlay;
	return err;
}

int overlay_adopt_files(struct account *account, int data_fd, int map_fd, const uint8_t *identity,
                        struct overlay **overlay_out)
{
	settle_all(account);
	return overlay_place_files(account, data_fd, map_fd, identity, true, overlay_out);
}

int overlay_open_files(struct account *account, int data_fd, int map_fd, const uint8_t *identity,
                       struct overlay **overlay_out)
{
	return overlay_place_files(account, data_fd, map_fd, identity, false, overlay_out);
}
