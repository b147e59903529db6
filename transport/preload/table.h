/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The guest mappings of this process: ranges of addresses, and the links that serve them.  A link is one connection to
 * the backend and one userfaultfd; it has one range, or several after a part in the middle was unmapped.  The caller
 * must hold the lock, except for the two functions that say otherwise.
 *
 * Ranges do not overlap and are sorted by address. link.nr_ranges counts the ranges that name it, and a link without
 * any is closed. While a link has ranges its descriptors are open, numbered above those that programs use.
 */
#ifndef COWSHED_PRELOAD_TABLE_H
#define COWSHED_PRELOAD_TABLE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define TABLE_MAX_LINKS 256
#define TABLE_MAX_RANGES 1024
/* Of a range past the image's end: touching it is SIGBUS, and no backend serves it. */
#define TABLE_NO_LINK UINT16_MAX

/* Identifies the frames that are mapped: an image's memfd in a backend. */
struct frames {
	dev_t device;
	ino_t inode;
};

struct range {
	uintptr_t start, end;
	uint64_t offset_bytes; /* of start, in the image */
	int prot;              /* last set for the whole range */
	uint16_t link_no;      /* or TABLE_NO_LINK */
	bool is_zerocopy;      /* the program asked for MAP_SHARED: never writable */
	bool read_only;        /* the backend was told that it is not written: it charges nothing for open regions */
	bool no_fork;          /* the program advised MADV_DONTFORK */
	struct frames frames;
};

struct link {
	int connection_fd, uffd;
	unsigned nr_ranges;
};

extern struct range table_ranges[TABLE_MAX_RANGES];
extern unsigned table_nr_ranges;
extern struct link table_links[TABLE_MAX_LINKS];

/* Without the lock: false only if no guest mapping touches the bytes from start to end. */
bool table_may_touch(uintptr_t start, uintptr_t end);
/* Without the lock: false only if no link has the descriptor. */
bool table_may_own(unsigned first_fd, unsigned last_fd);

bool table_touches(uintptr_t start, uintptr_t end);

/* 0, or -ENOMEM if the table lacks room; count one range for each that may be added or split. */
int table_reserve(unsigned nr_ranges, unsigned nr_links);

/* Takes over both descriptors, moves them out of programs' way, and returns the link's number. Needs a
   reserved link. The caller must give it a range, or close the descriptors. */
uint16_t table_add_link(int connection_fd, int uffd);
void table_add(struct range range);

/* Forgets the ranges from start to end, splitting those at the borders; closes links without a range left. */
void table_cut(uintptr_t start, uintptr_t end);

/* Gives start to end, which must lie in one range, to another link and other frames, after another mapping was put
   there.  Closes a link without a range left.  Needs two reserved ranges. The addresses never leave the table. */
void table_reassign(uintptr_t start, uintptr_t end, uint16_t link_no, struct frames frames);

/* Before an unmap: ends the links whose ranges all lie from start to end. Makes the ranges PROT_NONE, waits until the
   backend has released them, lifts the guard and forgets them. 0, or -EINTR: call it again. */
int table_retire(uintptr_t start, uintptr_t end);

/* Returns the range that contains start to end, or NULL. */
struct range *table_find(uintptr_t start, uintptr_t end);

/* Returns the field of a link that holds this descriptor, or NULL. */
int *table_find_fd(int fd);

/* Moves a descriptor to another number, out of programs' way; the old one is closed. */
void table_hide_fd(int *fd);

/* Must be called after ranges or descriptors were changed in place. */
void table_update_bounds(void);

/* For a process that has the table but not the mappings: forgets the ranges; links keep their descriptors. */
void table_forget_ranges(void);

/* For a forked child: closes the inherited descriptors and forgets all links, leaving ranges to the caller. */
void table_drop_links(void);

#endif
