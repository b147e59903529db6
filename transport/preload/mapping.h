/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Makes guest mappings of parts of the image, and takes over those that were inherited across fork.
 * The caller must hold the lock. The order of the steps matters: see mapping.c.
 */
#ifndef COWSHED_PRELOAD_MAPPING_H
#define COWSHED_PRELOAD_MAPPING_H

#include <stddef.h>
#include <stdint.h>

#include "transport/preload/table.h"

/* As mmap(2) of the image with these arguments, which were checked: whole pages, offset_bytes inside the
   image, flags that can be served. Pages past the image's end are SIGBUS, as with any file. Returns
   the address or -errno, and reports failures but those of mmap itself; -EINTR means to call again, see lock_wait.
   After a failure a MAP_FIXED target that was mapped is PROT_NONE. */
intptr_t mapping_make(uintptr_t address, size_t length, int prot, int flags, uint64_t offset_bytes);

/* In a forked child, where only this thread runs: guards a range that came over fork, keeps its private
   pages, and adds it to the table with a link of its own. On failure touching it is SIGBUS for good. */
void mapping_inherit(struct range range);

/* Replaces a range by memory that is SIGBUS to touch, with the same protection; unmaps it if that fails. */
void mapping_invalidate(const struct range *range);

/* Notes the part of a mapping that is past the image's end, which nothing guards. Needs a reserved range. */
void mapping_note_tail(struct range tail);

/* How many of length bytes from offset_bytes on the image covers. */
uint64_t mapping_covered(uint64_t offset_bytes, size_t length);

/* Before the bytes from start to end become writable: has the backend charge for open regions there. 0, or -EINTR: call
   it again. */
int mapping_make_writable(uintptr_t start, uintptr_t end);

#endif
