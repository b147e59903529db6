/* SPDX-License-Identifier: Apache-2.0 */
/* Memory that a guest moves or unmaps, and addresses outside its regions (remap.c). */
#ifndef COWSHED_REMAP_H
#define COWSHED_REMAP_H

#include "faults/core/guest.h"

/* The guest moved some of its memory; discarded or unmapped some; faulted outside its regions. */
void answer_remap(struct guest *guest, uint64_t from, uint64_t to, uint64_t length);
void answer_unmap(struct guest *guest, uint64_t start, uint64_t end, bool unmapped);
void answer_unknown_address(struct guest *guest, uint64_t address);
/* Drops a guest that moved its memory into too many regions. */
void answer_drop(struct guest *guest);

#endif
