/* SPDX-License-Identifier: Apache-2.0 */
/* What block requests go to: an image, its frames mapped for reading, and perhaps an overlay. */
#ifndef COWSHED_BLOCK_DEVICE_H
#define COWSHED_BLOCK_DEVICE_H

#include "accounting/core/overlay/overlay.h"
#include "cache/core/image.h"

/* The frames of an image, mapped once for all devices of it. */
struct blk_frames {
	struct blk_frames *next;
	struct image *image;
	uint32_t nr_devices;
	_Atomic uint64_t nr_waiting; /* requests of all its devices that wait */
	const uint8_t *base;         /* read only where the extent is resident, and held */
};

struct blk_device {
	struct blk_frames *frames;
	struct image *image;
	struct overlay *overlay; /* NULL: the image itself, read-only */
	uint64_t size_bytes, extent_bytes;
	_Atomic uint64_t nr_waiting; /* requests that wait */
};

/* Image and overlay are borrowed and must outlive the device. Finds the image's frames in the list `frames`, or adds
 * them; the caller must guard the list. -ENOMEM. */
int blk_device_init(struct blk_device *device, struct blk_frames **frames, struct image *image,
                    struct overlay *overlay);
/* Unmaps the frames if it was their last device. No queue may use it any more. */
void blk_device_deinit(struct blk_device *device, struct blk_frames **frames);

#endif
