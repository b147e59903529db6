/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The standby list: the bytes of extents that lost their frames and are not dropped yet.
 *
 * A victim of the evictor is unmapped from every guest and its bytes move to a slot of this list. A touch then faults,
 * and the bytes go back into the frames without a read of the source (a soft hit); what nobody touches is dropped from
 * the old end. So the list shows which extents are used, which the page tables of guests do not. The extent itself is
 * ABSENT (or LOADING, while its bytes go back): only the load looks here.
 *
 * A slot has the size of the store's extents, and an image with larger extents has none in the list: a copy of 2 MiB
 * would take as long as many a source takes to read them. Its victims are dropped at once.
 *
 * Slots are parts of one memfd without a name, which ends with the process: a successor begins with an empty list. A
 * slot in use counts against the store's capacity as a frame does, and its memory is given back to the system before
 * its room is given to others.
 */
#ifndef COWSHED_STANDBY_H
#define COWSHED_STANDBY_H

#include <stdbool.h>
#include <stdint.h>

struct image;
struct store;

/* A slot's number, from 1; 0 is none. */
typedef uint32_t slot_no;

struct standby_slot {
	struct image *image; /* NULL: not in a list of extents */
	uint32_t extent;
	slot_no next, prev;
	uint64_t since_ns;   /* CLOCK_MONOTONIC, when the extent was unmapped */
	uint64_t touched_ns; /* and when its return was asked for */
	uint64_t pushed;     /* its number among the slots ever pushed */
	bool is_sample, is_claimed;
};

struct standby_list {
	slot_no first, last;
	uint64_t nr;
};

/*
 * All under the store's lock, but the bytes of slots: those belong to the thread that has taken the slot out of its
 * list.
 *
 * Invariants: (1) a slot is in free, in one of victims, samples and claimed, or belongs to one thread; (2)
 * image->standby[e] is s if and only if slot s is in one of these three with that image and extent; it is in claimed if
 * e is LOADING, and else e is ABSENT, or EVICTING while it is scrubbed; (3) nr_pages counts the pages of all; (4)
 * nr_in_hand <= nr_hand. standby_check recomputes (2) and (3).
 */
struct standby {
	int fd;
	struct standby_slot *slots; /* by number; NULL: there is no standby list in this store */
	struct standby_list free, victims, samples;
	struct standby_list claimed; /* victims and samples about to be loaded: not to be dropped */
	slot_no nr_slots, nr_used_ever;
	uint64_t nr_pushed;
	uint64_t slot_bytes;
	uint64_t nr_pages;            /* of the extents in victims, samples and claimed */
	uint64_t limit;               /* extents that may be there */
	uint64_t nr_dropping;         /* slots taken out to be dropped, whose memory is not given back yet */
	uint32_t nr_hand, nr_in_hand; /* slots for bytes on their way into the list: at most, now */
};

/* Makes an empty list of at most limit_max extents, with a limit of 0, and nr_hand slots more. -ENOMEM, -EINVAL, or the
 * memfd's error. */
int standby_init(struct standby *standby, uint64_t limit_max, uint32_t nr_hand, uint64_t slot_bytes);
void standby_deinit(struct standby *standby);
/* Whether the list takes extents of an image: those of the store's size. Larger ones are dropped at once. */
bool standby_takes(const struct standby *standby, const struct image *image);
/* Extents in the list. */
static inline uint64_t standby_nr(const struct standby *standby)
{
	return standby->victims.nr + standby->samples.nr + standby->claimed.nr;
}

/* The room that the list takes in the capacity, in extents. */
static inline uint64_t standby_room(const struct standby *standby)
{
	return standby_nr(standby) + standby->nr_dropping + (standby->limit ? standby->nr_hand : standby->nr_in_hand);
}

/* How many extents standby_take_oldest could take out, one after the other. */
static inline uint64_t standby_nr_droppable(const struct standby *standby)
{
	return standby->victims.nr + standby->samples.nr;
}

/* Takes up to nr free slots into the caller's hand, no more than nr_hand allows; returns how many. */
uint32_t standby_take_free(struct standby *standby, slot_no *slots_out, uint32_t nr);
/* Puts a slot with bytes in it, in hand since standby_take_free, at the young end of victims or samples. since_ns: when
 * the extent was unmapped. */
void standby_push(struct standby *standby, slot_no slot, struct image *image, uint32_t extent, uint64_t since_ns,
                  bool is_sample);
/* An extent with a slot becomes LOADING, or ABSENT again without a load. */
void standby_claim(struct standby *standby, const struct image *image, uint64_t extent);
void standby_unclaim(struct standby *standby, const struct image *image, uint64_t extent);
/* How old a slot is: 0 just pushed, STANDBY_AGE_MAX as many pushes ago as the list is long, or more. */
uint32_t standby_age(const struct standby *standby, slot_no slot);
/* Takes an extent's slot, if any (else 0), out of its list. The bytes stay until standby_empty. */
slot_no standby_take(struct standby *standby, struct image *image, uint64_t extent);
/* Takes out the oldest slot of victims, or of samples if there is none; 0 if there is none at all. image_out,
 * extent_out: whose it was. */
slot_no standby_take_oldest(struct standby *standby, struct image **image_out, uint32_t *extent_out);
/* Puts a slot without memory into free; one from standby_take_free must leave nr_in_hand, too. */
void standby_put_free(struct standby *standby, slot_no slot);
/* Without the lock, by the thread that took the slots out: copy bytes in and out (0, or -errno), give memory back. */
int standby_fill(struct standby *standby, slot_no slot, const struct image *image, uint64_t extent, char *buffer);
int standby_read(struct standby *standby, slot_no slot, const struct image *image, uint64_t extent, char *to);
void standby_empty(struct standby *standby, const slot_no *slots, uint64_t nr);
/* Recomputes the invariants over the images of a store; returns one that does not hold, or NULL. */
const char *standby_check(const struct store *store);

#endif
