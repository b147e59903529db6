/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "cache/core/standby.h"

#include "cache/core/abi.h"
#include "cache/core/points.h"
#include "cache/core/store.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

static void list_append(struct standby *standby, struct standby_list *list, slot_no slot)
{
	standby->slots[slot].prev = list->last;
	standby->slots[slot].next = 0;
	if (list->last)
		standby->slots[list->last].next = slot;
	else
		list->first = slot;
	list->last = slot;
	list->nr++;
}

static void list_unlink(struct standby *standby, struct standby_list *list, slot_no slot)
{
	slot_no prev = standby->slots[slot].prev, next = standby->slots[slot].next;

	if (prev)
		standby->slots[prev].next = next;
	else
		list->first = next;
	if (next)
		standby->slots[next].prev = prev;
	else
		list->last = prev;
	list->nr--;
}

static struct standby_list *list_of(struct standby *standby, const struct standby_slot *at)
{
	return at->is_claimed ? &standby->claimed : at->is_sample ? &standby->samples : &standby->victims;
}

int standby_init(struct standby *standby, uint64_t limit_max, uint32_t nr_hand, uint64_t slot_bytes)
{
	uint64_t nr_slots = limit_max + nr_hand;

	if (!nr_hand || nr_slots >= UINT32_MAX)
		return -EINVAL;
	struct standby_slot *slots = calloc(nr_slots + 1, sizeof *slots);
	int fd = memfd_create("cowshed-standby", MFD_CLOEXEC);
	if (!slots || fd < 0 || ftruncate(fd, (off_t)(nr_slots * slot_bytes)) < 0) {
		int err = slots ? -errno : -ENOMEM;

		free(slots);
		if (fd >= 0)
			close(fd);
		return err;
	}
	*standby = (struct standby){
		.fd = fd, .slots = slots, .nr_slots = (slot_no)nr_slots, .slot_bytes = slot_bytes, .nr_hand = nr_hand};
	return 0;
}

void standby_deinit(struct standby *standby)
{
	if (!standby->slots)
		return;
	assert(standby_nr(standby) == 0 && standby->nr_in_hand == 0 && standby->nr_dropping == 0);
	free(standby->slots);
	close(standby->fd);
	standby->slots = NULL;
}

bool standby_takes(const struct standby *standby, const struct image *image)
{
	return (uint64_t)image->shape.extent_pages * PAGE_BYTES == standby->slot_bytes;
}

uint32_t standby_take_free(struct standby *standby, slot_no *slots_out, uint32_t nr)
{
	uint32_t nr_taken = 0;

	while (nr_taken < nr && standby->nr_in_hand < standby->nr_hand) {
		slot_no slot = standby->free.first;

		if (slot)
			list_unlink(standby, &standby->free, slot);
		else if (standby->nr_used_ever < standby->nr_slots)
			slot = ++standby->nr_used_ever;
		else
			break;
		slots_out[nr_taken++] = slot;
		standby->nr_in_hand++;
	}
	return nr_taken;
}

void standby_push(struct standby *standby, slot_no slot, struct image *image, uint32_t extent, uint64_t since_ns,
                  bool is_sample)
{
	struct standby_slot *at = &standby->slots[slot];

	assert(image->standby[extent] == 0);
	at->image = image;
	at->extent = extent;
	at->since_ns = since_ns;
	at->touched_ns = 0;
	at->pushed = ++standby->nr_pushed;
	at->is_sample = is_sample;
	at->is_claimed = false;
	image->standby[extent] = slot;
	standby->nr_pages += image_extent_pages(image, extent);
	standby->nr_in_hand--;
	list_append(standby, list_of(standby, at), slot);
}

/* Moves the extent's slot, if any, between claimed and the list that it came from. */
static void set_claimed(struct standby *standby, const struct image *image, uint64_t extent, bool is_claimed)
{
	slot_no slot = image->standby[extent];

	if (!slot)
		return;
	struct standby_slot *at = &standby->slots[slot];
	list_unlink(standby, list_of(standby, at), slot);
	at->is_claimed = is_claimed;
	list_append(standby, list_of(standby, at), slot);
}

void standby_claim(struct standby *standby, const struct image *image, uint64_t extent)
{
	set_claimed(standby, image, extent, true);
}

void standby_unclaim(struct standby *standby, const struct image *image, uint64_t extent)
{
	set_claimed(standby, image, extent, false);
}

uint32_t standby_age(const struct standby *standby, slot_no slot)
{
	uint64_t nr_since = standby->nr_pushed - standby->slots[slot].pushed;
	uint64_t age = nr_since * STANDBY_AGE_MAX / (standby->limit ? standby->limit : 1);

	return age < STANDBY_AGE_MAX ? (uint32_t)age : STANDBY_AGE_MAX;
}

slot_no standby_take(struct standby *standby, struct image *image, uint64_t extent)
{
	slot_no slot = image->standby ? image->standby[extent] : 0;

	if (slot) {
		struct standby_slot *at = &standby->slots[slot];

		list_unlink(standby, list_of(standby, at), slot);
		standby->nr_pages -= image_extent_pages(image, extent);
		image->standby[extent] = 0;
		at->image = NULL;
	}
	return slot;
}

slot_no standby_take_oldest(struct standby *standby, struct image **image_out, uint32_t *extent_out)
{
	slot_no slot = standby->victims.first ? standby->victims.first : standby->samples.first;

	if (slot) {
		*image_out = standby->slots[slot].image;
		*extent_out = standby->slots[slot].extent;
		standby_take(standby, *image_out, *extent_out);
	}
	return slot;
}

void standby_put_free(struct standby *standby, slot_no slot)
{
	list_append(standby, &standby->free, slot);
}

static off_t slot_offset(const struct standby *standby, slot_no slot)
{
	return (off_t)((slot - 1) * standby->slot_bytes);
}

int standby_fill(struct standby *standby, slot_no slot, const struct image *image, uint64_t extent, char *buffer)
{
	size_t length = image_extent_pages(image, extent) * PAGE_BYTES;
	off_t from = (off_t)(extent * standby->slot_bytes);
	int err = point_reach(POINT_STANDBY_FILL);

	/* Memory to memory: short only if the machine has no memory left. */
	if (!err && pread(image->frames_fd, buffer, length, from) != (ssize_t)length)
		err = -EIO;
	if (!err && pwrite(standby->fd, buffer, length, slot_offset(standby, slot)) != (ssize_t)length)
		err = -ENOMEM;
	return err;
}

int standby_read(struct standby *standby, slot_no slot, const struct image *image, uint64_t extent, char *to)
{
	size_t length = image_extent_pages(image, extent) * PAGE_BYTES;
	int err = point_reach(POINT_STANDBY_READ);

	if (!err && pread(standby->fd, to, length, slot_offset(standby, slot)) != (ssize_t)length)
		err = -EIO;
	return err;
}

void standby_empty(struct standby *standby, const slot_no *slots, uint64_t nr)
{
	for (uint64_t i = 0; i < nr; i++)
		if (fallocate(standby->fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, slot_offset(standby, slots[i]),
		              (off_t)standby->slot_bytes) < 0)
			abort(); /* as image_punch: it does not fail for any reason that we could repair */
}

const char *standby_check(const struct store *store)
{
	const struct standby *standby = &store->standby;
	uint64_t nr_found = 0, nr_pages = 0;

	for (const struct image *image = store->images; image; image = image->next)
		for (uint64_t e = 0; e < image->shape.nr_extents; e++) {
			enum extent_state state = extent_state(&image->states[e]);
			slot_no slot = image->standby[e];

			if (!slot)
				continue;
			if (standby->slots[slot].image != image || standby->slots[slot].extent != e ||
			    state == EXTENT_RESIDENT)
				return "standby (2): the slot of an extent that is not RESIDENT names that extent";
			if (standby->slots[slot].is_claimed != (state == EXTENT_LOADING))
				return "standby (2): the slot of an extent is in claimed while that is LOADING";
			nr_found++;
			nr_pages += image_extent_pages(image, e);
		}
	if (nr_found != standby_nr(standby))
		return "standby (2): each slot in victims, samples and claimed is an extent's";
	if (nr_pages != standby->nr_pages)
		return "standby (3): nr_pages counts the pages of all";
	return standby->nr_in_hand <= standby->nr_hand ? NULL : "standby (4): nr_in_hand <= nr_hand";
}
