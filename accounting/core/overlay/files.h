/* SPDX-License-Identifier: Apache-2.0 */
/*
 * What an overlay in files has besides its pages: the map, which says after a crash which pages are private, and
 * the thread that makes both durable.
 */
#ifndef COWSHED_OVERLAY_DISK_H
#define COWSHED_OVERLAY_DISK_H

#include "accounting/core/overlay/overlay.h"

/* overlay.c */
int overlay_init(struct account *account, int data_fd, struct overlay **overlay_out);
void overlay_deinit(struct overlay *overlay); /* leaves data_fd open */
/* Under the stripe's lock: stores the bytes of pages of one group; they are made private, or not missing, after that.
 */
int overlay_put(struct overlay *overlay, uint64_t first, uint64_t nr, const uint8_t *bytes);
pthread_rwlock_t *overlay_stripe(struct overlay *overlay, uint64_t page);
/* Drops the bytes of pages; under their stripe's lock, or nobody else there. */
int overlay_punch(struct overlay *overlay, uint64_t first, uint64_t nr);

/* overlay_adopt.c.  Nobody uses it yet: drops bytes of pages that are not private. */
int overlay_drop_leftovers(struct overlay *overlay);

/* overlay_disk.c */
/* See overlay_open_files; is_left: the account knows already what is private, and the map may be behind it. */
int overlay_place_files(struct account *account, int data_fd, int map_fd, const uint8_t *identity, bool is_left,
                        struct overlay **overlay_out);
/* Under the stripe's lock: the private bits of the group of a page changed. */
void disk_changed(struct overlay_disk *disk, uint64_t page);
/* The same of the missing bits; the map has room for them once missing_begin was called. */
void disk_missing_changed(struct overlay_disk *disk, uint64_t page);
int disk_missing_begin(struct overlay_disk *disk);
/* The same, and the bytes of these pages are to be dropped once the map says so durably. */
void disk_trimmed(struct overlay_disk *disk, uint64_t first, uint64_t nr);
/* sync NULL: soon, and nobody is told. */
void disk_flush(struct overlay_disk *disk, struct overlay_sync *sync);
bool disk_is_dropped(const struct overlay_disk *disk, uint64_t page);
/* Ends the flusher with what was asked of it, flushes a last time, closes the map. */
int disk_close(struct overlay *overlay);

#endif
