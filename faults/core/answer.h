/* SPDX-License-Identifier: Apache-2.0 */
/* Answers to reads, and to what a guest does with its memory (answer.c). */
#ifndef COWSHED_ANSWER_H
#define COWSHED_ANSWER_H

#include "faults/core/guest.h"

/* A missing or minor fault on a page; flags are UFFD_PAGEFAULT_FLAG_*. */
void answer_access(struct guest *guest, uint64_t page, uint64_t flags, uint64_t read_ns);
/* The guest gave pages back (madvise) or unmapped them. */
void answer_discard(struct guest *guest, uint64_t first, uint64_t nr, bool unmapped);
/* A fault on a page of an open region. */
void answer_in_open(struct guest *guest, uint64_t page, uint64_t flags);
/* Wakes faults that are blocked on one of the pages. */
void answer_wake(struct guest *guest, uint64_t first, uint64_t nr);
/* Under the account's write_lock: poisons a page that is not mapped. */
int answer_poison(struct guest *guest, uint64_t page);
/* Maps a part of ahead_*; returns whether there was anything to do. */
bool answer_ahead(struct guest *guest);
/* image->repair: repairs the poisoned pages of an extent that was loaded after all. */
void answer_repair(struct image *image, uint64_t extent);
/* Handles an ioctl's error: retry later, broken guest, or nothing. */
void answer_failed(struct guest *guest, int err);

#endif
