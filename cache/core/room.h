/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Room in the store's capacity: what is free, and what dropping the old end of the standby list makes free.
 *
 * Room is counted in the store's extents, which are the smallest of all images. An extent of an image with larger ones
 * takes room for several (image_room), all at once.
 *
 * A loader that needs room and finds none free drops standby extents itself, oldest first: their order was decided when
 * they were unmapped, so there is nothing to choose, and no load waits for the evictor while the list has any.
 */
#ifndef COWSHED_ROOM_H
#define COWSHED_ROOM_H

#include "cache/core/standby.h"

/* cdef-begin */
/* Sets how many extents the standby list may hold, at most the store's standby_max, and the room, free or in the list,
 * below which pressure is raised. Drops what is over the limit. -EINVAL for more than standby_max. */
int store_set_standby(struct store *store, uint64_t limit_extents, uint64_t low_free);
/* Drops the standby bytes of nr extents from first, as evictions on request; returns how many pages those were. */
int64_t store_drop_standby(struct image *image, uint64_t first, uint64_t nr);
/* Writes 1 for each extent of an image whose bytes are in the standby list, else 0. */
void store_in_standby(const struct image *image, uint8_t *flags_out);
/* cdef-end */

/* Under the store's lock. */
/* Extents that nobody has taken. */
uint64_t room_free(const struct store *store);
/* The same, and those that standby extents would give. */
uint64_t room_left(const struct store *store);
/* Reserves room for up to nr extents from first and returns how many; writes to dropped the slots whose room is among
 * it: the caller must give them to room_empty before it writes that many frames. */
uint64_t room_take(struct store *store, const struct image *image, uint64_t first, uint64_t nr, slot_no *dropped,
                   uint64_t *nr_dropped_out);
/* Reserves the room of an extent whose slot the caller takes out to restore it. */
slot_no room_take_standby(struct store *store, struct image *image, uint64_t extent);
/* Without the lock: gives the memory of slots back, and then the slots. */
void room_empty(struct store *store, const slot_no *slots, uint64_t nr);
/* Without the lock: drops what is over the limit; drops all of an image that nobody uses any more. */
void room_drop_surplus(struct store *store);
void room_drop_image(struct image *image);

#endif
