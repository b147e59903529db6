/* SPDX-License-Identifier: Apache-2.0 */
/*
 * An overlay in files, besides its pages: the map, which records which pages are private, and the thread that makes
 * both durable.
 */
#ifndef COWSHED_OVERLAY_DISK_H
#define COWSHED_OVERLAY_DISK_H

#include "accounting/core/overlay/overlay.h"

/* pages.c */
int overlay_init(struct account *account, int data_fd, struct overlay **overlay_out);
void overlay_deinit(struct overlay *overlay); /* leaves data_fd open */
/* Under the stripe's lock: stores the bytes of pages of one group; the caller then makes them private, or not
 * missing. */
int overlay_put(struct overlay *overlay, uint64_t first, uint64_t nr, const uint8_t *bytes);
pthread_rwlock_t *overlay_stripe(struct overlay *overlay, uint64_t page);
/* Drops the bytes of pages; under their stripe's lock, or before the overlay is in use. */
int overlay_punch(struct overlay *overlay, uint64_t first, uint64_t nr);

/* adopt.c. Before the overlay is in use: drops bytes of pages that are not private. */
int overlay_drop_leftovers(struct overlay *overlay);

/* files.c */
/* See overlay_open_files; is_left: the account already has the private bits, and the map may be older. */
int overlay_place_files(struct account *account, int data_fd, int map_fd, const uint8_t *identity, bool is_left,
                        struct overlay **overlay_out);
/* Under the stripe's lock: the private bits of the group of a page changed. */
void disk_changed(struct overlay_disk *disk, uint64_t page);
/* The same for the missing bits; the caller must have called disk_missing_begin, which makes room in the map. */
void disk_missing_changed(struct overlay_disk *disk, uint64_t page);
int disk_missing_begin(struct overlay_disk *disk);
/* As disk_changed, for trimmed pages: their bytes are dropped once the durable map no longer promises them. */
void disk_trimmed(struct overlay_disk *disk, uint64_t first, uint64_t nr);
/* Queues a flush; sync NULL: without a notification. */
void disk_flush(struct overlay_disk *disk, struct overlay_sync *sync);
bool disk_is_dropped(const struct overlay_disk *disk, uint64_t page);
/* Ends the flusher after the flushes that are queued, flushes a last time, closes the map. */
int disk_close(struct overlay *overlay);

#endif
