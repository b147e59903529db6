/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Copies an overlay's private pages out and in, whole and in bulk, for a handoff.
 */
#ifndef COWSHED_OVERLAY_MOVE_H
#define COWSHED_OVERLAY_MOVE_H

#include "accounting/core/overlay/overlay.h"

/* cdef-begin */
/* Copies the bytes of nr pages from first, which should be private, as they are now; the image's last page ends in
 * zeros. Pages that are not private read as zeros. -EIO: one of them is missing. */
int overlay_load(struct overlay *overlay, uint64_t first, uint64_t nr, uint8_t *to);
/* The same with the pages of nr_runs runs (page_runs.h), one after another. */
int overlay_load_runs(struct overlay *overlay, const uint8_t *runs, uint64_t nr_runs, uint8_t *to);
/* Makes nr pages from first private with these bytes, past the quota too: the guest has them already. */
int overlay_store(struct overlay *overlay, uint64_t first, uint64_t nr, const uint8_t *bytes);
/* The same with the pages of nr_runs runs; after an error some of them are private. */
int overlay_store_runs(struct overlay *overlay, const uint8_t *runs, uint64_t nr_runs, const uint8_t *bytes);
/* Gives nr pages from first back to the image. */
int overlay_drop(struct overlay *overlay, uint64_t first, uint64_t nr);
/* cdef-end */

#endif
