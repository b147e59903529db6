/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "transport/core/blocks/device.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/mman.h>

static struct blk_frames *frames_take(struct blk_frames **list, struct image *image)
{
	struct blk_frames *frames = *list;

	while (frames && frames->image != image)
		frames = frames->next;
	if (!frames) {
		frames = calloc(1, sizeof *frames);
		if (!frames)
			return NULL;
		void *base = mmap(NULL, image->shape.map_bytes, PROT_READ, MAP_SHARED, image->guest_fd, 0);
		if (base == MAP_FAILED) {
			free(frames);
			return NULL;
		}
		madvise(base, image->shape.map_bytes, MADV_DONTFORK);
		*frames = (struct blk_frames){.next = *list, .image = image, .base = base};
		*list = frames;
	}
	frames->nr_devices++;
	return frames;
}

static void frames_return(struct blk_frames **list, struct blk_frames *frames)
{
	if (--frames->nr_devices)
		return;
	while (*list != frames)
		list = &(*list)->next;
	*list = frames->next;
	munmap((void *)(uintptr_t)frames->base, frames->image->shape.map_bytes);
	free(frames);
}

int blk_device_init(struct blk_device *device, struct blk_frames **frames, struct image *image, struct overlay *overlay)
{
	*device = (struct blk_device){
		.frames = frames_take(frames, image),
		.image = image,
		.overlay = overlay,
		.size_bytes = image->shape.size_bytes,
		.extent_bytes = (uint64_t)image->shape.extent_pages << 12,
	};
	return device->frames ? 0 : -ENOMEM;
}

void blk_device_deinit(struct blk_device *device, struct blk_frames **frames)
{
	frames_return(frames, device->frames);
}
