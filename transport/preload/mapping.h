/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Makes guest mappings of parts of the image, and takes those over that were inherited across fork.
 * Only for whoever holds the lock. See mapping.c for the order of the steps, which is what matters.
 */
#ifndef COWSHED_PRELOAD_MAPPING_H
#define COWSHED_PRELOAD_MAPPING_H

#include <stddef.h>
#include <stdint.h>

#include "transport/preload/table.h"

/* As mmap(2) of the image with these arguments, which were checked: whole pages, offset_bytes inside the
   image, flags that can be served. What lies past the image's end is SIGBUS, as with any file. Gives
   the address or -errno, and has then said why; -EINTR is not the end, see lock_wait. After a failure a MAP_FIXED
   target that was mapped is PROT_NONE. */
intptr_t mapping_make(uintptr_t address, size_t length, int prot, int flags, uint64_t offset_bytes);

/* In a forked child, where only this thread runs: guards a range that came over fork, keeps its private
   pages, and adds it to the table with a link of its own. On failure touching it is SIGBUS for good. */
void mapping_inherit(struct range range);

/* Replaces a range by memory that is SIGBUS to touch, with the same protection; unmaps it if that fails. */
void mapping_invalidate(const struct range *range);

/* Notes what of a mapping is past the image's end, and therefore guarded by nobody. Needs a reserved range. */
void mapping_note_tail(struct range tail);

/* What the image covers of it, from offset_bytes on. */
uint64_t mapping_covered(uint64_t offset_bytes, size_t length);

#endif
