/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The guest mappings of this process: ranges of addresses, and the links that answer for them.  A link is
 * one connection to the backend and one userfaultfd; it has a range, several after a part in the middle was
 * unmapped, and ends with its last.  Only for whoever holds the lock, but for the two that say otherwise.
 *
 * Ranges do not overlap and are sorted by address. link.nr_ranges counts the ranges that name it, and a link without any
 * is closed. A link's descriptors are open, above the numbers that programs use, while it has ranges.
 */
#ifndef COWSHED_PRELOAD_TABLE_H
#define COWSHED_PRELOAD_TABLE_H

#include <stdbool.h>
#include <stdint.h>
#include <sys/types.h>

#define TABLE_MAX_LINKS 256
#define TABLE_MAX_RANGES 1024
/* Of a range that is past the image's end: SIGBUS for whoever touches it, with nobody to answer for it. */
#define TABLE_NO_LINK UINT16_MAX

/* Whose frames are mapped: the file of an image in a backend. */
struct frames {
	dev_t device;
	ino_t inode;
};

struct range {
	uintptr_t start, end;
	uint64_t offset_bytes; /* of start, in the image */
	int prot;              /* what the whole of it was last given */
	uint16_t link_no;      /* or TABLE_NO_LINK */
	bool is_zerocopy;      /* asked for as MAP_SHARED: never to be written */
	bool no_fork;          /* the program wants children without it */
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

/* -ENOMEM if the table is full; take a range for each that may be added or split. */
int table_reserve(unsigned nr_ranges, unsigned nr_links);

/* Takes both descriptors over and moves them out of programs' way; gives the link's number. Needs a
   reserved link. Until a range names it, it stays open. */
uint16_t table_add_link(int connection_fd, int uffd);
void table_add(struct range range);

/* Forgets what lies between, splitting ranges at the borders; links without a range left are closed. */
void table_cut(uintptr_t start, uintptr_t end);

/* What lies between, all of it in one range, is another link's from now on, and of other frames: another mapping has
   come there.  A link without a range left is closed.  Needs two reserved ranges. At no instant is nothing there. */
void table_reassign(uintptr_t start, uintptr_t end, uint16_t link_no, struct frames frames);

/* Takes away the guard of those links whose ranges all lie between, once the backend has let go of them:
   for who is about to unmap it all. Their ranges become PROT_NONE and are forgotten. 0, or -EINTR: call it again. */
int table_retire(uintptr_t start, uintptr_t end);

/* The range that holds all of it, or NULL. */
struct range *table_find(uintptr_t start, uintptr_t end);

/* Where a link keeps this descriptor; NULL if none has it. */
int *table_find_fd(int fd);

/* Moves a descriptor to another number, out of programs' way; the old one is closed. */
void table_hide_fd(int *fd);

/* After ranges were changed in place. */
void table_update_bounds(void);

/* In a process that has the table and not the mappings: there are no ranges, and links keep their descriptors. */
void table_forget_ranges(void);

/* A forked child: closes the inherited descriptors and forgets all links, leaving ranges to the caller. */
void table_drop_links(void);

#endif
